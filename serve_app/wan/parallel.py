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
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanRotaryPosEmbed, WanTransformerBlock
from torch import nn

from serve_app.errors import CheckpointError, ConfigError
from serve_app.wan.checkpoint import Checkpoint, Expert
from serve_app.wan.weights import Weights


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
    checkpoint: Checkpoint, expert: Expert, world: World, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """An expert, or this rank's shard of it, ready to run.

    The module is called as `WanTransformer3DModel` is, by all ranks with the same arguments, and returns the same
    prediction on all of them. The memory of the process grows by the shard and little more.

    Args:
        dtype: of weights and activations; the modules that diffusers keeps in float32 stay so.

    Raises:
        ConfigError: the group's size does not divide the heads or the feed-forward width.
        CheckpointError: the weights do not match the configuration.
    """
    config = checkpoint.expert_config(expert)
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    model.eval().requires_grad_(False)
    if world.size > 1:
        checkpoint.check_tensor_parallel(world.size)
        model = _shard(model, world, dtype)
    with checkpoint.weights(expert) as weights:
        _fill(model, weights, world, dtype, device)
    # Not part of a checkpoint: computed from the configuration.
    model.rope = WanRotaryPosEmbed(
        model.config.attention_head_dim, model.config.patch_size, model.config.rope_max_seq_len
    ).to(device)
    return model


def _shard(model: nn.Module, world: World, dtype: torch.dtype) -> nn.Module:
    """Replace the blocks' linear layers by this rank's shards; parameters are allocated, not filled."""
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
            module.set_processor(ShardedAttention(engine.mp_group))
    return model


class ShardedNorm(nn.Module):
    """This rank's slice of an RMSNorm over the features of all heads.

    Args:
        features: of all ranks together, since the mean is over all of them.
        size: number of ranks.
    """

    def __init__(self, features: int, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.features = features
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(features // size, dtype=dtype), requires_grad=False)

    def squares(self, hidden: torch.Tensor) -> torch.Tensor:
        """The sum of squares over this rank's features, `[batch, tokens, 1]`, float32."""
        return hidden.float().square().sum(-1, keepdim=True)

    def forward(self, hidden: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """Normalise by `squares`, summed over all ranks; float32 inside, as `torch.nn.RMSNorm` computes."""
        scale = torch.rsqrt(squares / self.features + self.eps)
        return (hidden.float() * scale * self.weight.float()).type_as(hidden)


class ShardedAttention:
    """Attention over this rank's heads; the counterpart of diffusers' `WanAttnProcessor` without image tokens.

    Queries and keys share one all-reduce for their norms. A separate one each would double the latency, which on a slow
    link is all there is to such a small message.
    """

    _attention_backend = None  # set by diffusers' `set_attention_backend`
    _parallel_config = None

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        from deepspeed import comm

        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        squares = torch.cat([attn.norm_q.squares(query), attn.norm_k.squares(key)], dim=1)
        comm.inference_all_reduce(squares, group=self.group)
        of_query, of_key = squares.split([query.shape[1], key.shape[1]], dim=1)
        query = attn.norm_q(query, of_query).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(key, of_key).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value.unflatten(2, (attn.heads, -1)),
            attn_mask=attention_mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
        )
        output: torch.Tensor = attn.to_out[0](hidden_states.flatten(2, 3).type_as(query))
        return output


def _rotate(hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of `[batch, tokens, heads, features]`, pairs being neighbours."""
    even, odd = hidden[..., 0::2], hidden[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(hidden)


def _fill(model: nn.Module, weights: Weights, world: World, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter its values: this rank's slice where the parameter is smaller than the file's tensor."""
    # Called by the name that diffusers' own loader goes by: a part of the path, not a substring.
    float32 = set(WanTransformer3DModel._keep_in_fp32_modules)
    missing = weights.names()
    for name, parameter in list(model.named_parameters()):
        if name not in missing:
            raise CheckpointError(f"{weights.folder}: the tensor {name!r} is missing, expected by config.json")
        missing.remove(name)
        whole = weights.shape(name)
        cut = [dim for dim, (ours, all_) in enumerate(zip(parameter.shape, whole, strict=False)) if ours != all_]
        expected = list(parameter.shape)
        if cut:
            expected[cut[0]] *= world.size
        if tuple(expected) != whole:
            raise CheckpointError(
                f"{weights.folder}: the tensor {name!r} has shape {whole}, expected {tuple(expected)}"
            )
        dim = cut[0] if cut else 0
        start = world.rank * parameter.shape[dim] if cut else 0
        target = torch.float32 if float32.intersection(name.split(".")) else dtype
        tensor = weights.read(name, dim, start, start + parameter.shape[dim], target)
        # A new parameter, since those built on the meta device cannot be given memory.
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device), requires_grad=False))
    # Present in files of the image-to-video sibling, without a place in the model; diffusers ignores it as well.
    missing = {name for name in missing if "norm_added_q" not in name}
    if missing:
        raise CheckpointError(f"{weights.folder}: the tensor {min(missing)!r} is not expected by config.json")


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
