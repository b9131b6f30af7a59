"""The kernels of an A14B block, each alone: milliseconds, rates, and errors against the same in float32.

    python -m benchmarks.model.kernels [--sizes 832x480 1280x720] [--only attention gelu norms]
                                 [--attention flash4 cudnn] [--tiles 128x128 128x176]

On one CUDA device, in bfloat16, over 81 frames: attention by each backend, and FlashAttention-4 by sizes of its tiles;
the feed-forward's first layer with GELU; norms, those of queries with all heads and with half of them, as two ranks
have them. `compiled` is what torch.compile makes of diffusers' formula. Errors are relative ones of the norms, on the
first rows; of norms GB/s counts what has to be read and written of all tokens.
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
from serve_app.wan.kernels import backends as kernels
from serve_app.wan.kernels.fused import LinearGelu, norm_rotate, square_sums
from serve_app.wan.transformer.attention import ShardedNorm, _rotate

_HEADS, _HEAD, _INSIDE = 40, 128, 13824
_SOME = 512
_HEAD_START = 4_000_000
"""Clock cycles, about 2 ms."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["832x480", "1280x720"])
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--only", nargs="+", choices=_KINDS, default=list(_KINDS))
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
            for kind in options.only:
                for rows in _KINDS[kind]:
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
            height, width = map(int, tiles.split("x"))
            ways[f"flash4, tiles {tiles}{'' if register else ', P in shared memory'}"] = functools.partial(
                _tiled, (height, width), register
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
    for heads in (_HEADS, _HEADS // 2):
        width, whole = heads * _HEAD, heads == _HEADS
        hidden = torch.randn(1, tokens, width, dtype=torch.bfloat16)
        norm = ShardedNorm(_HEADS * _HEAD, _HEADS // heads, 1e-6, torch.bfloat16).cuda()
        norm.weight.uniform_(0.5, 1.5)
        angle = torch.rand(1, tokens, 1, _HEAD // 2).repeat_interleave(2, -1)
        angles = angle.cos(), angle.sin()
        what = f"norm and rotation of {heads} heads{'' if whole else ', sums given'}"
        squares = norm.squares(hidden)

        def compiled(
            hidden: torch.Tensor, squares: torch.Tensor | None, *angles: torch.Tensor, norm: Any = norm
        ) -> torch.Tensor:
            squares = norm.squares(hidden) if squares is None else squares
            return _rotate(norm(hidden, squares).unflatten(2, (-1, _HEAD)), *angles)

        some = [one[:, :_SOME].double() for one in (hidden, squares, *angles)]
        scale = torch.rsqrt(some[1] / norm.features + norm.eps)
        expected = _rotate((some[0] * scale * norm.weight.double()).unflatten(2, (heads, _HEAD)), *some[2:])
        given = None if whole else squares
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "compiled": functools.partial(torch.compile(compiled, dynamic=False), hidden, given, *angles),
            "ours": functools.partial(norm_rotate, hidden, norm, given, *angles),
        }
        for by, run in ways.items():
            _row(size, what, by, run, 2.0 * hidden.nbytes / 1e9, expected, options)
    exact = hidden[:, :_SOME].double().square().sum(-1, keepdim=True)
    plain = torch.compile(norm.squares, dynamic=False)
    what, gigabytes = f"sum of squares of {heads} heads", hidden.nbytes / 1e9
    _row(size, what, "compiled", lambda: plain(hidden), gigabytes, exact, options)
    _row(size, what, "ours", lambda: square_sums([hidden]), gigabytes, exact, options)


def _modulation(size: str, tokens: int, options: argparse.Namespace) -> None:
    hidden, added = torch.randn(2, 1, tokens, _HEADS * _HEAD, dtype=torch.bfloat16)
    modulation = torch.randn(1, 6, _HEADS * _HEAD)

    def formula(hidden: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(hidden, (_HEADS * _HEAD,), eps=1e-6)
        return normed * (1 + modulation[:, [1]]) + modulation[:, [0]]

    plain = torch.compile(lambda: formula(hidden.float(), modulation).bfloat16(), dynamic=False)
    expected = formula(hidden[:, :_SOME].double(), modulation.double())
    what, gigabytes = "norm, scale and shift", 2.0 * hidden.nbytes / 1e9
    _row(size, what, "compiled", plain, gigabytes, expected, options)
    ours = torch.ops.wan_serve.norm_modulate
    _row(size, what, "ours", lambda: ours(hidden, modulation, 0, 1e-6), gigabytes, expected, options)

    def summed() -> tuple[torch.Tensor, torch.Tensor]:
        total = hidden + added
        return total, formula(total.float(), modulation).bfloat16()

    both = torch.compile(summed, dynamic=False)
    expected = formula((hidden + added)[:, :_SOME].double(), modulation.double())
    what, gigabytes = "sum, norm, scale and shift", 4.0 * hidden.nbytes / 1e9
    _row(size, what, "compiled", lambda: both()[1], gigabytes, expected, options)
    ours_too = torch.ops.wan_serve.add_norm_modulate
    _row(size, what, "ours", lambda: ours_too(hidden, added, modulation, 0, 1e-6)[1], gigabytes, expected, options)


_KINDS: dict[str, tuple[Callable[[str, int, argparse.Namespace], None], ...]] = {
    "attention": (_attention,),
    "gelu": (_gelu,),
    "norms": (_norm, _modulation),
}


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
    times = []
    for _ in range(options.repeats + 1):
        torch.cuda._sleep(_HEAD_START)  # or it waits for who gives it work, where that is soon done
        times.append(timed(run, torch.device("cuda")))
    milliseconds = 1e3 * statistics.median(times[1:])
    print(f"| {size} | {what} | {by} | {milliseconds:.3f} | {work / milliseconds * 1e3:.0f} | {error} |", flush=True)


if __name__ == "__main__":
    main()
