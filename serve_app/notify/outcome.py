"""The outcome of one try to deliver a webhook or a mail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The outcome of a try.

    Attributes:
        delivered: whether the receiver has it.
        seconds: the time that it took.
        status_code: the status of HTTP or SMTP that the receiver answered; None without an answer.
        answer: the first characters of the answer's body.
        error: why it did not arrive, in one line; empty if it did.
        final: whether another try is useless.
        disable: why nothing more is to be sent to this endpoint; empty if it stays enabled.
    """

    delivered: bool
    seconds: float
    status_code: int | None = None
    answer: str = ""
    error: str = ""
    final: bool = False
    disable: str = ""

    def entry(self, at: float) -> dict[str, Any]:
        """Return the entry for the delivery's log; `at` is when the try ended, in seconds since the epoch."""
        return {
            "at": at,
            "seconds": round(self.seconds, 3),
            "status_code": self.status_code,
            "answer": self.answer,
            "error": self.error or None,
        }
