"""`wan-serve plan`: GPUs in, a configuration out, with its memory and its seconds, before any weights are there."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from serve_app.cli.table import print_table
from serve_app.errors import CheckpointError, ConfigError
from serve_app.launch import shipped
from serve_app.whole_file import check_target

_SHOWN = 12
GpuOption = Annotated[str, typer.Option("--gpu", help="Kind of the GPUs, such as `h100-80`; `here` is this machine's.")]


def plan(
    gpu: GpuOption,
    gpus: Annotated[int, typer.Option(min=1, max=64, help="GPUs of each host.")] = 1,
    hosts: Annotated[int, typer.Option(min=1, max=1000, help="Hosts, each with as many GPUs.")] = 1,
    size: Annotated[str, typer.Option(help="Largest video, WIDTHxHEIGHT in pixels.")] = "1280x720",
    frames: Annotated[int, typer.Option(min=1, help="Its frames.")] = 81,
    config: Annotated[
        Path | None, typer.Option(help="A configuration whose other options the plan keeps, and which is looked at.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of the model, whose headers are read.")] = None,
    aim: Annotated[str, typer.Option("--for", help="`latency` or `throughput`.")] = "latency",
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write the configuration to.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Compare the memory with the estimate that circulates for one A100.")
    ] = False,
) -> None:
    """Plan a deployment: what fits on these GPUs, how fast it is, and the configuration to serve."""
    from serve_app.planning import plan_file
    from serve_app.planning.cards import card
    from serve_app.planning.layout import Wish
    from serve_app.planning.plan import Plan

    if aim not in ("latency", "throughput"):
        raise ConfigError(f"--for has value {aim!r}, expected 'latency' or 'throughput'")
    if output is not None:
        check_target(output, "--output")
    kept = {} if config is None else _kept(shipped.config_file(config))
    if model is not None:
        kept["model"] = {**kept.get("model", {}), "path": str(model.absolute())}
    shape = _shape(kept.get("model", {}))
    wish = Wish(card(gpu), gpus, hosts, _size(size, frames), aim, shape, kept)  # type: ignore[arg-type]
    if explain:
        _explain(wish.model, wish.size)
        return
    if config is not None:
        _look_at(shipped.config_file(config), wish.model, wish.card)
    made = Plan.of(wish)
    text = plan_file.write(made, shlex.join(["wan-serve", *(one for one in sys.argv[1:] if one != "--json")]))
    if output is not None:
        output.write_text(text)
    if as_json:
        print(json.dumps({**made.as_json(), "yaml": text}, indent=2))
        return
    _show(made)
    print(f"\n{output}: written; `wan-serve up {output}`" if output is not None else f"\n{text}", end="\n")


def _kept(path: Path) -> dict[str, Any]:
    """Return the options of a file that a plan keeps: all but those of the stages."""
    from serve_app.config import load_file

    content, _ = load_file(path)
    args: dict[str, Any] = content["applications"][0]["args"]
    return {name: value for name, value in args.items() if name not in ("encoder", "denoiser", "decoder")}


def _shape(model: dict[str, Any]) -> Any:
    """Return the shape of the model of a folder, or the published one where there is no folder."""
    from serve_app.config import ModelConfig
    from serve_app.planning.model_shape import ModelShape
    from serve_app.wan.weights.checkpoint import Checkpoint

    if "path" not in model:
        return ModelShape.published()
    folder = ModelConfig(path=model["path"]).folder
    if not folder.exists():
        return ModelShape.published()
    try:
        return ModelShape.of(Checkpoint(folder.absolute()))
    except CheckpointError as error:
        raise ConfigError(f"model.path has value {model['path']!r}: {error}") from None


def _size(size: str, frames: int) -> Any:
    from serve_app.planning.memory import Size

    width, _, height = size.partition("x")
    across, down = (int(one) if one.isdigit() else 0 for one in (width, height))
    if any(side < 16 or side % 16 for side in (across, down)):
        raise ConfigError(f"--size has value {size!r}, expected WIDTHxHEIGHT, multiples of 16, such as 1280x720")
    if frames % 4 != 1:
        raise ConfigError(f"--frames has value {frames}, expected a multiple of 4 and 1 more, such as 81")
    return Size(across, down, frames)


def _look_at(path: Path, model: Any, card: Any) -> None:
    """Say whether the configuration of a file fits on these GPUs as it is."""
    from serve_app.config import load_file
    from serve_app.planning.shortfall import shortfalls

    _, options = load_file(path)
    lines = shortfalls(options, model, card)
    for line in lines:
        print(f"{path}: {line}")
    if not lines:
        print(f"{path}: fits on this GPU as it is")
    print()


def _show(made: Any) -> None:
    from serve_app.planning.parts import GB

    wish, pick = made.wish, made.pick
    print(f"{wish.hosts} x {wish.gpus} x {wish.card.label} ({wish.card.gb:.1f} GB), videos of {wish.size}")
    print(f"weights by {wish.model.source}\n")
    rows = []
    for need in (pick.rank, pick.encoder, pick.decoder):
        for part in (*need.parts, *need.beside):
            rows.append((need.process, part.name, f"{part.bytes / GB:.2f}", part.option))
        for part in need.host:
            rows.append((need.process, f"{part.name} (host memory)", f"{part.bytes / GB:.2f}", part.option))
    print_table(("process", "memory", "GB", "changed by"), rows)
    print()
    print_table(("fullest GPU", "GB"), [(part.name, f"{part.bytes / GB:.2f}") for part in made.gpu_parts()])
    if pick.host_bytes:
        print(f"\n{pick.host_bytes / GB:.0f} GB of host memory for each host, beside what loading takes")
    print()
    headings = ("", "mesh", "experts", "groups", "text encoder", "s a video", "known", "videos/h", "videos/h/GPU")
    shown = [
        (
            "*" if number == 0 else "",
            str(one.mesh),
            one.experts,
            str(one.groups),
            "CPU" if one.encoder.host else "GPU",
            f"{one.seconds.total:.1f}",
            one.seconds.basis,
            f"{one.per_hour:.1f}",
            f"{one.per_gpu:.2f}",
        )
        for number, one in enumerate(made.layouts[:_SHOWN])
    ]
    print_table(headings, shown)
    if len(made.layouts) > _SHOWN:
        print(f"and {len(made.layouts) - _SHOWN} more (--json has all)")
    if made.rejected:
        print("\ndoes not fit:")
        for one in made.rejected[:_SHOWN]:
            print(f"  {one}")
        print("  experts `swap` and `split`, `offload: cpu`, more ranks and a smaller --size make it less")
    print()
    for line in (*made.reasons(), *made.placement()):
        print(line)


def _explain(model: Any, size: Any) -> None:
    from serve_app.planning.circulating import compare
    from serve_app.planning.parts import GB

    print(f"Memory of one GPU that holds everything, in GB, for videos of {size}\n")
    lines = [(one.what, one.theirs or "-", f"{one.ours / GB:.1f}", one.why) for one in compare(model, size)]
    print_table(("part", "circulating", "ours", "why"), lines)
