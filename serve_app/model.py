"""The model that a configuration names, and the options that follow from its folder.

Knows neither Ray nor HTTP. Needs no torch, and takes milliseconds.
"""

from __future__ import annotations

from typing import Any

from serve_app.config import Config
from serve_app.errors import CheckpointError, ConfigError
from serve_app.wan.weights.checkpoint import Checkpoint


def open_model(config: Config) -> Checkpoint:
    """Check the folder that `model.path` names, and return it as a checkpoint.

    Raises:
        ConfigError: the folder is not a complete model; the message names option, file and what was expected.
    """
    try:
        return Checkpoint(config.model.folder.absolute())
    except CheckpointError as error:
        raise ConfigError(f"model.path has value {config.model.path!r}: {error}") from None


def makes_videos(file: dict[str, Any]) -> bool:
    """Return whether a YAML file has the application that needs the model; a gateway alone does not."""
    return any(entry.get("import_path") == "serve_app.app:wan" for entry in file["applications"])


def fit(config: Config, checkpoint: Checkpoint) -> Config:
    """Return the configuration with options that the folder decides filled in, and limits lowered to the model's.

    Raises:
        ConfigError: the defaults of a request exceed what the model can do.
    """
    limits, defaults = config.limits, config.defaults
    for name, value, most in (
        ("width", defaults.width, checkpoint.side),
        ("height", defaults.height, checkpoint.side),
        ("num_frames", defaults.num_frames, checkpoint.frames),
    ):
        if value > most:
            raise ConfigError(
                f"defaults.{name} has value {value}, expected at most {most}, the positions of {checkpoint.folder}"
            )
    sides = {"side": min(limits.side, checkpoint.side), "num_frames": min(limits.num_frames, checkpoint.frames)}
    changes: dict[str, Any] = {"limits": limits.model_copy(update=sides)}
    if defaults.boundary_ratio is None:
        changes["defaults"] = defaults.model_copy(update={"boundary_ratio": checkpoint.boundary_ratio})
    return config.model_copy(update=changes)


def departures(config: Config, checkpoint: Checkpoint) -> list[str]:
    """Return a line for each sampling value in which the configuration departs from the folder."""
    index = checkpoint.folder / "model_index.json"
    scheduler = checkpoint.folder / "scheduler" / "scheduler_config.json"
    shift, ratio = config.defaults.flow_shift, config.defaults.boundary_ratio
    lines = []
    if shift != checkpoint.flow_shift:
        lines.append(f"{scheduler}: flow_shift is {checkpoint.flow_shift:g}; defaults.flow_shift, {shift:g}, counts")
    if checkpoint.has_two_experts and ratio is not None and ratio != checkpoint.boundary_ratio:
        found = "null" if checkpoint.boundary_ratio is None else f"{checkpoint.boundary_ratio:g}"
        lines.append(f"{index}: boundary_ratio is {found}; defaults.boundary_ratio, {ratio:g}, counts")
    if checkpoint.has_two_experts and ratio is None and checkpoint.boundary_ratio is None:
        lines.append(f"{index}: boundary_ratio is null: transformer denoises alone, as in WanPipeline")
    return lines
