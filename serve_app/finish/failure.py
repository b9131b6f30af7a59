"""Errors of finishing. The frames are still there when one is raised, so that the plain video can be kept."""

from __future__ import annotations

from serve_app.errors import ServeAppError


class FinishFailed(ServeAppError):
    """A step failed. The plain video can be used in place of the finished one.

    Args:
        step: the step, as in `Finish.steps`.
        message: one line with the reason.
    """

    def __init__(self, step: str, message: str) -> None:
        super().__init__(step, message)
        self.step = step
        self.message = message

    def __str__(self) -> str:
        return f"{self.step}: {self.message}"


class FinishStopped(ServeAppError):
    """Finishing ended early, because nobody wants the video any more."""

    def __init__(self) -> None:
        super().__init__("nobody wants this video any more")
