"""What all sections have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator

Device = Literal["auto", "cpu", "cuda"]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _no_truth_for_a_number(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        # pydantic takes `true` for 1, and YAML takes `yes` and `on` for true.
        made = handler(given)
        for name, value in given.items() if isinstance(given, dict) else ():
            if isinstance(value, bool) and not isinstance(getattr(made, name), bool):
                raise ValueError(f"{name} is {str(value).lower()}, expected a number")  # noqa: TRY004 (pydantic's)
        return made
