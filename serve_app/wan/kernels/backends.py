"""Attention backends: choosing the fastest kernel that works on a device, and saying why.

Kernels differ in speed and error; their results differ by rounding. Knows nothing of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from serve_app.compat.model import flash_attention4_forward
from serve_app.errors import ConfigError, one_line

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""`(query, key, value, bias)`, each `[batch, tokens, heads, features]`, to the query's shape. `bias` is added to the
logits, `[1, 1, 1, keys]`, None for nothing."""

KernelName = Literal["flash4", "flash3", "cudnn", "flash", "native"]
BY_SPEED: tuple[KernelName, ...] = get_args(KernelName)
"""The fastest first, on Hopper and long clips; `python -m benchmarks.model.a14b_forward --attention ...` compares them.
`native` is whatever torch picks, and works everywhere."""

_HOPPER = 9
_TILED: dict[str, Any] = {"tile_mn": (192, 128), "mma_pv_is_rs": False, "intra_wg_overlap": True}
"""Options of FlashAttention-4 on Hopper for heads of 128 features: tile sizes, and probabilities in shared memory.

1 to 2 % faster than its own choice on A14B's shapes (`python -m benchmarks.model.kernels`)."""

_TOLERANCE = 2e-2
"""Largest relative error that a kernel may have on random numbers; bfloat16 has 1e-3 to 1e-2."""


def pick_kernel(
    wanted: KernelName | Literal["auto"], device: torch.device, dtype: torch.dtype, features: int
) -> tuple[Kernel, str]:
    """Choose a kernel; return it, and in words which one it is and why. Each candidate is tried on random numbers.

    Args:
        wanted: a kernel's name, or `auto` for the fastest that works.
        device: where it runs.
        dtype: of queries, keys and values.
        features: number of features of a head.

    Raises:
        ConfigError: the wanted one does not work here.
    """
    if wanted == "auto" and (device.type != "cuda" or dtype == torch.float32):
        return _KERNELS["native"](), f"native: the others are for bfloat16 on CUDA, this is {dtype} on {device.type}"
    passed_over = []
    for name in BY_SPEED if wanted == "auto" else (wanted,):
        try:
            kernel = _KERNELS[name]()
            _try(kernel, device, dtype, features)
        except Exception as error:  # whatever a missing package, an old card or a new driver raises
            passed_over.append(f"{name}: {one_line(error)}")
            continue
        if wanted == "auto":
            return kernel, "; ".join([f"{name}: the fastest that works here", *passed_over])
        return kernel, f"{name}: asked for"
    raise ConfigError(f"denoiser.attention has value {wanted!r}, expected one that works here ({passed_over[0]})")


def _try(kernel: Kernel, device: torch.device, dtype: torch.dtype, features: int) -> None:
    """Compare a kernel with the plain formula in float32.

    Raises:
        ValueError: they differ.
    """
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, 256, 2, features, generator=generator, device=device).to(dtype) for _ in range(3)
    )
    with sdpa_kernel(SDPBackend.MATH):
        expected = _sdpa(query.float(), key.float(), value.float(), None)
    error = float((kernel(query, key, value, None).float() - expected).norm() / expected.norm())
    if not error <= _TOLERANCE:
        raise ValueError(f"its relative error is {error:.1e}, expected {_TOLERANCE:.0e} at most")


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    query, key, value = (one.permute(0, 2, 1, 3) for one in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).permute(0, 2, 1, 3)


def _torch_backend(backend: SDPBackend) -> Kernel:
    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        with sdpa_kernel(backend):
            return _sdpa(query, key, value, bias)

    return kernel


def _flash3() -> Kernel:
    # From the `hopper` folder of FlashAttention.
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found,unused-ignore]

    return _as_operator("flash3", flash_attn_func)


def _flash4() -> Kernel:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found,unused-ignore]

    # A release without it is 1 to 2 % slower; the next kernel would be slower by more.
    forward: Any = flash_attention4_forward()
    tiled = forward is not None and set(_TILED) <= set(inspect.signature(forward).parameters)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> object:
        if tiled and query.shape[-1] == 128 and torch.cuda.get_device_capability(query.device)[0] == _HOPPER:
            return forward(query, key, value, **_TILED)
        return flash_attn_func(query, key, value)

    return _as_operator("flash4", run)


def _as_operator(name: str, function: Callable[..., object]) -> Kernel:
    """Make a package's kernel an operator of torch, which the compiler calls without looking inside."""

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = function(query.contiguous(), key.contiguous(), value.contiguous())
        result = output[0] if isinstance(output, tuple) else output  # some releases return the logits' sums as well
        assert isinstance(result, torch.Tensor)
        return result

    qualified = f"wan_serve::{name}"
    if not hasattr(torch.ops.wan_serve, name):
        torch.library.custom_op(qualified, run, mutates_args=())
        torch.library.register_fake(qualified, lambda query, key, value: torch.empty_like(query))
    operator = getattr(torch.ops.wan_serve, name)

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if bias is not None:
            return _sdpa(query, key, value, bias)
        result: torch.Tensor = operator(query, key, value)
        return result

    return kernel


_KERNELS: dict[KernelName, Callable[[], Kernel]] = {
    "flash4": _flash4,
    "flash3": _flash3,
    "cudnn": lambda: _torch_backend(SDPBackend.CUDNN_ATTENTION),
    "flash": lambda: _torch_backend(SDPBackend.FLASH_ATTENTION),
    "native": lambda: _sdpa,
}
