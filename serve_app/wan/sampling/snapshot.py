"""The snapshot: a sample's state as bytes, from which another process continues it to the same bits.

The bytes are one safetensors file, so that reading them runs no code. Knows neither where snapshots are kept nor when
they are taken.
"""

from __future__ import annotations

import hashlib
import json

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from serve_app.errors import StateError
from serve_app.request import Params
from serve_app.wan.sampling.sample import Sample
from serve_app.wan.text import Embedding
from serve_app.wan.weights.checkpoint import MAX_TOKENS, Checkpoint

VERSION = 1
"""Version of the format. It grows whenever tensors or header change; only the current version is read."""

_SCALARS = ("_step_index", "_begin_index", "lower_order_nums", "this_order")
"""Numbers that `UniPCMultistepScheduler` keeps from step to step beside tensors; None until they are first set."""


class _Header(BaseModel):
    """The state without its tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    revision: str
    dtype: str
    name: str
    params: Params
    step: int
    scalars: dict[str, int | None]
    timestep_list: list[int | None]


def to_bytes(sample: Sample, revision: str) -> bytes:
    """Return the state of a sample between two of its steps, before the first or after the last.

    Call it while no step of the sample is running: a step changes the scheduler's history in place. Waits for the GPU.
    The state has no random generator: the noise is drawn once, at the start, and the sampler is deterministic.

    Args:
        sample: is not changed.
        revision: `Checkpoint.revision` of the checkpoint that the sample was started with.

    Returns:
        A safetensors file. Its tensors are `latents` (`[1, channels, frames, height, width]`, float32), `positive` and,
        if guided, `negative` (`[tokens, dim]` in the model's dtype, without the zeros that `pad` adds), and those
        scheduler tensors that are set: `last_sample` and `model_outputs.<slot>`, shaped as the latents. Its metadata
        are `version`, `state` (JSON: the rest of the sample) and `sha256` (of `state` and the tensors). The order of
        the metadata varies, so equal states need not be equal bytes.
    """
    scheduler = sample.scheduler
    tensors = {"latents": sample.latents, "positive": _trim(sample.positive[0])}
    if sample.negative is not None:
        tensors["negative"] = _trim(sample.negative[0])
    if scheduler.last_sample is not None:
        tensors["last_sample"] = scheduler.last_sample
    for slot, output in enumerate(scheduler.model_outputs):
        if output is not None:
            tensors[f"model_outputs.{slot}"] = output
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    state = _Header(
        revision=revision,
        dtype=_dtype_name(sample.positive.dtype),
        name=sample.name,
        params=sample.params,
        step=sample.step,
        scalars={name: getattr(scheduler, name, None) for name in _SCALARS},
        timestep_list=[None if timestep is None else int(timestep) for timestep in scheduler.timestep_list],
    ).model_dump_json()
    return save(tensors, {"version": str(VERSION), "state": state, "sha256": _digest(state, tensors)})


def from_bytes(data: bytes, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Sample:
    """Return a sample that continues where `to_bytes` was called, to the same bits as without interruption.

    Args:
        data: the result of `to_bytes`.
        checkpoint: has the revision that `to_bytes` was given.
        device: device of the model.
        dtype: dtype of the model's activations; must be that of the first steps, since another gives another video.

    Raises:
        StateError: the bytes are damaged, not a sample's state, of another version of the format, of another
            checkpoint or dtype, hold NaN or infinity, or do not fit together.
    """
    tensors, state = _unpack(data)
    header = _parse_header(state)
    _expect("checkpoint revision", header.revision, checkpoint.revision)
    _expect("dtype", header.dtype, _dtype_name(dtype))
    texts = {name: tensors.pop(name) for name in ("positive", "negative") if name in tensors}
    _check_texts(texts, header, checkpoint, dtype)
    embeddings = {name: Embedding(text, text.shape[0], truncated=False) for name, text in texts.items()}
    # Everything that follows from parameters and checkpoint is computed anew. Drawing the noise is wasted work, but it
    # costs only a fraction of a step and saves a second way to create a sample.
    sample = Sample.start(
        header.params, checkpoint, embeddings["positive"], embeddings.get("negative"), device, dtype, header.name
    )
    _check_tensors(tensors, header, sample)
    _check_finite(texts | tensors)
    # Copied, because tensors of safetensors are not aligned like torch's own, and kernels may round by alignment.
    _restore(sample, header, {name: tensor.to(device, copy=True) for name, tensor in tensors.items()})
    return sample


def _unpack(data: bytes) -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors and the JSON of the state, after checking format version and checksum."""
    try:
        tensors = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise StateError(f"saved sample: {len(data)} bytes ({error}), expected a whole safetensors file") from None
    _expect("format version", metadata.get("version"), str(VERSION))
    state = metadata.get("state", "")
    _expect("sha256", metadata.get("sha256"), _digest(state, tensors))
    return tensors, state


def _parse_header(state: str) -> _Header:
    try:
        return _Header.model_validate_json(state)
    except ValidationError as error:  # of a release with other `Params`
        first = error.errors()[0]
        found = ".".join(map(str, first["loc"]))
        raise StateError(f"saved sample: {found}: {first['msg']}, expected the fields of this release") from None


def _check_texts(texts: dict[str, torch.Tensor], header: _Header, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    width = checkpoint.expert_config("transformer")["text_dim"]
    _expect("embeddings", sorted(texts), ["negative", "positive"] if header.params.guided else ["positive"])
    for name, text in texts.items():
        tokens = min(text.shape[0], MAX_TOKENS) if text.ndim else 0
        _expect(name, _dtype_and_shape(text), f"{_dtype_name(dtype)} {[tokens, width]}")


def _check_tensors(tensors: dict[str, torch.Tensor], header: _Header, sample: Sample) -> None:
    """Check that latents and the scheduler's tensors are those of a sample after `header.step` steps."""
    if not 0 <= header.step <= sample.steps:
        raise StateError(f"saved sample: step is {header.step}, expected 0 to {sample.steps}")
    order = len(sample.scheduler.model_outputs)
    filled = [f"model_outputs.{slot}" for slot in range(max(0, order - header.step), order)]
    _expect("tensors", sorted(tensors), [*(["last_sample"] if filled else []), "latents", *filled])
    for name, tensor in tensors.items():
        _expect(name, _dtype_and_shape(tensor), f"float32 {list(sample.latents.shape)}")


def _check_finite(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise StateError(f"saved sample: {name} holds NaN or infinity, expected finite numbers")


def _restore(sample: Sample, header: _Header, tensors: dict[str, torch.Tensor]) -> None:
    """Set the fields of a new sample that change from step to step."""
    scheduler = sample.scheduler
    sample.step = header.step
    sample.latents = tensors["latents"]
    scheduler.last_sample = tensors.get("last_sample")
    scheduler.model_outputs = [tensors.get(f"model_outputs.{slot}") for slot in range(len(scheduler.model_outputs))]
    scheduler.timestep_list = [None if t is None else scheduler.timesteps.new_tensor(t) for t in header.timestep_list]
    for name, value in header.scalars.items():
        setattr(scheduler, name, value)


def _trim(text: torch.Tensor) -> torch.Tensor:
    """Return `[512, dim]` without the rows at the end that `pad` restores: rows of zero bits, since -0.0 is not 0.0."""
    written = text.contiguous().view(torch.uint8).any(dim=1).nonzero()
    return text[: int(written[-1]) + 1 if len(written) else 0]


def _digest(state: str, tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of everything that is restored: a flipped bit in the latents would otherwise go unnoticed."""
    digest = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {_dtype_and_shape(tensor)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dtype_and_shape(tensor: torch.Tensor) -> str:
    return f"{_dtype_name(tensor.dtype)} {list(tensor.shape)}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise StateError(f"saved sample: {what} is {found}, expected {expected}")
