"""The JSON configurations of a model folder. A field with a value that is not supported is refused. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve_app.errors import CheckpointError

_EXPECTED = {
    "none_required": "null",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "string_type": "text",
}


class Component(BaseModel):
    """A configuration file. Missing fields have the libraries' defaults, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)

    quantization_config: None = None
    """Null: quantised weights have other names, types and meanings."""


C = TypeVar("C", bound=BaseModel)


def parse_component(kind: type[C], content: dict[str, Any], path: Path) -> C:
    """Return the content of a configuration file as an instance of `kind`.

    Raises:
        CheckpointError: a field has a value that is not supported; the message names file, field and value.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        if not field or first["type"] == "value_error":
            raise CheckpointError(f"{path}: {first['msg'].removeprefix('Value error, ')}") from None
        if first["type"] == "missing":
            raise CheckpointError(f"{path}: lacks {field}") from None
        wanted = _EXPECTED.get(first["type"]) or first.get("ctx", {}).get("expected")
        wanted = wanted or first["msg"].removeprefix("Input should be ")
        wanted = {"True": "true", "False": "false"}.get(wanted, wanted)
        raise CheckpointError(f"{path}: {field} is {shorten(first['input'])}, expected {wanted}") from None


class IndexConfig(Component):
    """`model_index.json`, without the components that it lists."""

    model_config = ConfigDict(**Component.model_config, populate_by_name=True)

    pipeline: Literal["WanPipeline"] = Field("WanPipeline", alias="_class_name")
    boundary_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    expand_timesteps: Literal[False] = False


class SchedulerConfig(Component):
    """`scheduler/scheduler_config.json`: diffusers' UniPCMultistepScheduler, which samples a flow.

    Fields that change the samples must have the values with which Wan was trained, and which give no NaN. The fields
    after the gap have no effect then.
    """

    prediction_type: Literal["flow_prediction"]
    use_flow_sigmas: Literal[True]
    flow_shift: Annotated[float, Field(gt=0)] = 1.0
    num_train_timesteps: Annotated[int, Field(ge=10, le=1 << 20)] = 1000
    solver_order: Annotated[int, Field(ge=1, le=3)] = 2
    solver_type: Literal["bh2"] = "bh2"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    disable_corrector: list[int] = []
    lower_order_final: Literal[True] = True
    predict_x0: Literal[True] = True
    thresholding: Literal[False] = False
    use_karras_sigmas: Literal[False] = False
    use_exponential_sigmas: Literal[False] = False
    use_beta_sigmas: Literal[False] = False
    use_dynamic_shifting: Literal[False] = False
    shift_terminal: None = None
    solver_p: None = None
    trained_betas: None = None

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    rescale_betas_zero_snr: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    sigma_min: float | None = None
    sigma_max: float | None = None
    steps_offset: int = 0
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Refuse fields of a newer scheduler, unless they are turned off."""
        for name, value in content.items():
            off = value is None or value is False
            if name not in cls.model_fields and not name.startswith("_") and not off:
                raise ValueError(f"{name} is {shorten(value)}, a field that is not understood")
        return content


def shorten(value: Any) -> str:
    """Return a value as JSON, cut to 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
