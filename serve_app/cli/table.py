"""Tables of the command line: aligned columns under headings, for people and for grep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under their headings. Unlike rich's tables it cuts nothing off: ids have to stay whole."""
    lines = [headings, *rows]
    widths = [max(cell_len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())


def one_cell(text: str, most: int = 60) -> str:
    """Return text of a user as one short line without control characters."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"
