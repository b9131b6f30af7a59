"""The checkpoint: a Wan2.2 folder in the diffusers layout, checked to be complete and consistent.

Reads only JSON, headers and file sizes. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from serve_app.errors import CheckpointError
from serve_app.wan.weights.components import IndexConfig, SchedulerConfig, parse_component
from serve_app.wan.weights.files import read_json, read_tensors, weight_files
from serve_app.wan.weights.tensors import ExpertConfig, TextConfig, VaeConfig
from serve_app.wan.weights.tokenizer import MAX_TOKENS, tokenizer_files, vocabulary_size

__all__ = ["MAX_TOKENS", "Checkpoint", "Expert"]

Expert = Literal["transformer", "transformer_2"]

_CLASSES = {
    "transformer": "WanTransformer3DModel",
    "transformer_2": "WanTransformer3DModel",
    "text_encoder": "UMT5EncoderModel",
    "vae": "AutoencoderKLWan",
    "scheduler": "UniPCMultistepScheduler",
}
C = TypeVar("C", ExpertConfig, TextConfig, VaeConfig)

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Pixels of a side, and frames after the first, that one position of an expert stands for.
_PIXELS = 16
_FRAMES = 4


class Checkpoint:
    """A checked model folder.

    Args:
        folder: contains `model_index.json`, `transformer/`, `transformer_2/`, `text_encoder/`, `tokenizer/`, `vae/` and
            `scheduler/`. A folder with one expert only (Wan2.1) works as well.
        random: take only names and shapes of the weights, and draw the values at random.

    Attributes:
        boundary_ratio: the first expert denoises timesteps of at least this share of the training timesteps. None if it
            denoises all of them, because there is no other expert or the folder says so.
        num_train_timesteps: timesteps of the noise schedule, 1000 for Wan.
        flow_shift: the folder's value, which WanPipeline samples with; the server samples with `defaults.flow_shift`.
        scheduler_config, vae_config: the components' configurations as stored.
        text, vae: the configurations of text encoder and VAE, checked.
        revision: twelve hex digits that change with the configurations and the weight files' names and sizes.

    Raises:
        CheckpointError: a file is missing, damaged, or not of the expected kind; a tensor is missing, has another shape
            than the configuration implies, or has no place in the model; or components do not fit together. The message
            names the file.
    """

    def __init__(self, folder: Path, random: bool = False) -> None:
        self.folder = Path(folder)
        self.random = random
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder}: is not a folder, expected a Wan2.2 checkpoint in the diffusers layout"
            )
        self._digest = hashlib.sha256()
        where = self.folder / "model_index.json"
        content = self._read_json(where.name)
        index = parse_component(IndexConfig, content, where)
        present = self._listed_components(where, content)
        self.has_two_experts = "transformer_2" in present
        self.boundary_ratio = index.boundary_ratio if self.has_two_experts else None
        self._experts = {name: self._component(name, "config.json") for name in self.experts}
        self.scheduler_config = self._component("scheduler", "scheduler_config.json")
        scheduler = parse_component(
            SchedulerConfig, self.scheduler_config, self.folder / "scheduler" / "scheduler_config.json"
        )
        self.num_train_timesteps = scheduler.num_train_timesteps
        self.flow_shift = scheduler.flow_shift
        self.vae_config = self._component("vae", "config.json")
        text_config = self._component("text_encoder", "config.json")
        self._configs = {name: self._parse(ExpertConfig, name, self._experts[name]) for name in self.experts}
        self.vae = vae = self._parse(VaeConfig, "vae", self.vae_config)
        self.text = text = self._parse(TextConfig, "text_encoder", text_config)
        self._check_components_match(vae, text)
        self._check_tokenizer(text)
        for name, expert in self._configs.items():
            self._check_weights(name, "diffusion_pytorch_model", expert)
        self._check_weights("vae", "diffusion_pytorch_model", vae)
        self._check_weights("text_encoder", "model", text)
        self.revision = self._digest.hexdigest()[:12]

    @property
    def experts(self) -> tuple[Expert, ...]:
        """Names of the experts in the folder, the high-noise expert first."""
        return ("transformer", "transformer_2") if self.has_two_experts else ("transformer",)

    @property
    def side(self) -> int:
        """Longest side of a video in pixels that the experts have positions for."""
        return _PIXELS * min(expert.rope_max_seq_len for expert in self._configs.values())

    @property
    def frames(self) -> int:
        """Length of the longest video in frames that the experts have positions for."""
        return _FRAMES * (min(expert.rope_max_seq_len for expert in self._configs.values()) - 1) + 1

    @cached_property
    def experts_revision(self) -> str:
        """Twelve hex digits that change with what the experts' shards are made from, and with nothing else.

        These are the names and shapes of the experts' tensors, and the names and sizes of their files.
        """
        digest = hashlib.sha256()
        for name, expert in self._configs.items():
            digest.update(f"{name} {sorted(expert.tensors().items())}\n".encode())
            for file in weight_files(self.folder / name, "diffusion_pytorch_model"):
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        return digest.hexdigest()[:12]

    def expert_config(self, expert: Expert) -> dict[str, Any]:
        """Return the configuration of an expert, as stored.

        Raises:
            CheckpointError: the folder has no such expert.
        """
        if expert not in self._experts:
            raise CheckpointError(f"{self.folder / expert}: is not part of this checkpoint, it has one expert only")
        return self._experts[expert]

    def expert_shape(self, expert: Expert) -> ExpertConfig:
        """Return the checked configuration of an expert, whose `tensors` its files' headers were found to have."""
        return self._configs[expert]

    def _read_json(self, name: str) -> dict[str, Any]:
        content = read_json(self.folder / name)
        self._digest.update(f"{name}\n{json.dumps(content, sort_keys=True)}\n".encode())
        return content

    def _listed_components(self, where: Path, index: dict[str, Any]) -> set[str]:
        """Return the components that the index lists as `[library, class]`, after checking their classes."""
        present = {name for name, kind in index.items() if isinstance(kind, list) and kind and kind[0]}
        for name in ("transformer", "text_encoder", "tokenizer", "vae", "scheduler"):
            if name not in present:
                raise CheckpointError(f"{where}: lacks the component {name!r}")
        for name in sorted(present):
            kind, expected = index[name][-1], _CLASSES.get(name)
            if name != "tokenizer" and kind != expected:
                raise CheckpointError(
                    f"{where}: the component {name!r} is of class {kind!r}, expected "
                    + (repr(expected) if expected else f"none but {', '.join((*_CLASSES, 'tokenizer'))}")
                )
        return present

    def _component(self, name: str, file: str) -> dict[str, Any]:
        config = self._read_json(f"{name}/{file}")
        architectures = config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else None
        found = config.get("_class_name") or first
        if found != _CLASSES[name]:
            raise CheckpointError(f"{self.folder / name / file}: is of class {found!r}, expected {_CLASSES[name]!r}")
        return config

    def _parse(self, kind: type[C], name: str, content: dict[str, Any]) -> C:
        return parse_component(kind, content, self.folder / name / "config.json")

    def _check_components_match(self, vae: VaeConfig, text: TextConfig) -> None:
        for name, expert in self._configs.items():
            for field, found, other, expected in (
                ("in_channels", expert.in_channels, "z_dim of the vae", vae.z_dim),
                ("out_channels", expert.out_channels or expert.in_channels, "z_dim of the vae", vae.z_dim),
                ("text_dim", expert.text_dim, "d_model of the text_encoder", text.d_model),
            ):
                if found != expected:
                    path = self.folder / name / "config.json"
                    raise CheckpointError(f"{path}: {field} is {found}, expected {expected}, the {other}")

    def _check_tokenizer(self, text: TextConfig) -> None:
        folder = self.folder / "tokenizer"
        self._read_json("tokenizer/tokenizer_config.json")
        files = tokenizer_files(folder)
        for file in files:
            size = vocabulary_size(file)
            if size > text.vocab_size:
                raise CheckpointError(
                    f"{file}: has {size} tokens, expected at most {text.vocab_size}, the vocab_size of the text_encoder"
                )
        self._digest_sizes(files)

    def _check_weights(self, name: str, stem: str, config: ExpertConfig | TextConfig | VaeConfig) -> None:
        """Check that a component's files hold the tensors that its configuration implies, and no others."""
        folder = self.folder / name
        found, expected = read_tensors(folder, stem), config.tensors()
        files = weight_files(folder, stem)
        self._digest_sizes(files)
        for other, known in config.ALIASES.items():
            if other in found:
                expected[other] = expected[known]
                if known not in found:
                    del expected[known]
        missing = [tensor for tensor in expected if tensor not in found]
        if missing:
            where = files[0] if len(files) == 1 else folder / f"{stem}.safetensors.index.json"
            raise CheckpointError(
                f"{where}: the tensor {missing[0]!r} is missing, expected by config.json{_and_more(missing)}"
            )
        for tensor, shape in expected.items():
            held = found[tensor]
            if held.shape != shape:
                raise CheckpointError(f"{held.file}: the tensor {tensor!r} has shape {held.shape}, expected {shape}")
            if held.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{held.file}: the tensor {tensor!r} is of type {held.dtype}, expected one of {', '.join(_FLOATS)}"
                )
        left = [tensor for tensor in found if tensor not in expected and not config.is_ignored(tensor)]
        if left:
            file = found[left[0]].file
            raise CheckpointError(f"{file}: the tensor {left[0]!r} is not expected by config.json{_and_more(left)}")

    def _digest_sizes(self, files: list[Path]) -> None:
        for file in files:
            self._digest.update(f"{file.relative_to(self.folder)} {file.stat().st_size}\n".encode())


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
