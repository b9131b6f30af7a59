"""The rows of `benchmarks/results` with memory that was measured on H100s and H200s, beside the model of the plan."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.config import Config
from serve_app.planning.memory import PARKED, SLACK, SYMMETRIC, WORK_OF_TILE, RankMemory, Size, tile_bytes
from serve_app.planning.model_shape import ModelShape
from serve_app.planning.parts import ProcessMemory
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.weights.tensors import ExpertConfig

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


MODEL = ModelShape.published()
SIZES = {"832x480": Size(832, 480, 81), "1280x720": Size(1280, 720, 81)}

# Files of earlier code: ranks of tensor parallelism made sums by NCCL, and divided all of cross-attention. That they
# exchange through symmetric memory was new in the last one, and that cross-attention is whole in the ones after it.
_BY_NCCL = (
    "2026-11-24-a14b-1xh200",
    "2026-11-25-a14b-2xh100",
    "2026-11-26-a14b-2xh200",
    "2026-11-27-a14b-shared-tokens-4xh200",
)
_DIVIDED = (*_BY_NCCL, "2026-11-28-a14b-symmetric-memory-2xh200")


def config(**denoiser: Any) -> Config:
    return Config.model_validate({"model": {"sharded": "/x"}, "denoiser": {"compile": True, **denoiser}})


def sizes_of(line: Line) -> list[Size]:
    """Sizes of the numbers in a row's cells: of its own column, or of those whose times stand before."""
    if size := line.cells.get("size"):
        return [SIZES[size]]
    heads = [match[1] for head in line.cells if (match := re.match(r"(\d+x\d+) s\b", head)) and line.cells[head]]
    return [SIZES[size] for size in heads] or [SIZES["832x480"]]


def mesh_of(line: Line) -> Mesh:
    what = f"{line.cells.get('what', '')} {line.cells.get('mesh', '')}"
    if found := re.search(r"(tensor|sequence|guidance) (\d)", what):
        return Mesh(**{found[1]: int(found[2])})
    if "tensor parallelism over two" in line.title.lower() or "without collectives" in line.title:
        return Mesh(tensor=2)
    if "126 tokens" in what:  # "the same" as the row above
        return Mesh(guidance=2)
    return Mesh(tensor=int(line.cells.get("tensor", "1")))


def compiled(line: Line) -> bool:
    what = line.cells.get("what", "")
    eager = what in ("eager", "ours, cudnn", "ours, cudnn, again") or "not compiled" in what
    return not eager and line.cells.get("case") != "disk:24"


def layers_of(line: Line) -> int:
    return 8 if line.title == "Two ranks" else int(line.cells.get("layers", "40"))


def predicted(line: Line, size: Size) -> ProcessMemory:
    """Memory of the rank of a row, by the model."""
    model = ModelShape((ExpertConfig(num_layers=layers_of(line)),) * 2, MODEL.text, MODEL.vae, "")
    case, _, cap = line.cells.get("case", "pass").partition(":")
    offload = case if case in ("cpu", "disk") else "none"
    experts = "swap" if offload != "none" or case == "swap" else "together"
    one_text = case == "pass"  # a pass of one half of guidance
    mesh = mesh_of(line)
    mesh = Mesh(2, mesh.sequence, mesh.tensor) if one_text else mesh
    limit = 0.9 * float(cap) * 1e9 if cap else None
    options = config(experts=experts, offload=offload, compile=compiled(line), parked_memory_mib=512)
    limits = options.limits.model_copy(update={"pixels": size.width * size.height, "num_frames": 81})
    options = options.model_copy(update={"limits": limits})
    held = (0,) if case in ("split", "pass") else (0, 1)
    return RankMemory(options, model, mesh, held).need(size, limit)


def more_then(line: Line) -> float:
    """Bytes of weights that a rank has now and had not when the row was measured."""
    tensor = mesh_of(line).tensor
    if tensor == 1 or not (line.file in _DIVIDED or line.cells.get("host") == "E"):
        return 0.0
    experts = 1 if line.cells.get("case", "pass") in ("split", "pass", "swap") else 2
    whole = 2 * (5120**2 + 5120) * 2 + 5120 * 2  # queries, outputs and the queries' norm of cross-attention
    return experts * layers_of(line) * whole * (1 - 1 / tensor)


def peaks(line: Line) -> list[tuple[Size, float, float]]:
    """Return size, predicted and measured peak of a row of ranks, in GB."""
    measured = line.numbers("peak GB" if "peak GB" in line.cells else "now, peak GB")
    found = []
    for size, peak in zip(sizes_of(line), measured, strict=True):
        need = predicted(line, size)
        # The benchmark of a pass adds what ranks exchange through to what the allocator counts.
        exchanged = "case" not in line.cells and line.file not in _BY_NCCL
        ours = need.total - need.bytes_of(PARKED, SLACK, *([] if exchanged else [SYMMETRIC])) - more_then(line)
        found.append((size, ours / 1e9, peak))
    return found


def reserved(line: Line) -> tuple[float, float]:
    """Return what the allocator holds by the model and as it was measured, in GB."""
    need = predicted(line, sizes_of(line)[0])
    ours = need.total - need.bytes_of(PARKED, SYMMETRIC) - more_then(line)
    return ours / 1e9, line.numbers("reserved GB")[0]


def decode(line: Line) -> tuple[float, float]:
    """Return the peak of a decode by the model and as it was measured, in MiB."""
    dtype = line.cells.get("dtype") or ("bfloat16" if "bfloat16" in line.title else "float32")
    size = SIZES[line.cells.get("size", "1280x720")]
    bound = float(line.cells["tile MiB"]) * 2**20 or float("inf")
    itemsize = 4 if dtype == "float32" else 2
    tile = tile_bytes(MODEL, size, itemsize, int(line.cells.get("devices", "1")), bound)
    return WORK_OF_TILE[itemsize] * tile / 2**20, line.numbers("MiB a device")[0]


_NOT_OURS = "diffusers"
ROWS = [line for line in lines() if _NOT_OURS not in line.key.split("|", 2)[2]]
OF_RANKS = [line for line in ROWS if "MiB a device" not in line.cells]
OF_DECODES = [line for line in ROWS if "MiB a device" in line.cells]
