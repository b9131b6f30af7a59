"""One forward pass of an A14B expert through the code that serves: seconds, TFLOP/s, share of the ceiling, memory.

    python -m benchmarks.model.a14b_forward [--sizes 832x480 1280x720] [--mesh 1x1x1] [--attention auto flash4 cudnn]
                                      [--compile also] [--diffusers] [--profile DIR] [--keep DIR]
                                      [--float32] [--text-tokens 126 512]

Weights are random, of the exact configuration (`--layers` for fewer). The ceiling is a large bfloat16 matrix product,
measured in the same run. `--mesh` is guidance x sequence x tensor: with guidance 2 the pass is one guided step. With
--diffusers its own model runs with the same weights, eagerly, and the relative error of ours against it is printed
beside that between two of its own attention kernels. Passes are timed by events, after one that warms up. --keep
writes all predictions into a folder, and prints how those that are there, of whatever runs, differ from diffusers' and
from one in float32, which --float32 makes; a guided step there is one whose guidance is 1, so its prediction is that of
a pass. --text-tokens is how many tokens of the text come before its padding, which is computed all the same.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from benchmarks.machine import describe, timed
from benchmarks.model import dummy_checkpoint as dummy_checkpoint
from benchmarks.model import trace
from benchmarks.model.parity import Seen, relative_error, run_ranks
from serve_app.wan.cost import step_flops
from serve_app.wan.parallel import symmetric_memory
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import ProcessGroups, init_process_groups
from serve_app.wan.sampling.sampler import predict
from serve_app.wan.transformer.load import load_expert
from serve_app.wan.weights.checkpoint import MAX_TOKENS, Checkpoint

_SIDE = 8192
_THEIRS, _EXACT = "diffusers, eager", "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["832x480", "1280x720"])
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--mesh", default="1x1x1")
    parser.add_argument("--attention", nargs="+", default=["auto"])
    parser.add_argument("--compile", choices=("no", "also", "only"), default="no", help="blocks compiled")
    parser.add_argument("--diffusers", action="store_true")
    parser.add_argument(
        "--profile", type=Path, help="folder for the kernels of one pass at the first size, a table and a trace"
    )
    parser.add_argument("--keep", type=Path, help="folder of predictions, to compare those of several runs")
    parser.add_argument("--float32", action="store_true", help="also a pass in float32, at the last size, for --keep")
    parser.add_argument("--text-tokens", type=int, nargs="+", default=[MAX_TOKENS])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--narrow", action="store_true", help="a width of 96, to see it run")
    options = parser.parse_args()
    for count in options.text_tokens:
        if not 0 <= count <= MAX_TOKENS:
            parser.error(f"--text-tokens has value {count}, expected 0 to {MAX_TOKENS}")
    if options.float32 and options.keep is None:
        parser.error(
            "--float32 is given without --keep, expected with a folder, where its pass is compared with others"
        )
    narrow = {"num_attention_heads": 4, "attention_head_dim": 24, "ffn_dim": 192, "text_dim": 64}
    with tempfile.TemporaryDirectory() as name:
        folder = dummy_checkpoint.write(
            Path(name) / "model", {"num_layers": options.layers, **(narrow if options.narrow else {})}
        )
        mesh = Mesh(*map(int, options.mesh.split("x")))
        sees: Seen = "own first" if torch.cuda.is_available() else "all"  # as under Ray
        run_ranks(_measure, mesh, folder, options, Path(name) / "rows.json", timeout_s=3600, sees=sees)
        rows = json.loads((Path(name) / "rows.json").read_text())
    print(f"{describe()}; {rows['device']}; {options.layers} layers, bfloat16, {options.frames} frames, {mesh}")
    print(f"\nMatrix product {_SIDE}^3 in bfloat16: {rows['ceiling'] / 1e12:.0f} TFLOP/s\n")
    print("| size | what | seconds | lowest | highest | TFLOP/s per device | of the ceiling | peak GB | warm-up s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows["passes"]:
        rate = row["flops"] / mesh.ranks / row["seconds"]
        seconds = " | ".join(f"{row[key]:.3f}" for key in ("seconds", "lowest", "highest"))
        print(
            f"| {row['size']} | {row['what']} | {seconds} | {rate / 1e12:.1f} | {100 * rate / rows['ceiling']:.0f} % | "
            f"{row['peak'] / 1e9:.1f} | {row['warm_up']:.1f} |"
        )
    for line in rows["errors"]:
        print(f"\n{line}")
    if options.keep:
        _differences(options.keep)
    if rows["shares"]:
        kinds = [key for key in rows["shares"][0] if key not in ("size", "what")]
        print(f"\n| share of a pass | what | {' | '.join(kinds)} |\n|---|---|{'---|' * len(kinds)}")
    for row in rows["shares"]:
        print(f"| {row['size']} | {row['what']} | {' | '.join(f'{100 * row[kind]:.1f} %' for kind in kinds)} |")


def _measure(rank: int, mesh: Mesh, port: int, folder: Path, options: argparse.Namespace, output: Path) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    world = init_process_groups(rank, mesh, "127.0.0.1", port, device, timeout_s=600)
    peers = symmetric_memory.of(world.tensor.group.group_name) if world.tensor.group else None
    checkpoint = Checkpoint(folder, random=True)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "ceiling": _ceiling(device, options.repeats),
        "passes": [],
        "shares": [],
        "errors": [],
    }
    for attention in options.attention:
        for compiled in {"no": (False,), "also": (False, True), "only": (True,)}[options.compile]:
            torch._dynamo.reset()
            gc.collect()  # the expert before this one
            if cuda:
                torch.cuda.empty_cache()
            expert = load_expert(
                checkpoint, "transformer", world, torch.bfloat16, device, attention=attention, compiled=compiled
            )
            what = named = f"ours, attention {attention}{', compiled' if compiled else ''}"
            for size, text_tokens in itertools.product(options.sizes, options.text_tokens):
                run, flops = _pass(expert, size, options.frames, text_tokens, mesh, device)
                if len(options.text_tokens) > 1:
                    what = f"{named}, {text_tokens} tokens of text"
                prediction = _note(found, size, what, flops, run, device, options.repeats)
                # Which torch's allocator does not count.
                found["passes"][-1]["peak"] += peers.held_bytes if peers else 0
                _keep(options.keep, rank, mesh, size, what, prediction)
                if options.profile and (size, text_tokens) == (options.sizes[0], options.text_tokens[0]):
                    file = options.profile / f"{attention}{'-compiled' if compiled else ''}-{rank}.txt"
                    shares = _profile(run, file)
                    found["shares"].append({"size": size, "what": what, **shares})
                expert.text_cache.clear()  # type: ignore[operator, union-attr]
                del run
            if options.diffusers and mesh.ranks == 1 and not compiled and attention == options.attention[0]:
                _compare(found, expert, options, device)
            del expert
    if options.float32 and mesh.ranks == 1:
        _float32(checkpoint, world, options, device)
    if rank == 0:
        output.write_text(json.dumps(found))
    world.close()


def _pass(
    expert: Any, size: str, frames: int, text_tokens: int, mesh: Mesh, device: torch.device
) -> tuple[Callable[[], torch.Tensor], float]:
    """A pass over one sample, guided where guidance has ranks of its own, and its floating-point operations."""
    latents, timesteps, texts = _inputs(expert, size, frames, text_tokens, device)
    negatives = [text.roll(1, 2) for text in texts] if mesh.guidance == 2 else None
    flops = step_flops(dict(expert.config), _tokens(latents), negatives is not None)
    return lambda: predict(expert, latents, timesteps, texts, negatives, [1.0], 0), flops


def _compare(found: dict[str, Any], expert: Any, options: argparse.Namespace, device: torch.device) -> None:
    """diffusers' own model with the same weights."""
    with torch.device("meta"):
        theirs = WanTransformer3DModel.from_config(dict(expert.config)).eval().requires_grad_(False)
    state = {name: value for name, value in expert.state_dict().items() if not name.startswith("rope.")}
    theirs.load_state_dict(state, strict=False, assign=True)
    theirs.rope = expert.rope.rope
    for size in options.sizes:
        latents, timesteps, texts = _inputs(expert, size, options.frames, options.text_tokens[0], device)

        def run() -> torch.Tensor:
            output: torch.Tensor = theirs(latents, timesteps, torch.cat(texts), return_dict=False)[0]  # noqa: B023
            return output

        flops = step_flops(dict(expert.config), _tokens(latents), False)
        prediction = _note(found, size, _THEIRS, flops, run, device, options.repeats)
        _keep(options.keep, 0, Mesh(), size, _THEIRS, prediction)
        ours = predict(expert, latents, timesteps, texts, None, [1.0], 0)
        plain = run()
        line = f"{size}: relative error of ours against diffusers {relative_error(ours.cpu(), plain.cpu()):.1e}"
        if device.type == "cuda":
            # Without one set, what another model set last is used.
            theirs.set_attention_backend("_native_flash")
            line += f", of its FlashAttention-2 against its default {relative_error(run().cpu(), plain.cpu()):.1e}"
            theirs.set_attention_backend("native")
        found["errors"].append(line)


def _float32(checkpoint: Checkpoint, world: ProcessGroups, options: argparse.Namespace, device: torch.device) -> None:
    """What all others round. Its inputs and weights are theirs, rounded to bfloat16."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    expert = load_expert(checkpoint, "transformer", world, torch.float32, device)
    for name, parameter in expert.named_parameters():
        if not set(name.split(".")) & set(expert._keep_in_fp32_modules):  # type: ignore[arg-type]
            parameter.data.copy_(parameter.data.bfloat16())
    size = options.sizes[-1]
    latents, timesteps, texts = _inputs(expert, size, options.frames, options.text_tokens[0], device)
    with torch.no_grad():  # once, not timed: it takes ten times as long as the others
        prediction = predict(expert, latents.float(), timesteps, [text.float() for text in texts], None, [1.0], 0)
    _keep(options.keep, 0, Mesh(), size, _EXACT, prediction)


def _inputs(
    expert: Any, size: str, frames: int, text_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    width, height = map(int, size.split("x"))
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    latents = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    text = torch.randn(
        1, MAX_TOKENS, int(expert.config.text_dim), generator=generator, device=device, dtype=torch.bfloat16
    )
    text[:, text_tokens:] = 0
    return latents, torch.tensor([900], device=device), [text]


def _tokens(latents: torch.Tensor) -> int:
    return latents.shape[2] * (latents.shape[3] // 2) * (latents.shape[4] // 2)


@torch.no_grad()
def _note(
    found: dict[str, Any],
    size: str,
    what: str,
    flops: float,
    run: Callable[[], torch.Tensor],
    device: torch.device,
    repeats: int,
) -> torch.Tensor:
    """Time passes, after one that warms up, whose result is returned."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    prediction = run()
    _wait(device)
    warm_up = time.perf_counter() - started
    seconds = [timed(run, device) for _ in range(repeats)]
    found["passes"].append(
        {
            "size": size,
            "what": what,
            "seconds": statistics.median(seconds),
            "lowest": min(seconds),
            "highest": max(seconds),
            "flops": flops,
            "peak": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
            "warm_up": warm_up,
        }
    )
    print(json.dumps(found["passes"][-1]), flush=True)
    return prediction


def _keep(folder: Path | None, rank: int, mesh: Mesh, size: str, what: str, prediction: torch.Tensor) -> None:
    if folder is not None and rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(prediction.cpu(), folder / f"{size} {what}{'' if mesh == Mesh() else f', {mesh}'}.pt")


def _differences(folder: Path) -> None:
    """Relative errors of all predictions of a folder against diffusers' and the float32 one of the same size."""
    print("\n| size | what | relative error against diffusers | against float32 |\n|---|---|---|---|")
    for file in sorted(folder.glob("*.pt")):
        size, what = file.stem.split(" ", 1)
        errors = []
        for reference in (_THEIRS, _EXACT):
            other = folder / f"{size} {reference}.pt"
            known = what not in (reference, _EXACT) and other.is_file()
            errors.append(f"{relative_error(torch.load(file), torch.load(other)):.1e}" if known else "")
        print(f"| {size} | {what} | {' | '.join(errors)} |")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ceiling(device: torch.device, repeats: int) -> float:
    side = _SIDE if device.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    left @ right
    _wait(device)
    return 2 * side**3 / statistics.median(timed(lambda: left @ right, device) for _ in range(max(5, repeats)))


@torch.no_grad()
def _profile(run: Callable[[], Any], file: Path) -> dict[str, float]:
    """Write the kernels of one pass, as a table and as a trace for Chrome; returns what share of it each kind takes."""
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        _wait(torch.device("cuda" if cuda else "cpu"))
    key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(profile.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90))
    written = file.with_suffix(".json.gz")
    profile.export_chrome_trace(str(written))
    kernels = trace.read(written)
    return {kind: found / (trace.span_ms(kernels) or 1) for kind, found in trace.milliseconds(kernels).items()}


if __name__ == "__main__":
    main()
