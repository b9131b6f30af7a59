"""An expert over one or several ranks: the sharded model, and its weights read slice by slice.

Tensor parallelism is DeepSpeed's inference engine: it cuts the linear layers of every block (Megatron-LM's scheme,
https://arxiv.org/abs/1909.08053). What it does not know of Wan is added here: a query/key norm that spans all heads,
modules that stay in float32, and weights that go from the file to the shard without a whole expert in memory.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanRotaryPosEmbed, WanTransformerBlock
from torch import nn

from serve_app.errors import CheckpointError
from serve_app.logs import get_logger
from serve_app.wan.attention import CrossAttention, SelfAttention, ShardedNorm
from serve_app.wan.checkpoint import Checkpoint, Expert
from serve_app.wan.kernels import KernelName, pick_kernel
from serve_app.wan.rotary import Rotary
from serve_app.wan.sequence import Tokens
from serve_app.wan.text_memory import TextMemory
from serve_app.wan.weights import Weights
from serve_app.wan.world import Axis, World

log = get_logger(__name__)

TEXT_MEMORY_BYTES = 2.0**30
"""Enough for one 720p sample of A14B, both halves of guidance."""


def load_expert(
    checkpoint: Checkpoint,
    expert: Expert,
    world: World,
    dtype: torch.dtype,
    device: torch.device,
    text_memory_bytes: float = TEXT_MEMORY_BYTES,
    attention: KernelName | Literal["auto"] = "auto",
    compiled: bool = False,
) -> nn.Module:
    """An expert, or this rank's shard of it, ready to run.

    The module is called as `WanTransformer3DModel` is, by all ranks with the same arguments, and returns the same
    prediction on all of them. The memory of the process grows by the shard and little more.

    Args:
        dtype: of weights and activations; the modules that diffusers keeps in float32 stay so.
        text_memory_bytes: bound of its `text_memory`, see `TextMemory`.
        attention: see `pick_kernel`.
        compiled: compile the blocks. What they compute changes by rounding.

    Raises:
        ConfigError: the mesh does not fit the heads or the feed-forward width.
        CheckpointError: the weights do not match the configuration.
    """
    config = checkpoint.expert_config(expert)
    kernel, why = pick_kernel(attention, device, dtype, int(config["attention_head_dim"]))
    log.info("attention", extra={"expert": expert, "kernel": why})
    world.mesh.check(config)
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    model.eval().requires_grad_(False)
    if world.tensor.size > 1:
        model = _shard(model, world.tensor, dtype)
    # DeepSpeed takes the model for its own: attributes are set afterwards.
    model.guidance = world.guidance
    # What is compiled wants texts of one length.
    fold = device.type == "cpu" and dtype == torch.float32 and not compiled
    model.text_memory = TextMemory(text_memory_bytes, fold)
    tokens = Tokens(world.sequence) if world.sequence.size > 1 else None
    for layer, block in enumerate(model.blocks):
        block.attn1.set_processor(SelfAttention(kernel, world.tensor.group, tokens))
        cross = CrossAttention(kernel, world.tensor.group, model.text_memory)
        block.attn2.set_processor(cross)
        cross.give(block, layer)
    with checkpoint.weights(expert) as weights:
        _fill(model, weights, world.tensor, dtype, device)
    # Not part of a checkpoint: computed from the configuration.
    rope = WanRotaryPosEmbed(model.config.attention_head_dim, model.config.patch_size, model.config.rope_max_seq_len)
    model.rope = Rotary(rope.to(device), tokens)
    if tokens is not None:
        tokens.share(model)
    if compiled:
        # One graph serves all layers: what differs between them are parameters and inputs. Sizes are fixed in the first
        # one, and those that are seen to change are free in the next.
        for block in model.blocks:
            block.forward = torch.compile(block.forward)
    return model


class _Mpu:
    """How DeepSpeed is told which ranks share the weights."""

    def __init__(self, tensor: Axis) -> None:
        self._tensor = tensor

    def get_model_parallel_group(self) -> Any:
        return self._tensor.group

    def get_model_parallel_rank(self) -> int:
        return self._tensor.index

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size


def _shard(model: nn.Module, tensor: Axis, dtype: torch.dtype) -> nn.Module:
    """Replace the blocks' linear layers by this rank's shards; parameters are allocated, not filled."""
    import deepspeed

    engine = deepspeed.init_inference(
        model,
        # The default grain of 64 cuts unevenly where the feed-forward width is no multiple of 64 times the size.
        tensor_parallel={
            "tp_size": tensor.size,
            "tp_grain_size": 1,
            "tp_group": tensor.group,
            "mpu": _Mpu(tensor),  # without it a group of the first ranks is made, whatever `tp_group` says
        },
        dtype=dtype,
        replace_with_kernel_inject=False,
        # The two row-parallel layers of a block, by the last two parts of their path.
        injection_policy={WanTransformerBlock: ("to_out.0", "net.2")},
    )
    model = engine.module
    for module in model.modules():
        if isinstance(module, WanAttention):
            module.heads //= tensor.size
            for name in ("norm_q", "norm_k"):
                norm = getattr(module, name)
                setattr(module, name, ShardedNorm(norm.normalized_shape[0], tensor.size, norm.eps, dtype))
    return model


def _fill(model: nn.Module, weights: Weights, axis: Axis, dtype: torch.dtype, device: torch.device) -> None:
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
            expected[cut[0]] *= axis.size
        if tuple(expected) != whole:
            raise CheckpointError(
                f"{weights.folder}: the tensor {name!r} has shape {whole}, expected {tuple(expected)}"
            )
        dim = cut[0] if cut else 0
        start = axis.index * parameter.shape[dim] if cut else 0
        target = torch.float32 if float32.intersection(name.split(".")) else dtype
        tensor = weights.read(name, dim, start, start + parameter.shape[dim], target)
        # A new parameter, since those built on the meta device cannot be given memory.
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device), requires_grad=False))
    # Present in files of the image-to-video sibling, without a place in the model; diffusers ignores it as well.
    missing = {name for name in missing if "norm_added_q" not in name}
    if missing:
        raise CheckpointError(f"{weights.folder}: the tensor {min(missing)!r} is not expected by config.json")
