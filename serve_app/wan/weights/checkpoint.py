"""A Wan2.2 folder in the diffusers layout: what is in it, and whether all of it is there and fits together.

Reads JSON, headers and file sizes only; weights are read by who needs them. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from serve_app.errors import CheckpointError
from serve_app.wan.weights.components import IndexConfig, SchedulerConfig, understand
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
# Pixels of a side for one position of an expert, and frames for one but the first: what a latent stands for, patched.
_PIXELS = 16
_FRAMES = 4


class Checkpoint:
    """A checked model folder.

    Args:
        folder: holds `model_index.json`, `transformer/`, `transformer_2/`, `text_encoder/`, `tokenizer/`, `vae/` and
            `scheduler/`. A folder with one expert only (Wan2.1) works as well.
        random: take names and shapes of the weights alone, and draw the values.

    Attributes:
        boundary_ratio: share of the training timesteps from which on the first expert denoises; None where it denoises
            alone, as with one expert, or where the folder says so.
        num_train_timesteps: of the noise schedule, 1000 for Wan.
        flow_shift: the folder's, which WanPipeline samples with; here `defaults.flow_shift` counts.
        scheduler_config, vae_config: the components' configurations as stored.
        revision: twelve hex digits that change with the configurations and the weight files' names and sizes.

    Raises:
        CheckpointError: a file is missing, damaged, or not of the expected kind; a tensor that a configuration asks for
            is missing or of another shape, or one is there that it does not ask for; or components do not fit together.
            The message names the file.
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
        content = self._json(where.name)
        index = understand(IndexConfig, content, where)
        present = self._present(where, content)
        self.has_two_experts = "transformer_2" in present
        self.boundary_ratio = index.boundary_ratio if self.has_two_experts else None
        self._experts = {name: self._component(name, "config.json") for name in self.experts}
        self.scheduler_config = self._component("scheduler", "scheduler_config.json")
        scheduler = understand(
            SchedulerConfig, self.scheduler_config, self.folder / "scheduler" / "scheduler_config.json"
        )
        self.num_train_timesteps = scheduler.num_train_timesteps
        self.flow_shift = scheduler.flow_shift
        self.vae_config = self._component("vae", "config.json")
        text_config = self._component("text_encoder", "config.json")
        self._understood = {name: self._understand(ExpertConfig, name, self._experts[name]) for name in self.experts}
        vae = self._understand(VaeConfig, "vae", self.vae_config)
        text = self._understand(TextConfig, "text_encoder", text_config)
        self._fit_together(vae, text)
        self._tokenizer(text)
        for name, expert in self._understood.items():
            self._weights(name, "diffusion_pytorch_model", expert)
        self._weights("vae", "diffusion_pytorch_model", vae)
        self._weights("text_encoder", "model", text)
        self.revision = self._digest.hexdigest()[:12]

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The experts that the folder holds, the high-noise one first."""
        return ("transformer", "transformer_2") if self.has_two_experts else ("transformer",)

    @property
    def side(self) -> int:
        """Pixels of the longest side that the experts have positions for."""
        return _PIXELS * min(expert.rope_max_seq_len for expert in self._understood.values())

    @property
    def frames(self) -> int:
        """Frames of the longest video that the experts have positions for."""
        return _FRAMES * (min(expert.rope_max_seq_len for expert in self._understood.values()) - 1) + 1

    @cached_property
    def experts_revision(self) -> str:
        """Twelve hex digits that change with all that the shards of the experts are made from and with nothing else:
        their tensors' names and shapes, and the names and sizes of their files."""
        digest = hashlib.sha256()
        for name, expert in self._understood.items():
            digest.update(f"{name} {sorted(expert.tensors().items())}\n".encode())
            for file in weight_files(self.folder / name, "diffusion_pytorch_model"):
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        return digest.hexdigest()[:12]

    def expert_config(self, expert: Expert) -> dict[str, Any]:
        """The configuration of an expert, as stored.

        Raises:
            CheckpointError: the folder has no such expert.
        """
        if expert not in self._experts:
            raise CheckpointError(f"{self.folder / expert}: is not part of this checkpoint, it has one expert only")
        return self._experts[expert]

    def _json(self, name: str) -> dict[str, Any]:
        content = read_json(self.folder / name)
        self._digest.update(f"{name}\n{json.dumps(content, sort_keys=True)}\n".encode())
        return content

    def _present(self, where: Path, index: dict[str, Any]) -> set[str]:
        """Return the components that the index lists, which are `[library, class]`."""
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
        config = self._json(f"{name}/{file}")
        architectures = config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else None
        found = config.get("_class_name") or first
        if found != _CLASSES[name]:
            raise CheckpointError(f"{self.folder / name / file}: is of class {found!r}, expected {_CLASSES[name]!r}")
        return config

    def _understand(self, kind: type[C], name: str, content: dict[str, Any]) -> C:
        return understand(kind, content, self.folder / name / "config.json")

    def _fit_together(self, vae: VaeConfig, text: TextConfig) -> None:
        for name, expert in self._understood.items():
            for field, found, other, expected in (
                ("in_channels", expert.in_channels, "z_dim of the vae", vae.z_dim),
                ("out_channels", expert.out_channels or expert.in_channels, "z_dim of the vae", vae.z_dim),
                ("text_dim", expert.text_dim, "d_model of the text_encoder", text.d_model),
            ):
                if found != expected:
                    path = self.folder / name / "config.json"
                    raise CheckpointError(f"{path}: {field} is {found}, expected {expected}, the {other}")

    def _tokenizer(self, text: TextConfig) -> None:
        folder = self.folder / "tokenizer"
        self._json("tokenizer/tokenizer_config.json")
        files = tokenizer_files(folder)
        for file in files:
            size = vocabulary_size(file)
            if size > text.vocab_size:
                raise CheckpointError(
                    f"{file}: has {size} tokens, expected at most {text.vocab_size}, the vocab_size of the text_encoder"
                )
        self._note_sizes(files)

    def _weights(self, name: str, stem: str, config: ExpertConfig | TextConfig | VaeConfig) -> None:
        """Compare what the files hold with what the configuration asks for."""
        folder = self.folder / name
        found, expected = read_tensors(folder, stem), config.tensors()
        files = weight_files(folder, stem)
        self._note_sizes(files)
        for other, known in config.ALIASES.items():
            if other in found:
                expected[other] = expected[known]
                if known not in found:
                    del expected[known]
        missing = [tensor for tensor in expected if tensor not in found]
        if missing:
            where = files[0] if len(files) == 1 else folder / f"{stem}.safetensors.index.json"
            raise CheckpointError(
                f"{where}: the tensor {missing[0]!r} is missing, expected by config.json{_more(missing)}"
            )
        for tensor, shape in expected.items():
            held = found[tensor]
            if held.shape != shape:
                raise CheckpointError(f"{held.file}: the tensor {tensor!r} has shape {held.shape}, expected {shape}")
            if held.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{held.file}: the tensor {tensor!r} is of type {held.dtype}, expected one of {', '.join(_FLOATS)}"
                )
        left = [tensor for tensor in found if tensor not in expected and not config.spare(tensor)]
        if left:
            file = found[left[0]].file
            raise CheckpointError(f"{file}: the tensor {left[0]!r} is not expected by config.json{_more(left)}")

    def _note_sizes(self, files: list[Path]) -> None:
        for file in files:
            self._digest.update(f"{file.relative_to(self.folder)} {file.stat().st_size}\n".encode())


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
