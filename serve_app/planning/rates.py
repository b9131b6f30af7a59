"""Seconds of a video on a kind of GPU and a mesh: those that were measured, and estimates by the card's rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from serve_app.planning.cards import CARDS, Card
from serve_app.planning.measurements import (
    AT_480P,
    DECODE_TFLOPS,
    EAGER_FACTOR,
    ENCODE_TFLOPS,
    ENCODE_TFLOPS_PER_CPU,
    JOB_FACTOR,
    JOBS,
    OTHER_S,
    PASSES,
)
from serve_app.planning.model_shape import ModelShape
from serve_app.request import Params
from serve_app.wan.cost import decode_flops, encode_flops, latent_tokens, step_flops
from serve_app.wan.parallel.mesh import Mesh

Basis = Literal["measured", "from passes measured", "estimated"]
"""Basis of a time: as a whole job, as the sum of parts that were measured, or by a card's rates."""

_H200 = CARDS["h200"]
_PIXELS = 1280 * 720 * 81
# What two ranks lose to exchange at 832x480, and how it falls with the tokens and grows with the ranks; fitted to the
# passes in `measurements` of 1, 2 and 4 ranks. Attention grows with the square of the tokens, what is sent with them.
_HALOS = 0.05  # of a decode for each tile more: 2.81 s whole, 3.25 s in four tiles
_LOST = 0.10
_BY_TOKENS = -0.8
_BY_RANKS = 1.75


@dataclass(frozen=True)
class VideoSeconds:
    """The seconds of one video on an idle service, by stage.

    Attributes:
        encode: of both texts.
        denoise: of all steps.
        decode: of the VAE.
        other: between the stages, and of the files.
        basis: how they are known.
    """

    encode: float
    denoise: float
    decode: float
    other: float
    basis: Basis

    @property
    def total(self) -> float:
        """From the request to the stored file."""
        return self.encode + self.denoise + self.decode + self.other


class Rates:
    """The times of a model on a kind of GPU.

    Args:
        model: the model's shape.
        card: the kind of GPU.
    """

    def __init__(self, model: ModelShape, card: Card) -> None:
        self._model = model
        self.card = card

    def pass_seconds(self, tokens: int, mesh: Mesh, compiled: bool = True, passing_bytes: float = 0) -> float:
        """Return the seconds of a forward pass of one half of guidance.

        Args:
            tokens: of all samples in it.
            mesh: how ranks share it.
            compiled: whether blocks are compiled.
            passing_bytes: weights that come from host memory in each pass, beside the computation.
        """
        found = self._measured(tokens, mesh)
        if found is None:
            ranks = mesh.sequence * mesh.tensor
            flops = step_flops(self._model.expert, tokens, guided=False)
            alone = flops / (self.card.rate_tflops * 1e12)
            found = alone / ranks * (1 + self._lost(tokens, ranks))
        seconds = found if compiled else found * EAGER_FACTOR
        return max(seconds, passing_bytes / (self.card.host_gbs * 1e9))

    def step_seconds(
        self, tokens: int, guided: bool, mesh: Mesh, compiled: bool = True, passing_bytes: float = 0
    ) -> float:
        """Return the seconds of a denoising step of one sample in a job; arguments as for `pass_seconds`."""
        passes = 2 if guided and mesh.guidance == 1 else 1
        return passes * JOB_FACTOR * self.pass_seconds(tokens, mesh, compiled, passing_bytes)

    def encode_seconds(self, guided: bool = True, cpus: float = 0) -> float:
        """Return the seconds in which the texts of a request are encoded, on a GPU, or on so many CPU cores."""
        flops = encode_flops(self._model.text, 2 if guided else 1)
        rate = ENCODE_TFLOPS_PER_CPU * cpus if cpus else ENCODE_TFLOPS * self._slower
        return flops / (rate * 1e12)

    def decode_seconds(self, latent_shape: tuple[int, int, int], devices: int = 1, dtype: str = "float32") -> float:
        """Return the seconds of a decode on so many GPUs.

        Args:
            latent_shape: frames, height and width of the latents.
            devices: GPUs that share each picture; with two, halos are 8 % of the work.
            dtype: of the VAE.
        """
        share = 1.0 if devices == 1 else 1.08 / devices
        return share * decode_flops(self._model.vae, latent_shape) / (DECODE_TFLOPS[dtype] * self._slower * 1e12)

    def video_seconds(
        self,
        params: Params,
        mesh: Mesh,
        *,
        compiled: bool = True,
        passing_bytes: float = 0,
        decoder_devices: int = 1,
        decoder_tiles: int = 1,
        vae_dtype: str = "float32",
        encoder_cpus: float = 0,
    ) -> VideoSeconds:
        """Return the seconds of a video that is alone on an idle group.

        Args:
            params: the video.
            mesh: of the group.
            compiled: whether blocks are compiled.
            passing_bytes: weights that come from host memory in each pass.
            decoder_devices: GPUs that share a decode.
            decoder_tiles: parts into which each of them cuts its part of a picture.
            vae_dtype: dtype of the VAE.
            encoder_cpus: cores of the text encoder; 0 is a GPU.
        """
        tokens = latent_tokens(self._model.expert, params.latent_shape)
        step = self.step_seconds(tokens, params.guided, mesh, compiled, passing_bytes)
        found = VideoSeconds(
            encode=self.encode_seconds(params.guided, encoder_cpus),
            denoise=params.num_inference_steps * step,
            decode=self.decode_seconds(params.latent_shape, decoder_devices, vae_dtype)
            * (1 + _HALOS * (decoder_tiles - 1)),
            other=OTHER_S[0] + OTHER_S[1] * params.width * params.height * params.num_frames / _PIXELS,
            basis=self._basis(tokens, mesh) if compiled and not passing_bytes else "estimated",
        )
        plain = params.guided and params.num_inference_steps == 40 and compiled and not passing_bytes
        whole = self._job(tokens, mesh) if plain else None
        if whole is None:
            return found
        # Of the whole job that was measured, what the other stages take is not known as well as the sum.
        denoise = whole - self.encode_seconds() - found.decode - found.other
        return replace(found, denoise=denoise, basis=found.basis if encoder_cpus else "measured")

    @property
    def _slower(self) -> float:
        """The card's rate over that of an H200, on which the other stages were measured."""
        return self.card.rate_tflops / _H200.rate_tflops

    def _basis(self, tokens: int, mesh: Mesh) -> Basis:
        return "estimated" if self._measured(tokens, mesh) is None else "from passes measured"

    def _measured(self, tokens: int, mesh: Mesh) -> float | None:
        if not self._model.is_a14b:
            return None
        wanted = (self.card.name, mesh.sequence, mesh.tensor, tokens)
        passes = (one.seconds for one in PASSES if (one.card, one.sequence, one.tensor, one.tokens) == wanted)
        return next(passes, None)

    def _job(self, tokens: int, mesh: Mesh) -> float | None:
        if not self._model.is_a14b:
            return None
        wanted = (self.card.name, mesh.guidance, mesh.sequence, mesh.tensor, tokens)
        jobs = (j.seconds for j in JOBS if (j.card, j.guidance, j.sequence, j.tensor, j.tokens) == wanted)
        return next(jobs, None)

    def _lost(self, tokens: int, ranks: int) -> float:
        """Return what ranks lose to exchange, as a share of their part of the computation."""
        if ranks == 1:
            return 0.0
        link = (_H200.link_gbs / self.card.link_gbs) * (self.card.rate_tflops / _H200.rate_tflops)
        return _LOST * (tokens / AT_480P) ** _BY_TOKENS * (ranks / 2) ** _BY_RANKS * link


def videos_per_hour(groups: int, seconds: float) -> float:
    """Return the videos that so many groups make in an hour, one after the other."""
    return groups * 3600 / seconds if seconds else math.inf
