"""The tables of `benchmarks/results` with memory that was measured on H100s and H200s, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks/results"
COLUMNS = ("peak GB", "now, peak GB", "reserved GB", "MiB a device")
"""Columns that hold memory."""


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes:
        file: name of the results, without `.md`.
        title: the heading above the table.
        cells: by column.
    """

    file: str
    title: str
    cells: dict[str, str]

    @property
    def key(self) -> str:
        """File, heading, and the first cells, which tell a row from others."""
        return " | ".join([self.file, self.title, *list(self.cells.values())[:5]])

    def numbers(self, column: str) -> list[float]:
        """Return the numbers of a cell, of which there may be one for each size."""
        return [float(one) for one in self.cells.get(column, "").split(",") if one.strip()]


def lines() -> list[Line]:
    """Return the rows of all tables that hold memory of H100s or H200s."""
    found = []
    for path in sorted(FOLDER.glob("*h[12]00.md")):
        for title, table in _tables(path.read_text().splitlines()):
            rows = [_cells(line) for line in table]
            heads = rows[0]
            for row in rows[2:]:
                line = Line(path.stem, title, dict(zip(heads, row, strict=True)))
                if any(heading in COLUMNS and line.numbers(heading) for heading in heads):
                    found.append(line)
    return found


def _tables(text: list[str]) -> Iterator[tuple[str, list[str]]]:
    title, table = "", list[str]()
    for line in [*text, ""]:
        if line.startswith("#"):
            title = line.strip("# ")
        if line.startswith("|"):
            table.append(line)
        elif table:
            yield title, table
            table = []


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
