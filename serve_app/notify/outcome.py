"""How one try to deliver something went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """A try.

    Attributes:
        delivered: whether the receiver has it.
        seconds: how long it took.
        status_code: what the receiver answered, of HTTP or SMTP; None if it did not come to that.
        answer: the first characters of the answer's body.
        error: why it did not arrive, in one line; empty if it did.
        final: whether there is no use in trying again.
        disable: if not empty, why nothing more is to be sent to this endpoint.
    """

    delivered: bool
    seconds: float
    status_code: int | None = None
    answer: str = ""
    error: str = ""
    final: bool = False
    disable: str = ""

    def entry(self, at: float) -> dict[str, Any]:
        """As the log of deliveries keeps it; `at` is when it ended."""
        return {
            "at": at,
            "seconds": round(self.seconds, 3),
            "status_code": self.status_code,
            "answer": self.answer,
            "error": self.error or None,
        }
