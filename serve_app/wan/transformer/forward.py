"""The forward pass of an expert on one rank, from latents to predicted noise, in the order in which it runs.

It computes what diffusers' `WanTransformer3DModel` computes, with the modules of that class. Added are the parts that
the class does not know: tokens shared among ranks, blocks whose weights have to be fetched, cached keys and values of
the texts, and a block in fewer kernels.

Knows nothing of samples, and not how the modules got their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch

from serve_app.wan.kernels.fused import add_norm_modulate, norm_modulate
from serve_app.wan.offload.block_swap import BlockSwap
from serve_app.wan.parallel.sequence_shard import SequenceShard
from serve_app.wan.transformer.text_cache import TextCache
from serve_app.wan.weights.checkpoint import Expert


class ForwardPass:
    """The `forward` of one expert.

    Args:
        model: the expert, a `WanTransformer3DModel` with this rank's layers.
        name: the expert's name, by which `block_swap` knows its blocks.
        text_cache: where keys and values of the texts stay from step to step.
        shards: how tokens are divided among ranks, outermost first; each further one divides the shard of the last.
        block_swap: fetches the weights of a block before it runs; None where all of them are on the device.
        fused: run each block in fewer kernels, on CUDA in bfloat16 and compiled.
        compiled: compile each block. What it computes changes by rounding.
    """

    def __init__(
        self,
        model: Any,
        name: Expert,
        text_cache: TextCache,
        shards: Sequence[SequenceShard] = (),
        block_swap: BlockSwap | None = None,
        fused: bool = False,
        compiled: bool = False,
    ) -> None:
        self._model = model
        self._name: Expert = name
        self._text_cache = text_cache
        self._shards = shards
        self._block_swap = block_swap
        for block in model.blocks:
            block.forward = MethodType(fused_block_forward if fused else block_forward, block)
            if compiled:
                # One graph serves all layers: what differs between them are parameters and inputs. Sizes are fixed in
                # the first one, and those that are seen to change are free in the next.
                block.forward = torch.compile(block.forward)

    def __call__(self, latents: torch.Tensor, timesteps: torch.Tensor, texts: list[torch.Tensor]) -> torch.Tensor:
        """Predict the noise in `latents`. All ranks call this with the same arguments and get the same prediction.

        Args:
            latents: `[batch, channels, frames, height, width]` in the model's dtype.
            timesteps: `[batch]`.
            texts: one embedding for each of the batch, `[1, tokens, dim]`, zero where it is padding.

        Returns:
            The predicted noise, of the shape of `latents`.
        """
        with self._text_cache.serving(texts) as text:
            return self._predict(latents, timesteps, text)

    def _predict(self, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        model = self._model

        # Embeddings: patches of the latents, time and text.
        rotary_emb = model.rope(latents)
        hidden = model.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()  # [batch, tokens, width]
        time, modulation, text, _ = model.condition_embedder(timesteps, text, None, timestep_seq_len=None)
        modulation = modulation.unflatten(1, (6, -1))

        # This rank's shard of the tokens.
        whole = []
        for shard in self._shards:
            whole.append(hidden.shape[1])
            hidden = shard.take_own(hidden)

        for layer, block in enumerate(model.blocks):
            if self._block_swap is not None:
                self._block_swap.wait_for_block(self._name, layer)
            hidden = block(hidden, self._keys_values(layer, block, text), modulation, rotary_emb)
            if self._block_swap is not None:
                self._block_swap.release_block(self._name, layer)

        # Output: norm and projection, then the tokens of all ranks, whose features are a hundredth of the blocks' here.
        shift, scale = (model.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
        hidden = (model.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        hidden = model.proj_out(hidden)
        for shard, tokens in zip(reversed(self._shards), reversed(whole), strict=True):
            hidden = shard.gather_all(hidden, tokens)
        return unpatchify(hidden, latents.shape, model.config.patch_size)

    def _keys_values(self, layer: int, block: Any, text: torch.Tensor) -> torch.Tensor:
        """Return the texts' keys and values in a layer, from the cache where they are there.

        They are made outside of the block, so that the compiled block neither knows nor asks whether they are cached.
        """
        known = self._text_cache.get(layer)
        if known is None:
            known = block.attn2.processor.keys_values(block.attn2, text)
            self._text_cache.put(layer, known)
        return known


def block_forward(
    block: Any,
    hidden: torch.Tensor,
    keys_values: torch.Tensor,
    modulation: torch.Tensor,
    rotary_emb: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """Run one `WanTransformerBlock`: self-attention, cross-attention, feed-forward.

    Args:
        block: with `SelfAttention` and `CrossAttention` in place of its attention.
        hidden: this rank's tokens, `[batch, tokens, width]`.
        keys_values: of the texts, as `CrossAttention.keys_values` makes them.
        modulation: what the timestep adds to the block's scales, shifts and gates, `[batch, 6, width]`.
        rotary_emb: see `Rotary`.

    Returns:
        Tokens of the shape of `hidden`.
    """
    table = block.scale_shift_table + modulation.float()
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.chunk(6, dim=1)

    normed = (block.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    attended = block.attn1(normed, None, None, rotary_emb)  # by `SelfAttention`
    hidden = (hidden.float() + attended * gate).type_as(hidden)

    normed = block.norm2(hidden.float()).type_as(hidden)
    attended = block.attn2(normed, keys_values, None, None)  # by `CrossAttention`
    hidden = hidden + attended

    normed = (block.norm3(hidden.float()) * (1 + ffn_scale) + ffn_shift).type_as(hidden)
    fed = block.ffn(normed)
    return (hidden.float() + fed.float() * ffn_gate).type_as(hidden)


def fused_block_forward(
    block: Any,
    hidden: torch.Tensor,
    keys_values: torch.Tensor,
    modulation: torch.Tensor,
    rotary_emb: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """Run one block as `block_forward` does, each modulated norm being one kernel."""
    table = block.scale_shift_table + modulation.float()
    _, _, gate, _, _, ffn_gate = table.chunk(6, dim=1)

    normed = norm_modulate(hidden, table, 0, block.norm1.eps)
    attended = block.attn1(normed, None, None, rotary_emb)
    hidden = (hidden.float() + attended * gate).type_as(hidden)

    attended = block.attn2(block.norm2(hidden.float()).type_as(hidden), keys_values, None, None)

    hidden, normed = add_norm_modulate(hidden, attended, table, 3, block.norm3.eps)
    return (hidden.float() + block.ffn(normed).float() * ffn_gate).type_as(hidden)


def unpatchify(patches: torch.Tensor, shape: torch.Size, patch_size: Sequence[int]) -> torch.Tensor:
    """Put patches, `[batch, tokens, features]`, together to latents of `shape`, `[batch, _, frames, height, width]`."""
    batch, _, *sides = shape
    counts = [side // patch for side, patch in zip(sides, patch_size, strict=True)]
    patches = patches.reshape(batch, *counts, *patch_size, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return patches.flatten(6, 7).flatten(4, 5).flatten(2, 3)
