"""The base class and the types of all sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator

Device = Literal["auto", "cpu", "cuda"]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of the configuration. Unknown keys are refused, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_booleans_as_numbers(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        # pydantic reads `true` as 1, and YAML reads `yes` and `on` as true.
        made = handler(given)
        for name, value in given.items() if isinstance(given, dict) else ():
            if isinstance(value, bool) and not isinstance(getattr(made, name), bool):
                raise ValueError(f"{name} is {str(value).lower()}, expected a number")  # noqa: TRY004 (pydantic's)
        return made
