"""An expert over one or several ranks: the process group, the sharded model, and its weights read slice by slice.

Tensor parallelism is DeepSpeed's inference engine: it cuts the linear layers of every block (Megatron-LM's scheme,
https://arxiv.org/abs/1909.08053). What it does not know of Wan is added here: a query/key norm that spans all heads,
modules that stay in float32, and weights that go from the file to the shard without a whole expert in memory.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanRotaryPosEmbed, WanTransformerBlock
from torch import nn

from serve_app.errors import CheckpointError, ConfigError
from serve_app.wan.attention import Attention, ShardedNorm
from serve_app.wan.checkpoint import Checkpoint, Expert
from serve_app.wan.pieces import Piece, empty_expert, pieces
from serve_app.wan.prepared import Prepared
from serve_app.wan.text_memory import TextMemory
from serve_app.wan.weights import Weights

TEXT_MEMORY_BYTES = 2.0**30
"""Enough for one 720p sample of A14B, both halves of guidance."""


@dataclass(frozen=True)
class World:
    """This process's place in its group. `group` is None for a group of one."""

    rank: int
    size: int
    group: Any | None
    device: torch.device

    def close(self) -> None:
        """Leave the group. The process cannot join another one afterwards."""
        if self.group is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def init_world(rank: int, size: int, address: str, port: int, device: torch.device, timeout_s: float) -> World:
    """Join the group of ranks that share an expert; returns when all of them are there.

    Args:
        address, port: where rank 0 listens, as the other ranks reach it.
        timeout_s: for the others to come, and for every exchange with them later.

    Raises:
        torch.distributed.DistError: the group did not come together in time.
    """
    if size == 1:
        return World(rank, size, None, device)
    cuda = device.type == "cuda"
    os.environ["LOCAL_RANK"] = str(device.index or 0) if cuda else "0"
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(size)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")  # a CPU group may run where there is a GPU
    if not cuda:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_towards(address, port))
    import deepspeed  # only now: it reads DS_ACCELERATOR when imported, and a group of one does without it

    accelerator = deepspeed.accelerator.get_accelerator().device_name()
    if accelerator != device.type:
        raise RuntimeError(f"DeepSpeed was imported earlier, for {accelerator!r}; set DS_ACCELERATOR={device.type}")
    # DeepSpeed's own CPU all-reduce works through shared memory: it needs ranks on one host, and a C++ compiler and
    # ninja when first used. An empty table of compatible operators leaves gloo, and saves the probing of all compilers.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
        init_method=f"tcp://{f'[{address}]' if ':' in address else address}:{port}",
        rank=rank,
        world_size=size,
    )
    if deepspeed.comm.comm.cdb.shm_comm_op is not None:
        raise RuntimeError("DeepSpeed's shared-memory all-reduce is on although it was disabled; is its version newer?")
    return World(rank, size, torch.distributed.group.WORLD, device)


def load_expert(
    checkpoint: Checkpoint,
    expert: Expert,
    world: World,
    dtype: torch.dtype,
    device: torch.device,
    text_memory_bytes: float = TEXT_MEMORY_BYTES,
    prepared: Prepared | None = None,
) -> nn.Module:
    """An expert, or this rank's shard of it, ready to run.

    The module is called as `WanTransformer3DModel` is, by all ranks with the same arguments, and returns the same
    prediction on all of them. The memory of the process grows by the shard and little more.

    Args:
        dtype: of weights and activations; the modules that diffusers keeps in float32 stay so.
        text_memory_bytes: bound of its `text_memory`, see `TextMemory`.
        prepared: where each rank's shard is a file of its own, made for this group's size and this dtype. Without it
            the rank reads its slices of the checkpoint's weights.

    Raises:
        ConfigError: the group's size does not divide the heads or the feed-forward width.
        CheckpointError: the weights do not match the configuration, or are damaged.
    """
    model = empty_expert(checkpoint, expert)
    group = None
    if world.size > 1:
        checkpoint.check_tensor_parallel(world.size)
        model, group = _shard(model, world, dtype)
    # DeepSpeed takes the model for its own: attributes are set afterwards.
    model.text_memory = TextMemory(text_memory_bytes, fold=device.type == "cpu" and dtype == torch.float32)
    for layer, block in enumerate(model.blocks):
        block.attn2.set_processor(Attention(group, model.text_memory, layer))
    with checkpoint.weights(expert) if prepared is None else prepared.weights(expert, world.rank) as weights:
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if prepared is None:
            parts = pieces(shapes, weights, world.rank, world.size, dtype)
        else:
            parts = pieces(shapes, weights, 0, 1, dtype)
            _check_dtypes(parts, weights)
        _fill(model, weights, parts, device)
    # Not part of a checkpoint: computed from the configuration.
    model.rope = WanRotaryPosEmbed(
        model.config.attention_head_dim, model.config.patch_size, model.config.rope_max_seq_len
    ).to(device)
    return model


def _shard(model: nn.Module, world: World, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Replace the blocks' linear layers by this rank's shards; parameters are allocated, not filled.

    Returns:
        The model, and the process group that its ranks reduce over.
    """
    import deepspeed

    engine = deepspeed.init_inference(
        model,
        # The default grain of 64 cuts unevenly where the feed-forward width is no multiple of 64 times the size.
        tensor_parallel={"tp_size": world.size, "tp_grain_size": 1},
        dtype=dtype,
        replace_with_kernel_inject=False,
        # The two row-parallel layers of a block, by the last two parts of their path.
        injection_policy={WanTransformerBlock: ("to_out.0", "net.2")},
    )
    model = engine.module
    for module in model.modules():
        if isinstance(module, WanAttention):
            module.heads //= world.size
            for name in ("norm_q", "norm_k"):
                norm = getattr(module, name)
                setattr(module, name, ShardedNorm(norm.normalized_shape[0], world.size, norm.eps, dtype))
            # DeepSpeed's group rather than the world's: one NCCL communicator, with its buffers, instead of two.
            module.set_processor(Attention(engine.mp_group))
    return model, engine.mp_group


def _check_dtypes(parts: list[Piece], weights: Weights) -> None:
    """Converting would hide that a file was made for other modules in float32 than this version of diffusers keeps."""
    for part in parts:
        if weights.dtype(part.name) != part.dtype:
            raise CheckpointError(
                f"{weights.where}: the tensor {part.name!r} is {weights.dtype(part.name)}, expected {part.dtype}; "
                "prepare the model again"
            )


def _fill(model: nn.Module, weights: Weights, parts: list[Piece], device: torch.device) -> None:
    """Give every parameter its values."""
    for part in sorted(parts, key=lambda part: weights.position(part.name)):
        tensor = weights.read(part.name, part.dim, part.start, part.stop, part.dtype)
        # A new parameter, since those built on the meta device cannot be given memory.
        owner, _, leaf = part.name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device), requires_grad=False))


def _interface_towards(address: str, port: int) -> str:
    """The network interface whose IP address this host uses to reach `address`.

    Gloo would take the one that the host's name resolves to, which on many machines is the loopback one: ranks on other
    hosts then wait for it in vain.
    """
    import psutil

    family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing: it only looks up the route
        own = ipaddress.ip_address(probe.getsockname()[0])
    loopback = ""
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            with suppress(ValueError):  # link-layer addresses
                ip = ipaddress.ip_address(entry.address.split("%")[0])
                if ip == own:
                    return name
                loopback = name if ip.is_loopback else loopback
    if own.is_loopback and loopback:
        return loopback  # 127.0.0.2 and the like belong to it without being listed
    raise ConfigError(f"rank address has value {address!r}, expected one reached through an interface of this host")
