"""Loading of an expert over one or several ranks: the sharded model, and its weights read slice by slice.

Tensor parallelism is DeepSpeed's inference engine: it cuts the linear layers of every block (Megatron-LM's scheme,
https://arxiv.org/abs/1909.08053). Added here is what it does not know of Wan: a query/key norm that spans all heads,
modules that stay in float32, and weights that go from the file to the shard without a whole expert in memory.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from torch import nn

from serve_app.errors import CheckpointError
from serve_app.logs import get_logger
from serve_app.wan.kernels.backends import KernelName, pick_kernel
from serve_app.wan.kernels.fused import LinearGelu
from serve_app.wan.offload.block_swap import BlockSwap
from serve_app.wan.parallel.process_groups import Axis, ProcessGroups
from serve_app.wan.parallel.sequence_shard import SequenceShard
from serve_app.wan.parallel.tensor_parallel import ColumnParallel, RowParallel
from serve_app.wan.transformer.attention import CrossAttention, SelfAttention, ShardedNorm
from serve_app.wan.transformer.forward import ForwardPass
from serve_app.wan.transformer.rotary import Rotary
from serve_app.wan.transformer.text_cache import TextCache
from serve_app.wan.weights.checkpoint import Checkpoint, Expert
from serve_app.wan.weights.cut import cut_dim
from serve_app.wan.weights.random_weights import RandomWeights
from serve_app.wan.weights.reader import Weights
from serve_app.wan.weights.shard_spec import ShardSlice, empty_expert, read_in_file_order, shard_slices
from serve_app.wan.weights.sharded import REMEDY, ShardedCheckpoint

logger = get_logger(__name__)

TEXT_CACHE_BYTES = 2.0**30
"""Default bound of the text K/V cache: enough for one guided sample of A14B, with both its texts."""


def load_expert(
    checkpoint: Checkpoint,
    expert: Expert,
    groups: ProcessGroups,
    dtype: torch.dtype,
    device: torch.device,
    text_cache_bytes: float = TEXT_CACHE_BYTES,
    attention: KernelName | Literal["auto"] = "auto",
    compiled: bool = False,
    sharded: ShardedCheckpoint | None = None,
    block_swap: BlockSwap | None = None,
) -> nn.Module:
    """Load an expert, or this rank's shard of it, ready to run.

    The module is called as `ForwardPass` says, by all ranks with the same arguments. The memory of the process grows by
    the shard and little more.

    Args:
        checkpoint: holds the weights.
        expert: the expert's name.
        groups: the ranks that share the expert.
        dtype: of weights and activations; the modules that diffusers keeps in float32 stay so.
        device: where this rank computes.
        text_cache_bytes: bound of the text K/V cache, see `TextCache`.
        attention: see `pick_kernel`.
        compiled: compile the blocks. What they compute changes by rounding.
        sharded: the checkpoint with a file for each rank, made for this tensor-parallel size and this dtype. Without it
            the rank reads its slices of `checkpoint`.
        block_swap: device memory in which the blocks take turns; None keeps all of them on the device.

    Raises:
        ConfigError: the mesh does not fit the heads or the feed-forward width.
        CheckpointError: the weights do not match the configuration, or are damaged.
    """
    config = checkpoint.expert_config(expert)
    groups.mesh.check_fits(config)
    kernel, why = pick_kernel(attention, device, dtype, int(config["attention_head_dim"]))
    logger.info("attention", extra={"expert": expert, "kernel": why})
    model = empty_expert(checkpoint, expert)
    tensor = groups.tensor
    if tensor.size > 1:
        model = _shard(model, tensor, dtype)
    # DeepSpeed treats the model as its own, so attributes of ours are set after it.
    model.guidance = groups.guidance
    # Compiled blocks want texts of one length.
    fold = device.type == "cpu" and dtype == torch.float32 and not compiled
    model.text_cache = TextCache(text_cache_bytes, fold)
    shard = SequenceShard(groups.sequence) if groups.sequence.size > 1 else None
    fused = compiled and device.type == "cuda" and dtype == torch.bfloat16
    for block in model.blocks:
        if fused:
            block.ffn.net[0] = LinearGelu(block.ffn.net[0].proj)
        block.attn1.set_processor(SelfAttention(kernel, tensor.group, shard, fused))
        block.attn2.set_processor(CrossAttention(kernel, tensor.group, model.text_cache))
    with _source(checkpoint, expert, tensor, device, sharded) as weights:
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if sharded is None:
            parts = shard_slices(shapes, weights, tensor.index, tensor.size, dtype)
        else:
            parts = shard_slices(shapes, weights, 0, 1, dtype)
            _check_dtypes(parts, weights)
        if block_swap is not None:
            blocks = [part for part in parts if part.name.startswith("blocks.")]
            block_swap.add_expert(expert, list(model.blocks), blocks, weights)
            parts = [part for part in parts if not part.name.startswith("blocks.")]
        _fill(model, weights, parts, device)
    # Not part of a checkpoint: computed from the configuration.
    rope = WanRotaryPosEmbed(model.config.attention_head_dim, model.config.patch_size, model.config.rope_max_seq_len)
    model.rope = Rotary(rope.to(device), shard)
    shards = [SequenceShard(axis) for axis in (groups.sequence, tensor) if axis.size > 1]
    model.forward = ForwardPass(model, expert, model.text_cache, shards, block_swap, fused, compiled)
    return model


def _source(
    checkpoint: Checkpoint, expert: Expert, tensor: Axis, device: torch.device, sharded: ShardedCheckpoint | None
) -> Weights:
    if checkpoint.random:
        return RandomWeights(checkpoint.folder / expert, device)
    return Weights(checkpoint.folder / expert) if sharded is None else sharded.weights(expert, tensor.index)


class _Mpu:
    """Tells DeepSpeed which ranks share the weights."""

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

    uncut = [_whole(block.attn2) for block in model.blocks]  # type: ignore[union-attr]
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
    blocks: Any = model.blocks
    for block, whole in zip(blocks, uncut, strict=True):
        # DeepSpeed's own layer begins its sum when the product is finished, and sums all tokens on every rank.
        for pair, second in ((block.attn1.to_out, 0), (block.ffn.net, 2)):
            pair[second] = RowParallel(pair[second], tensor.group)
        block.ffn.net[0].proj = ColumnParallel(block.ffn.net[0].proj, tensor.group)
        for attention, names in ((block.attn1, ("norm_q", "norm_k")), (block.attn2, ("norm_k",))):
            attention.heads //= tensor.size
            for name in names:
                norm = getattr(attention, name)
                setattr(attention, name, ShardedNorm(norm.normalized_shape[0], tensor.size, norm.eps, dtype))
        for name, module in whole.items():
            setattr(block.attn2, name, module)
    return model


def _whole(cross_attention: Any) -> dict[str, nn.Module]:
    """Return copies of the modules that each rank has whole, by name.

    DeepSpeed cuts some of them all the same, and cuts the parameters themselves.
    """
    return {
        name: copy.deepcopy(module)
        for name, module in cross_attention.named_children()
        if all(cut_dim(f"blocks.0.attn2.{name}.{leaf}") is None for leaf, _ in module.named_parameters())
    }


def _check_dtypes(parts: list[ShardSlice], weights: Weights) -> None:
    """Check that a rank's file has the dtypes that the model wants.

    Converting would hide that the file was made for other float32 modules than this version of diffusers keeps.

    Raises:
        CheckpointError: a tensor has another dtype.
    """
    for part in parts:
        if weights.dtype(part.name) != part.dtype:
            raise CheckpointError(
                f"{weights.where}: the tensor {part.name!r} is {weights.dtype(part.name)}, expected {part.dtype}; "
                f"{REMEDY}"
            )


def _fill(model: nn.Module, weights: Weights, parts: list[ShardSlice], device: torch.device) -> None:
    """Give every parameter its values from the weights."""

    def read(part: ShardSlice) -> torch.Tensor:
        return weights.read(part.name, part.dim, part.start, part.stop, part.dtype).to(device)

    for part, tensor in read_in_file_order(parts, weights, read):
        # A new parameter, since those built on the meta device cannot be given memory.
        owner, _, leaf = part.name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
