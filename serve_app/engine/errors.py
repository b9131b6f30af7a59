"""Errors between an engine, its group and the ranks. Raised on ranks too, so each of them survives pickling."""

from __future__ import annotations

from serve_app.errors import ServeAppError


class OutOfMemory(ServeAppError):
    """A step did not fit into memory. No sample has changed.

    Args:
        message: what was refused.
        exchanged: how many messages between ranks the step had begun by then.
    """

    def __init__(self, message: str, exchanged: int = 0) -> None:
        super().__init__(message, exchanged)
        self.exchanged = exchanged

    def __str__(self) -> str:
        return str(self.args[0])


class DeviceBroken(ServeAppError):
    """The device failed in a way that this process cannot go on from."""


class GroupLost(ServeAppError):
    """A rank died or hangs: the whole group must be replaced, because the others wait for it in a collective.

    Args:
        message: what happened.
        host: whether the rank's host was lost, which no sample can be the reason of.
    """

    def __init__(self, message: str, host: bool = False) -> None:
        super().__init__(message)
        self.host = host


class NotAdmitting(ServeAppError):
    """The engine admits no more samples: its group is lost, or its samples move elsewhere."""
