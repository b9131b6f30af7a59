"""A finding: one line on one check, with what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum


class Level(StrEnum):
    """The weight of a finding."""

    ok = "ok"
    warning = "warning"
    error = "error"


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        check: the check's name.
        level: `error` if videos fail or will, `warning` if they are slow or may.
        said: what was found, in one line.
        do: what to do about it; empty if there is nothing to do.
    """

    check: str
    level: Level
    said: str
    do: str = ""

    def __str__(self) -> str:
        return f"{self.level:<7}  {self.check}: {self.said}" + (f" -> {self.do}" if self.do else "")

    def to_json(self) -> dict[str, str]:
        """Return the finding for programs."""
        return {**asdict(self), "level": str(self.level)}


def ok(check: str, said: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(check, Level.ok, said)


def warning(check: str, said: str, do: str) -> Finding:
    """Return a finding that something is slow, or may fail."""
    return Finding(check, Level.warning, said, do)


def error(check: str, said: str, do: str) -> Finding:
    """Return a finding that something fails, or will."""
    return Finding(check, Level.error, said, do)
