"""The exception of this package, and its message for a bad option."""

from __future__ import annotations

from typing import Any


class ClusterError(Exception):
    """The error for something that cannot be done. Its message is one line that names the option or host at fault."""


def bad_option(option: str, value: Any, expected: str) -> ClusterError:
    """Return the error for an option whose value cannot work."""
    return ClusterError(f"{option} has value {value!r}, expected {expected}")
