"""A Wan2.2 folder in the diffusers layout: what is in it, and whether all of it is there.

Reads JSON and file sizes only; weights are read by who needs them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from serve_app.errors import CheckpointError

if TYPE_CHECKING:
    from serve_app.wan.weights import Weights

Expert = Literal["transformer", "transformer_2"]

MAX_TOKENS = 512
"""Text tokens that an expert reads; shorter texts are padded with zeros."""

_CLASSES = {
    "transformer": "WanTransformer3DModel",
    "transformer_2": "WanTransformer3DModel",
    "text_encoder": "UMT5EncoderModel",
    "vae": "AutoencoderKLWan",
    "scheduler": "UniPCMultistepScheduler",
}
_TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer.model")
_VAE_STRIDES = {"scale_factor_temporal": 4, "scale_factor_spatial": 8}


class Checkpoint:
    """A checked model folder.

    Args:
        folder: holds `model_index.json`, `transformer/`, `transformer_2/`, `text_encoder/`, `tokenizer/`, `vae/` and
            `scheduler/`. A folder with one expert only (Wan2.1) works as well.
        random: take names and shapes of the weights alone, and draw the values.

    Attributes:
        boundary_ratio: share of the training timesteps from which on the first expert denoises, None with one expert.
        num_train_timesteps: of the noise schedule, 1000 for Wan.
        scheduler_config, vae_config: the components' configurations as stored.
        revision: twelve hex digits that change with the configurations and the weight files' names and sizes.

    Raises:
        CheckpointError: a file is missing or not of the expected kind; the message names it.
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
        index = self._json(where.name)
        present = {name for name, kind in index.items() if isinstance(kind, list) and kind and kind[0]}
        for name in ("transformer", "text_encoder", "tokenizer", "vae", "scheduler"):
            if name not in present:
                raise CheckpointError(f"{where}: lacks the component {name!r}")
        if index.get("expand_timesteps"):
            raise CheckpointError(f"{where}: expand_timesteps is true, expected a text-to-video model without it")
        self.has_two_experts = "transformer_2" in present
        self.boundary_ratio: float | None = index.get("boundary_ratio") if self.has_two_experts else None
        if self.has_two_experts and self.boundary_ratio is None:
            raise CheckpointError(f"{where}: boundary_ratio is missing, expected one since there are two experts")
        self._experts = {name: self._expert(name) for name in self.experts}
        self.scheduler_config = self._component("scheduler", "scheduler_config.json")
        self.num_train_timesteps = int(self.scheduler_config.get("num_train_timesteps", 1000))
        self.vae_config = self._component("vae", "config.json")
        for key, value in _VAE_STRIDES.items():
            if self.vae_config.get(key, value) != value:
                raise CheckpointError(
                    f"{self.folder / 'vae' / 'config.json'}: {key} is {self.vae_config[key]}, expected {value}"
                )
        self._component("text_encoder", "config.json")
        self._tokenizer()
        for name in (*self.experts, "vae"):
            self._note_sizes(weight_files(self.folder / name, "diffusion_pytorch_model"))
        self._note_sizes(weight_files(self.folder / "text_encoder", "model"))
        self.revision = self._digest.hexdigest()[:12]

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The experts that the folder holds, the high-noise one first."""
        return ("transformer", "transformer_2") if self.has_two_experts else ("transformer",)

    def expert_config(self, expert: Expert) -> dict[str, Any]:
        """The configuration of an expert, as stored.

        Raises:
            CheckpointError: the folder has no such expert.
        """
        if expert not in self._experts:
            raise CheckpointError(f"{self.folder / expert}: is not part of this checkpoint, it has one expert only")
        return self._experts[expert]

    def weights(self, component: str) -> Weights:
        """A reader of the weights of an expert or the VAE."""
        from serve_app.wan.weights import Weights  # only now: who checks a folder needs no torch

        return Weights(self.folder / component)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            text = path.read_text()
            content = json.loads(text)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: is missing, expected a Wan2.2 checkpoint in the diffusers layout") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected an object")
        self._digest.update(f"{name}\n{json.dumps(content, sort_keys=True)}\n".encode())
        return content

    def _component(self, name: str, file: str) -> dict[str, Any]:
        config = self._json(f"{name}/{file}")
        found = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
        if found != _CLASSES[name]:
            raise CheckpointError(f"{self.folder / name / file}: is of class {found!r}, expected {_CLASSES[name]!r}")
        return config

    def _expert(self, name: Expert) -> dict[str, Any]:
        config = self._component(name, "config.json")
        for key in ("image_dim", "added_kv_proj_dim"):
            if config.get(key) is not None:
                raise CheckpointError(
                    f"{self.folder / name / 'config.json'}: {key} is {config[key]}, expected null (text to video only)"
                )
        return config

    def _tokenizer(self) -> None:
        folder = self.folder / "tokenizer"
        self._json("tokenizer/tokenizer_config.json")
        files = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
        if not files:
            raise CheckpointError(f"{folder / _TOKENIZERS[0]}: is missing, expected one of {', '.join(_TOKENIZERS)}")
        self._note_sizes(files)

    def _note_sizes(self, files: list[Path]) -> None:
        for file in files:
            self._digest.update(f"{file.relative_to(self.folder)} {file.stat().st_size}\n".encode())


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of one component.

    Args:
        folder: of the component, e.g. `<checkpoint>/transformer`.
        stem: `diffusion_pytorch_model` (diffusers) or `model` (transformers).

    Raises:
        CheckpointError: a file is missing, or the index is not readable.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise CheckpointError(f"{index}: is not a safetensors index, expected JSON with a `weight_map`") from None
        files = [folder / name for name in names]
    else:
        files = [folder / f"{stem}.safetensors"]
    for file in files:
        if not file.is_file():
            reason = f"named by {index.name}" if index.is_file() else f"or {index.name}"
            raise CheckpointError(f"{file}: is missing, expected the weights of `{folder.name}` there ({reason})")
    return files
