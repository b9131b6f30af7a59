"""Exceptions that cross rooms. Every message is one line that a user can act on, without passwords."""

import re


class ServeAppError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(ServeAppError):
    """An option has a value that cannot work. The message names the option, its value and what was expected."""


class InvalidRequest(ServeAppError):
    """A request that is refused before any work.

    Args:
        param: name of the field at fault, as the API spells it; None if no single field is.
        message: one sentence with the value and what was expected.
    """

    def __init__(self, param: str | None, message: str) -> None:
        super().__init__(param, message)
        self.param = param
        self.message = message

    def __str__(self) -> str:
        return self.message


class DeadlineInfeasible(InvalidRequest):
    """A deadline that cannot be met as far as is known.

    Args:
        message: one sentence with the deadline and what was expected.
        earliest_s: seconds after which the video is expected in nine of ten cases.
    """

    def __init__(self, message: str, earliest_s: float) -> None:
        super().__init__("deadline_s", message)
        self.args = (message, earliest_s)
        self.earliest_s = earliest_s


class Unavailable(ServeAppError):
    """Nothing can be accepted at the moment, whatever the request. The message says why."""


class CheckpointError(ServeAppError):
    """A model folder lacks a file, or a file does not match its configuration. The message names the file."""


class StateError(ServeAppError):
    """A saved sample cannot be continued here. The message names what was found and what was expected."""


def without_password(url: str) -> str:
    """Return a URL for people, with `***` for whatever may be a password, in front of the host or in the query.

    A password may hold characters that it should not, so that a parser would see it end elsewhere; it is hidden whole.
    """
    shown = re.sub(r"(//[^:/]*):.*@" if "//" in url else r"^([^:@]*):.*@", r"\1:***@", url, flags=re.DOTALL)
    return re.sub(r"([?&]pass\w*=)[^&]*", r"\1***", shown, flags=re.IGNORECASE)


def one_line(error: BaseException) -> str:
    """Return an exception for people: its type and its first line, at most 300 characters."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"[:300]


class JobFailed(ServeAppError):
    """A job ended without a video.

    Args:
        code: a stable word for programs, `out_of_memory` or `cancelled` for example.
        message: one sentence for people.
        retryable: whether another attempt could succeed (after a lost rank) or not (a request that cannot fit).
        step: the denoising step, counted from 1, during which a group of ranks was lost with this job in it, so that
            the job may be the reason. None in all other cases.
    """

    def __init__(self, code: str, message: str, retryable: bool = False, step: int | None = None) -> None:
        super().__init__(code, message, retryable, step)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.step = step

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"
