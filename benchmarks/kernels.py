"""The kernels of an A14B block, each alone: milliseconds, rates, and errors against the same in float32.

    python -m benchmarks.kernels [--sizes 832x480 1280x720] [--attention flash4 cudnn] [--tiles 128x128 128x176]

On one CUDA device, in bfloat16, one rank's whole layer over 81 frames: attention by each backend, and FlashAttention-4
by sizes of its tiles; the feed-forward's first layer with GELU; the norm and rotation of queries. `compiled` is what
torch.compile makes of diffusers' formula. Errors are relative ones of the norms, on the first rows.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.machine import describe, timed, tokens_of
from serve_app.errors import one_line
from serve_app.wan import kernels
from serve_app.wan.attention import _rotate
from serve_app.wan.fused import LinearGelu, norm_rotate

_HEADS, _HEAD, _INSIDE = 40, 128, 13824
_SOME = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["832x480", "1280x720"])
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--attention", nargs="*", default=["flash4", "cudnn", "flash"])
    parser.add_argument("--tiles", nargs="*", default=["128x128", "128x144", "128x160", "128x176", "192x128"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    print(f"\n{describe()}; {torch.cuda.get_device_name(device)}\n")
    print("| size | what | by | ms | TFLOP/s or GB/s | relative error |\n|---|---|---|---|---|---|", flush=True)
    torch.manual_seed(0)
    with torch.no_grad(), device:
        for size in options.sizes:
            tokens = tokens_of(size, options.frames)
            for rows in (_attention, _gelu, _norm):
                rows(size, tokens, options)


def _attention(size: str, tokens: int, options: argparse.Namespace) -> None:
    query, key, value = (torch.randn(1, tokens, _HEADS, _HEAD, dtype=torch.bfloat16) for _ in range(3))
    expected = torch.cat(
        [
            _exact(query[:, :_SOME, heads], key[:, :, heads], value[:, :, heads])
            for heads in torch.arange(_HEADS).split(8)
        ],
        dim=2,
    )
    flops = 4.0 * tokens**2 * _HEADS * _HEAD
    ways: dict[str, Callable[[], Any]] = {name: functools.partial(_kernel, name) for name in options.attention}
    for tiles in options.tiles:
        for register in (True, False):
            ways[f"flash4, tiles {tiles}{'' if register else ', P in shared memory'}"] = functools.partial(
                _tiled, tuple(map(int, tiles.split("x"))), register
            )
    for by, make in ways.items():
        try:
            kernel = make()
            _row(size, "attention", by, lambda: kernel(query, key, value), flops / 1e12, expected, options)  # noqa: B023
        except Exception as error:  # whatever a missing package or a tile that is too large raises
            print(f"| {size} | attention | {by} | {one_line(error)[:80]} | | |", flush=True)


def _exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (one.float().transpose(1, 2) for one in (query, key, value))
    return ((query @ key.transpose(2, 3) / _HEAD**0.5).softmax(-1) @ value).transpose(1, 2)


def _kernel(name: kernels.KernelName) -> Callable[..., torch.Tensor]:
    kernel, _ = kernels.pick_kernel(name, torch.device("cuda", 0), torch.bfloat16, _HEAD)
    return lambda query, key, value: kernel(query, key, value, None)


def _tiled(tiles: tuple[int, int], register: bool) -> Callable[..., Any]:
    from flash_attn.cute.interface import _flash_attn_fwd  # type: ignore[import-not-found,unused-ignore]

    return lambda query, key, value: _flash_attn_fwd(
        query, key, value, tile_mn=tiles, mma_pv_is_rs=register, intra_wg_overlap=True
    )[0]


def _gelu(size: str, tokens: int, options: argparse.Namespace) -> None:
    hidden = torch.randn(1, tokens, _HEADS * _HEAD, dtype=torch.bfloat16)
    proj = torch.nn.Linear(_HEADS * _HEAD, _INSIDE, dtype=torch.bfloat16)
    layer = LinearGelu(proj)
    expected = F.gelu(
        F.linear(hidden[:, :_SOME].double(), proj.weight.double(), proj.bias.double()), approximate="tanh"
    )
    flops = 2.0 * tokens * _HEADS * _HEAD * _INSIDE / 1e12
    plain = torch.compile(lambda: F.gelu(proj(hidden), approximate="tanh"))
    _row(size, "feed-forward's first layer", "product alone", lambda: proj(hidden), flops, None, options)
    _row(size, "feed-forward's first layer", "compiled", plain, flops, expected, options)
    _row(size, "feed-forward's first layer", "ours", lambda: layer(hidden), flops, expected, options)


def _norm(size: str, tokens: int, options: argparse.Namespace) -> None:
    hidden = torch.randn(1, tokens, _HEADS * _HEAD, dtype=torch.bfloat16)
    norm = torch.nn.RMSNorm(_HEADS * _HEAD, eps=1e-6, dtype=torch.bfloat16)
    norm.weight.uniform_(0.5, 1.5)
    angle = torch.rand(1, tokens, 1, _HEAD // 2).repeat_interleave(2, -1)
    cos, sin = angle.cos(), angle.sin()

    def formula(norm: torch.nn.RMSNorm, hidden: torch.Tensor, *angles: torch.Tensor) -> torch.Tensor:
        return _rotate(norm(hidden).unflatten(2, (_HEADS, _HEAD)), *angles)

    exact = torch.nn.RMSNorm(_HEADS * _HEAD, eps=1e-6, dtype=torch.float64)
    exact.weight.copy_(norm.weight)
    expected = formula(exact, hidden[:, :_SOME].double(), cos[:, :_SOME].double(), sin[:, :_SOME].double())
    gigabytes = 2.0 * hidden.nbytes / 1e9
    plain = torch.compile(formula)
    _row(size, "norm and rotation", "compiled", lambda: plain(norm, hidden, cos, sin), gigabytes, expected, options)
    _row(
        size,
        "norm and rotation",
        "ours",
        lambda: norm_rotate(hidden, norm, None, cos, sin),
        gigabytes,
        expected,
        options,
    )


def _row(
    size: str,
    what: str,
    by: str,
    run: Callable[[], torch.Tensor],
    work: float,
    expected: torch.Tensor | None,
    options: argparse.Namespace,
) -> None:
    some = run()[:, :_SOME].double()
    error = "" if expected is None else f"{float((some - expected).norm() / expected.norm()):.1e}"
    times = [timed(run, torch.device("cuda")) for _ in range(options.repeats + 1)]
    milliseconds = 1e3 * statistics.median(times[1:])
    print(f"| {size} | {what} | {by} | {milliseconds:.3f} | {work / milliseconds * 1e3:.0f} | {error} |", flush=True)


if __name__ == "__main__":
    main()
