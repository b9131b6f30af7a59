"""Names and shapes of the tensors of a model's components, computed from their configurations.

They equal those of the libraries' classes. To build these would take torch and seconds.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from serve_app.wan.weights.components import Component, shorten

Shapes = dict[str, tuple[int, ...]]
# Bounds far beyond any model, so that a typing error gives one line instead of a computer without memory.
Width = Annotated[int, Field(ge=1, le=1 << 20)]
Layers = Annotated[int, Field(ge=1, le=1000)]


class Weighted(Component):
    """A component that has weights."""

    ALIASES: ClassVar[dict[str, str]] = {}
    """Other names of tensors: a file may have a tensor under its name, under the other name, or under both."""

    @staticmethod
    def is_ignored(name: str) -> bool:
        """Return whether files may hold this tensor without a place in the model."""
        return False


class ExpertConfig(Weighted):
    """`transformer/config.json`: diffusers' WanTransformer3DModel."""

    patch_size: list[int] = Field([1, 2, 2])
    num_attention_heads: Width = 40
    attention_head_dim: Annotated[int, Field(ge=2, le=1 << 16, multiple_of=2)] = 128
    in_channels: Width = 16
    out_channels: Width | None = 16
    text_dim: Width = 4096
    freq_dim: Width = 256
    ffn_dim: Width = 13824
    num_layers: Layers = 40
    cross_attn_norm: bool = True
    qk_norm: Literal["rms_norm_across_heads"] = "rms_norm_across_heads"
    eps: Annotated[float, Field(gt=0)] = 1e-6
    image_dim: None = None
    added_kv_proj_dim: None = None
    rope_max_seq_len: Width = 1024
    pos_embed_seq_len: None = None

    @model_validator(mode="after")
    def _check_patch_size(self) -> Self:
        if self.patch_size != [1, 2, 2]:
            raise ValueError(f"patch_size is {self.patch_size}, expected [1, 2, 2]")
        return self

    def tensors(self) -> Shapes:
        """Return the shapes of all parameters by name."""
        width = self.num_attention_heads * self.attention_head_dim
        found: Shapes = {"scale_shift_table": (1, 2, width)}
        _add_layer(found, "patch_embedding", width, self.in_channels, *self.patch_size)
        for name, inputs in (("time", self.freq_dim), ("text", self.text_dim)):
            _add_layer(found, f"condition_embedder.{name}_embedder.linear_1", width, inputs)
            _add_layer(found, f"condition_embedder.{name}_embedder.linear_2", width, width)
        _add_layer(found, "condition_embedder.time_proj", 6 * width, width)
        _add_layer(found, "proj_out", (self.out_channels or self.in_channels) * 4, width)
        for number in range(self.num_layers):
            block = f"blocks.{number}"
            found[f"{block}.scale_shift_table"] = (1, 6, width)
            for attention in ("attn1", "attn2"):
                for name in ("to_q", "to_k", "to_v", "to_out.0"):
                    _add_layer(found, f"{block}.{attention}.{name}", width, width)
                for name in ("norm_q", "norm_k"):
                    found[f"{block}.{attention}.{name}.weight"] = (width,)
            if self.cross_attn_norm:
                found[f"{block}.norm2.weight"] = found[f"{block}.norm2.bias"] = (width,)
            _add_layer(found, f"{block}.ffn.net.0.proj", self.ffn_dim, width)
            _add_layer(found, f"{block}.ffn.net.2", width, self.ffn_dim)
        return found

    @staticmethod
    def is_ignored(name: str) -> bool:
        """Return whether files may hold this tensor without a place in the model."""
        # Files of the image-to-video model have it; diffusers ignores it as well.
        return "norm_added_q" in name


class TextConfig(Weighted):
    """`text_encoder/config.json`: transformers' UMT5EncoderModel."""

    ALIASES: ClassVar[dict[str, str]] = {"encoder.embed_tokens.weight": "shared.weight"}
    model_type: Literal["umt5"] = "umt5"
    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)] = 250112
    d_model: Width = 512
    d_kv: Width = 64
    d_ff: Width = 1024
    num_layers: Layers = 8
    num_heads: Width = 6
    relative_attention_num_buckets: Width = 32
    relative_attention_max_distance: Width = 128
    layer_norm_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    dropout_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    feed_forward_proj: Literal["gated-gelu", "relu"] = "gated-gelu"
    is_gated_act: bool | None = None
    is_decoder: Literal[False] = False

    @model_validator(mode="after")
    def _check_gating(self) -> Self:
        if self.is_gated_act not in (None, self.gated):
            raise ValueError(
                f"is_gated_act is {shorten(self.is_gated_act)}, expected {shorten(self.gated)} as feed_forward_proj is "
                f"{self.feed_forward_proj!r}"
            )
        return self

    @property
    def gated(self) -> bool:
        """True if the feed-forward layers are gated."""
        return self.feed_forward_proj.startswith("gated-")

    def tensors(self) -> Shapes:
        """Return the shapes of all parameters by name; the embeddings only as `shared.weight`."""
        inner = self.num_heads * self.d_kv
        found: Shapes = {
            "shared.weight": (self.vocab_size, self.d_model),
            "encoder.final_layer_norm.weight": (self.d_model,),
        }
        for number in range(self.num_layers):
            attention, forward = (f"encoder.block.{number}.layer.{half}" for half in (0, 1))
            for name in "qkv":
                found[f"{attention}.SelfAttention.{name}.weight"] = (inner, self.d_model)
            found[f"{attention}.SelfAttention.o.weight"] = (self.d_model, inner)
            found[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (
                self.relative_attention_num_buckets,
                self.num_heads,
            )
            for name in ("wi_0", "wi_1") if self.gated else ("wi",):
                found[f"{forward}.DenseReluDense.{name}.weight"] = (self.d_ff, self.d_model)
            found[f"{forward}.DenseReluDense.wo.weight"] = (self.d_model, self.d_ff)
            for layer in (attention, forward):
                found[f"{layer}.layer_norm.weight"] = (self.d_model,)
        return found

    @staticmethod
    def is_ignored(name: str) -> bool:
        """Return whether files may hold this tensor without a place in the model: a whole UMT5 has a decoder."""
        return name.startswith("decoder.") or name == "lm_head.weight"


class VaeConfig(Weighted):
    """`vae/config.json`: diffusers' AutoencoderKLWan, as in Wan2.1."""

    base_dim: Width = 96
    decoder_base_dim: Width | None = None
    z_dim: Width = 16
    dim_mult: list[Width] = Field([1, 2, 4, 4])
    num_res_blocks: Layers = 2
    attn_scales: list[float] = Field([])
    temperal_downsample: list[bool] = Field([False, True, True])
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    latents_mean: list[float] | None = None
    latents_std: list[Annotated[float, Field(gt=0)]] | None = None
    is_residual: Literal[False] = False
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    patch_size: None = None
    scale_factor_temporal: Literal[4] = 4
    scale_factor_spatial: Literal[8] = 8

    @model_validator(mode="after")
    def _check_scales(self) -> Self:
        """Check that sides are divided by 8 and frames by 4, whatever the `scale_factor` fields say."""
        if len(self.dim_mult) != 4:
            raise ValueError(f"dim_mult is {self.dim_mult}, expected four numbers, for sides divided by 8")
        if len(self.temperal_downsample) != 3 or sum(self.temperal_downsample) != 2:
            raise ValueError(
                f"temperal_downsample is {shorten(self.temperal_downsample)}, expected true twice out of three times, "
                "for frames divided by 4"
            )
        for field in ("latents_mean", "latents_std"):
            values = getattr(self, field)
            found = 16 if values is None else len(values)  # diffusers' own defaults
            if found != self.z_dim:
                raise ValueError(f"{field} has {found} numbers, expected {self.z_dim}, the value of z_dim")
        return self

    def tensors(self) -> Shapes:
        """Return the shapes of all parameters of encoder and decoder by name."""
        found: Shapes = {}
        _add_layer(found, "quant_conv", 2 * self.z_dim, 2 * self.z_dim, 1, 1, 1)
        _add_layer(found, "post_quant_conv", self.z_dim, self.z_dim, 1, 1, 1)
        self._add_encoder(found)
        self._add_decoder(found)
        return found

    def _add_encoder(self, found: Shapes) -> None:
        widths = [self.base_dim * factor for factor in (1, *self.dim_mult)]
        _add_layer(found, "encoder.conv_in", widths[0], self.in_channels, 3, 3, 3)
        number = 0
        last = len(self.dim_mult) - 1
        for level, (inputs, width) in enumerate(pairwise(widths)):
            for _ in range(self.num_res_blocks):
                _add_residual(found, f"encoder.down_blocks.{number}", inputs, width)
                inputs, number = width, number + 1
                if 0.5**level in self.attn_scales:
                    _add_attention(found, f"encoder.down_blocks.{number}", width)
                    number += 1
            if level != last:
                _add_layer(found, f"encoder.down_blocks.{number}.resample.1", width, width, 3, 3)
                if self.temperal_downsample[level]:
                    _add_layer(found, f"encoder.down_blocks.{number}.time_conv", width, width, 3, 1, 1)
                number += 1
        _add_ends(found, "encoder", widths[-1], widths[-1], 2 * self.z_dim)

    def _add_decoder(self, found: Shapes) -> None:
        base = self.decoder_base_dim or self.base_dim
        widths = [base * factor for factor in (self.dim_mult[-1], *reversed(self.dim_mult))]
        _add_layer(found, "decoder.conv_in", widths[0], self.z_dim, 3, 3, 3)
        upsample = self.temperal_downsample[::-1]
        for level, (inputs, width) in enumerate(pairwise(widths)):
            block = f"decoder.up_blocks.{level}"
            inputs = inputs // 2 if level else inputs
            for number in range(self.num_res_blocks + 1):
                _add_residual(found, f"{block}.resnets.{number}", inputs, width)
                inputs = width
            if level != len(self.dim_mult) - 1:
                _add_layer(found, f"{block}.upsamplers.0.resample.1", width // 2, width, 3, 3)
                if upsample[level]:
                    _add_layer(found, f"{block}.upsamplers.0.time_conv", 2 * width, width, 3, 1, 1)
        _add_ends(found, "decoder", widths[0], widths[-1], self.out_channels)


def _add_layer(found: Shapes, name: str, outputs: int, *inputs: int) -> None:
    found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, *inputs), (outputs,)


def _add_residual(found: Shapes, name: str, inputs: int, width: int) -> None:
    found[f"{name}.norm1.gamma"], found[f"{name}.norm2.gamma"] = (inputs, 1, 1, 1), (width, 1, 1, 1)
    _add_layer(found, f"{name}.conv1", width, inputs, 3, 3, 3)
    _add_layer(found, f"{name}.conv2", width, width, 3, 3, 3)
    if inputs != width:
        _add_layer(found, f"{name}.conv_shortcut", width, inputs, 1, 1, 1)


def _add_attention(found: Shapes, name: str, width: int) -> None:
    found[f"{name}.norm.gamma"] = (width, 1, 1)
    _add_layer(found, f"{name}.to_qkv", 3 * width, width, 1, 1)
    _add_layer(found, f"{name}.proj", width, width, 1, 1)


def _add_ends(found: Shapes, half: str, middle: int, width: int, outputs: int) -> None:
    """Add the middle block and the output layers."""
    _add_residual(found, f"{half}.mid_block.resnets.0", middle, middle)
    _add_attention(found, f"{half}.mid_block.attentions.0", middle)
    _add_residual(found, f"{half}.mid_block.resnets.1", middle, middle)
    found[f"{half}.norm_out.gamma"] = (width, 1, 1, 1)
    _add_layer(found, f"{half}.conv_out", outputs, width, 3, 3, 3)
