"""The one exception of this package, and what raises it for bad options."""

from __future__ import annotations

from typing import Any


class ClusterError(Exception):
    """Something asked for cannot be done. The message is one line that names the option or host at fault."""


def bad_option(option: str, value: Any, expected: str) -> ClusterError:
    """The error for an option whose value cannot work."""
    return ClusterError(f"{option} has value {value!r}, expected {expected}")
