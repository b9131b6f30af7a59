"""`wan-serve prepare`: write a sharded checkpoint, of which each rank reads its own file."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

console = Console(highlight=False)


class Dtype(StrEnum):
    """A value of `model.dtype`, long or short."""

    bf16 = "bf16"
    bfloat16 = "bfloat16"
    fp32 = "fp32"
    float32 = "float32"


class ExpertName(StrEnum):
    """The folder of an expert: `transformer` is the high-noise one, `transformer_2` the low-noise one."""

    transformer = "transformer"
    transformer_2 = "transformer_2"


_LONG_NAMES = {"bf16": "bfloat16", "fp32": "float32"}


def prepare(
    model: Annotated[str, typer.Argument(help="A folder in the diffusers layout, or `tiny`, as `model.path`.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards. Complete files in it are kept.")],
    tensor: Annotated[
        int, typer.Option(min=1, help="Tensor-parallel ranks of a group, as `denoiser.parallel.tensor`.")
    ],
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights, as `model.dtype`.")] = Dtype.bfloat16,
    expert: Annotated[list[ExpertName] | None, typer.Option(help="Write only this expert; may be repeated.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="First compare the hashes of the files that are there.")
    ] = False,
) -> None:
    """Write each rank's shard of the experts as a file of its own. Can be interrupted and called again."""
    from serve_app.config import ModelConfig
    from serve_app.wan.weights.checkpoint import Checkpoint

    started = time.monotonic()
    long = _LONG_NAMES.get(dtype.value, dtype.value)
    checkpoint = Checkpoint(ModelConfig(path=model).folder)
    columns = (TextColumn("{task.description:>44}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("reading headers", total=None)

        def watch(what: str, count: int, total: int) -> None:
            bar.update(task, description=what, advance=count, total=total)

        try:
            from serve_app.wan.weights.writer import prepare  # only now: it needs torch, which takes seconds

            done = prepare(checkpoint, out, tensor, long, [one.value for one in expert or []], verify, watch)
        except KeyboardInterrupt:
            console.print("interrupted; the same command goes on after the last complete file", soft_wrap=True)
            raise
        bar.update(task, description="done", total=1, completed=1)
    seconds = time.monotonic() - started
    console.print(
        f"{out}: {done.written} files written, {done.bytes / 1e9:.3f} GB, {done.kept} were there, {seconds:.1f} s",
        style="bold",
        soft_wrap=True,
    )
    path = model if model == "tiny" else str(checkpoint.folder.absolute())
    options = {
        "model": {"path": path, "sharded": str(out.absolute()), "dtype": long},
        "denoiser": {"parallel": {"tensor": tensor}},
    }
    console.print(yaml.safe_dump(options, sort_keys=False, allow_unicode=True).rstrip(), soft_wrap=True, markup=False)
