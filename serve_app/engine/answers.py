"""Answers of a group's ranks to one call, and what they say of the group."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from serve_app.engine.errors import DeviceBroken, GroupLost
from serve_app.errors import ServeAppError

# A call that failed on one rank leaves the others waiting in a collective for ever; this is how long they may lag.
_STRAGGLER_S = 5.0


@dataclass(frozen=True)
class Answers:
    """The answers of all ranks to one call.

    Attributes:
        values: what the ranks returned, in their order; without those that raised or are late.
        errors: what the others raised, in their order.
        late: how many ranks did not answer.
        timeout_s: how long they had.
    """

    values: list[Any]
    errors: list[BaseException]
    late: int
    timeout_s: float

    @classmethod
    async def gather(cls, timeout_s: float, references: Iterable[Any]) -> Answers:
        """Wait until every rank has answered, or one has died, or the time is over.

        Args:
            timeout_s: how long to wait for a call that fails nowhere.
            references: Ray's references to the answers, by rank.
        """
        answers = [asyncio.wrap_future(reference.future()) for reference in references]
        done, late = await asyncio.wait(answers, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        errors = _errors(done)
        # Where a rank has died the others' answers decide nothing: they may be waiting for it in a collective.
        if late and errors and not any(isinstance(error, RayActorError | DeviceBroken) for error in errors):
            more, late = await asyncio.wait(late, timeout=_STRAGGLER_S)
            done |= more
        for answer in late:
            answer.cancel()
        ended = [answer for answer in answers if answer in done]
        values = [answer.result() for answer in ended if answer.exception() is None]
        return cls(values, _errors(ended), len(late), timeout_s)

    def results(self) -> list[Any]:
        """Return what every rank returned.

        Raises:
            GroupLost: a rank is gone or did not answer, or the ranks are out of step.
            BaseException: what every rank raised; they are still in step.
        """
        self._check_alive()
        self._check_in_step()
        if self.errors:
            raise self.errors[0]
        if self.late:
            ranks = self.late + len(self.values)
            raise GroupLost(f"{self.late} of {ranks} ranks did not answer within {self.timeout_s:.0f} s")
        return self.values

    def _check_alive(self) -> None:
        for error in self.errors:
            if isinstance(error, RayActorError):
                raise GroupLost(f"a rank died: {_first_line(error)}", host=_host_died(error)) from error
            if isinstance(error, DeviceBroken):
                raise GroupLost(f"a rank's device failed: {error}") from error

    def _check_in_step(self) -> None:
        """Check that a call that failed has failed on all ranks, in the same place."""
        # On a device a rank runs ahead: what it has begun alone the others would take for the first of the next step.
        places = {getattr(error, "exchanged", 0) for error in self.errors}
        if self.errors and (self.late or self.values or len(places) > 1):
            raise GroupLost(f"the ranks are out of step: {_first_line(self.errors[0])}") from self.errors[0]


def _errors(answers: Iterable[asyncio.Future[Any]]) -> list[BaseException]:
    return [_cause(error) for answer in answers if (error := answer.exception())]


def _cause(error: BaseException) -> BaseException:
    """Return what was raised on the rank; Ray's wrapper only adds where."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, ServeAppError):
        return error.cause
    return GroupLost(str(error)) if isinstance(error, GetTimeoutError) else error


def _host_died(error: RayActorError) -> bool:
    """Return whether the actor's host, or the link to it, was lost. Ray tells a lost host apart in words only."""
    return isinstance(error, ActorUnavailableError) or "its node has died" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
