from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from serve_app.errors import ConfigError
from serve_app.wan.kernels import backends as kernels
from serve_app.wan.kernels.backends import pick_kernel

CPU = torch.device("cpu")
INPUTS = (torch.randn(2, 12, 3, 8), torch.randn(2, 12, 3, 8), torch.randn(2, 12, 3, 8))


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value)


def test_on_a_cpu_it_is_what_torch_picks() -> None:
    kernel, why = pick_kernel("auto", CPU, torch.float32, 8)
    assert why == "native: the others are for bfloat16 on CUDA, this is torch.float32 on cpu"
    torch.testing.assert_close(kernel(*INPUTS, None), plain(*INPUTS))


def test_one_that_is_asked_for_and_works() -> None:
    kernel, why = pick_kernel("native", CPU, torch.bfloat16, 8)
    assert why == "native: asked for"
    query, key, value = (one.bfloat16() for one in INPUTS)
    assert kernel(query, key, value, None).dtype == torch.bfloat16


def test_one_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"denoiser\.attention has value 'flash4', expected one that works here \("):
        pick_kernel("flash4", CPU, torch.bfloat16, 8)


def test_one_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels._KERNELS, "native", lambda: lambda query, key, value, bias: value)
    with pytest.raises(ConfigError, match="its relative error is"):
        pick_kernel("native", CPU, torch.bfloat16, 8)


def test_a_packages_kernel_as_an_operator_of_torchs() -> None:
    """A kernel that is called as FlashAttention's, some releases of which return more than the result."""
    kernel = kernels._as_operator("test", lambda query, key, value: (plain(query, key, value), None))
    again = kernels._as_operator("test", lambda query, key, value: (plain(query, key, value), None))
    bias = torch.zeros(1, 1, 1, 12)
    compiled = torch.compile(lambda q, k, v: kernel(q, k, v, None) * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*INPUTS), 2 * plain(*INPUTS))
    for one in (kernel(*INPUTS, None), again(*INPUTS, None), kernel(*INPUTS, bias)):
        torch.testing.assert_close(one, plain(*INPUTS))


def _with_tiles(query: Any, key: Any, value: Any, tile_mn: Any, mma_pv_is_rs: bool, intra_wg_overlap: bool) -> Any:
    return "tiles", tile_mn, mma_pv_is_rs


@pytest.mark.parametrize(
    ("forward", "features", "capability", "expected"),
    [
        (_with_tiles, 128, (9, 0), ("tiles", (192, 128), False)),
        (_with_tiles, 64, (9, 0), "its own choice"),
        (_with_tiles, 128, (10, 0), "its own choice"),
        (lambda query, key, value: "another interface", 128, (9, 0), "its own choice"),
        (None, 128, (9, 0), "its own choice"),
    ],
)
def test_tiles_of_flash_attention_4_where_a_release_takes_them(
    monkeypatch: pytest.MonkeyPatch,
    forward: Callable[..., Any] | None,
    features: int,
    capability: tuple[int, int],
    expected: Any,
) -> None:
    package, cute, interface = (ModuleType(name) for name in ("flash_attn", "cute", "interface"))
    cute.flash_attn_func, cute.interface = lambda *_: "its own choice", interface  # type: ignore[attr-defined]
    if forward is not None:
        interface._flash_attn_fwd = forward  # type: ignore[attr-defined]
    for name, module in (("flash_attn", package), ("flash_attn.cute", cute), ("flash_attn.cute.interface", interface)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kernels, "_as_operator", lambda name, run: run)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    run: Any = kernels._flash4()
    assert run(*(torch.zeros(1, 4, 1, features) for _ in range(3))) == expected
