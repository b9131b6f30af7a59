"""Private names of the libraries of the model: torch, DeepSpeed, diffusers, FlashAttention. Knows no Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# --- torch 2.13 ---


def set_cuda_allocator(settings: str) -> None:
    """Set options of the CUDA allocator in a running process.

    Uses `torch._C._accelerator_setAllocatorSettings`. Without it the options have to be in the environment of every
    process that uses CUDA before it imports torch.

    Args:
        settings: as in `PYTORCH_ALLOC_CONF`.
    """
    import torch

    torch._C._accelerator_setAllocatorSettings(settings)


def collectives_begun(group: Any) -> int:
    """Return the number of collectives that this rank has begun in a process group.

    Uses `ProcessGroup._get_sequence_number_for_group` of torch. Without it ranks that got out of step are noticed only
    when a collective times out.
    """
    return int(group._get_sequence_number_for_group())


def process_group(name: str) -> Any:
    """Return the process group of a name.

    Uses `torch.distributed.distributed_c10d._resolve_process_group`. Without it an operator of torch, which takes no
    process group as an argument, needs a table of its own.
    """
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type,unused-ignore]


def linear_gelu(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return GELU of a linear layer, computed by the kernel of the matrix product.

    On CUDA alone it is the tanh approximation.

    Uses `torch._addmm_activation`. Without it GELU is a kernel of its own, which reads and writes the widest tensor of
    a block once more.

    Args:
        rows: `[rows, features in]`.
        weight: `[features out, features in]`.
        bias: `[features out]`.
        out: where to put the result, `[rows, features out]`.
    """
    import torch

    result: torch.Tensor = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True, out=out)
    return result


def enable_symmetric_memory(group_name: str) -> None:
    """Let the ranks of a process group allocate memory that all of them can access.

    Uses `torch.distributed._symmetric_memory.enable_symm_mem_for_group`. Without it ranks that share weights exchange
    by NCCL alone, whose kernels take multiprocessors from the products (`denoiser.symmetric_memory: false`).
    """
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group_name)  # type: ignore[arg-type,unused-ignore]


def symmetric_workspace(group_name: str, size: int) -> Any:
    """Return the symmetric memory of a process group, of `size` bytes at least; all ranks call this.

    Uses `torch.distributed._symmetric_memory.get_symm_mem_workspace`, and of what it returns `SYMMETRIC_METHODS`.
    Without it see `enable_symmetric_memory`.
    """
    from torch.distributed import _symmetric_memory

    return _symmetric_memory.get_symm_mem_workspace(group_name, size)  # type: ignore[arg-type,unused-ignore]


SYMMETRIC_METHODS = (
    "rank",
    "world_size",
    "buffer_size",
    "barrier",
    "put_signal",
    "wait_signal",
    "stream_write_value32",
    "get_buffer",
    "get_signal_pad",
)
"""Attributes and methods of torch's `_SymmetricMemory` that are used; `symmetric_workspace` returns one."""


# --- DeepSpeed 0.19.8 ---


def disable_compiled_operators() -> None:
    """Keep DeepSpeed from compiling its own operators, such as the CPU all-reduce through shared memory.

    Uses `deepspeed.ops.__compatible_ops__`. Without it DeepSpeed probes for compilers at start, and its all-reduce
    needs all ranks on one host, a C++ compiler and ninja.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def shared_memory_all_reduce() -> Any | None:
    """Return DeepSpeed's all-reduce through shared memory, None where it is off; after `init_distributed`.

    Uses `deepspeed.comm.comm.cdb.shm_comm_op`. Without it nobody notices that `disable_compiled_operators` has no
    effect any more.
    """
    import deepspeed

    return deepspeed.comm.comm.cdb.shm_comm_op


# --- diffusers 0.42.1 ---


def float32_modules() -> set[str]:
    """Return the names of the modules of a Wan transformer that diffusers keeps in float32 whatever the dtype.

    Uses `WanTransformer3DModel._keep_in_fp32_modules`. Without it the list has to be copied, and results differ from
    diffusers' as soon as its list changes.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    return set(WanTransformer3DModel._keep_in_fp32_modules)


# --- FlashAttention-4 4.0.0b36 ---


def flash_attention4_forward() -> Callable[..., Any] | None:
    """Return the forward pass of FlashAttention-4 that takes tile sizes, None in a release without it.

    Uses `flash_attn.cute.interface._flash_attn_fwd`. Without it attention is 1 to 2 % slower.

    Raises:
        ImportError: the package is not installed.
    """
    from flash_attn.cute import interface  # type: ignore[import-not-found,unused-ignore]

    forward: Callable[..., Any] | None = getattr(interface, "_flash_attn_fwd", None)
    return forward
