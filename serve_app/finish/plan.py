"""The plan of a video's finishing: `Finish`, its steps, and the format of the video that comes out.

Imports pydantic only, so that requests and options can be made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FrameStep = Literal["interpolate", "upscale"]
"""A step that changes frames. Its place in the order matters."""
Step = Literal["interpolate", "upscale", "encode", "label"]
FRAME_STEPS: tuple[FrameStep, ...] = ("interpolate", "upscale")
MAX_FPS = 120
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


@dataclass(frozen=True)
class VideoFormat:
    """Size and length of a video.

    Attributes:
        width: in pixels.
        height: in pixels.
        fps: frames per second.
        num_frames: number of frames.
    """

    width: int
    height: int
    fps: int
    num_frames: int


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interpolate(_Part):
    """More frames per second, by motion compensation."""

    fps: int = Field(ge=2, le=MAX_FPS, description="Frames per second of the finished video, e.g. 32, 48 or 60.")
    model: str | None = Field(
        None, pattern=_NAME, description="Name of one of the server's interpolation models. Default is optical flow."
    )


class Upscale(_Part):
    """A larger picture."""

    factor: Literal[2, 4] = Field(description="Factor by which both sides grow, 2 or 4.")
    model: str | None = Field(
        None, pattern=_NAME, description="Name of one of the server's upscaling models. Default is Lanczos."
    )


class Encode(_Part):
    """The files that are made of the frames."""

    codec: Literal["h264", "h265", "av1"] = Field("h264", description="Codec: `h264`, `h265` or `av1`.")
    container: Literal["mp4", "webm"] = Field("mp4", description="Container: `mp4`, or `webm` with `av1`.")
    quality: int = Field(80, ge=1, le=100, description="Quality from 1 to 100. 80 looks like the source.")
    pixel_format: Literal["yuv420p", "yuv420p10le", "yuv444p"] = Field(
        "yuv420p", description="Pixel format. Players of all kinds show `yuv420p`; others need recent ones."
    )
    preview: Literal["webp", "gif"] | None = Field(None, description="Animated preview beside the video.")
    stills: Literal["png", "jpeg"] | None = Field(None, description="All frames as pictures in a zip file.")

    @model_validator(mode="after")
    def _fits(self) -> Encode:
        if self.container == "webm" and self.codec != "av1":
            raise ValueError(f"'codec' is '{self.codec}', expected 'av1' in a webm file")
        if self.codec == "av1" and self.pixel_format == "yuv444p":
            raise ValueError("'pixel_format' is 'yuv444p', expected 'yuv420p' or 'yuv420p10le' with av1")
        return self


class Label(_Part):
    """The marks that say that a machine made the video."""

    metadata: bool = Field(True, description="Whether metadata say that an AI made it.")
    c2pa: bool | None = Field(
        None, description="Whether files carry a signed C2PA manifest. Default is yes if the server has a certificate."
    )
    mark: str | None = Field(
        None, min_length=1, max_length=40, description="Text of a visible mark in the lower right corner."
    )


class Finish(_Part):
    """Steps of finishing, all of them optional. Without any, the video stays as the decoder wrote it.

    `interpolate` and `upscale` run in the order in which they stand in the object, or in `order` where it is given: it
    is for clients whose objects have no order. A mark is drawn after both, then the files are encoded and labelled. As
    soon as one step is asked for, `encode` and `label` run with their defaults.
    """

    interpolate: Interpolate | None = Field(None, description="More frames per second.")
    upscale: Upscale | None = Field(None, description="Larger frames: 2, 4, or an object.")
    encode: Encode | None = Field(None, description="Codec and further files.")
    label: Label | None = Field(None, description="What says that the video is made by AI.")
    order: tuple[FrameStep, ...] = Field(
        (), description="Order of `interpolate` and `upscale`. Default is the order in which they stand."
    )

    @model_validator(mode="before")
    @classmethod
    def _note_order(cls, fields: Any) -> Any:
        """Write down the order of the keys, which a database may not keep."""
        if not isinstance(fields, dict) or fields.get("order"):
            return fields
        return {**fields, "order": [key for key in fields if key in FRAME_STEPS and fields[key] is not None]}

    @field_validator("upscale", mode="before")
    @classmethod
    def _from_factor(cls, value: Any) -> Any:
        return {"factor": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("order", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value  # JSON has no tuples, and requests are read strictly

    @model_validator(mode="after")
    def _check_order(self) -> Finish:
        asked = [step for step in FRAME_STEPS if getattr(self, step) is not None]
        if sorted(self.order) != sorted(asked):
            raise ValueError(f"'order' is {list(self.order)}, expected each of {asked} once")
        return self

    @classmethod
    def fields(cls, path: Sequence[Any]) -> list[str]:
        """Return the names of the fields of a plan, or of the part of it that `path` leads to."""
        part: type[BaseModel] = cls
        for name in path:
            part = get_args(part.model_fields[name].annotation)[0]  # `Encode | None`
        return [*part.model_fields]

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps that will run, in their order. Empty if none is asked for."""
        if not self.order and self.encode is None and self.label is None:
            return ()
        return (*self.order, "encode", "label")

    def result(self, source: VideoFormat) -> VideoFormat:
        """Return the format of the finished video.

        Raises:
            ValueError: `interpolate.fps` is below the fps of the source.
        """
        for step in self.order:
            if step == "interpolate":
                source = _faster(source, self.interpolate.fps)  # type: ignore[union-attr]
            else:
                factor = self.upscale.factor  # type: ignore[union-attr]
                source = replace(source, width=source.width * factor, height=source.height * factor)
        return source


def _faster(source: VideoFormat, fps: int) -> VideoFormat:
    if fps < source.fps:
        raise ValueError(f"'interpolate.fps' is {fps}, expected at least the video's own {source.fps}")
    # Both the first and the last frame stay, so that 81 frames at 16 fps become 161 at 32.
    return replace(source, fps=fps, num_frames=(source.num_frames - 1) * fps // source.fps + 1)
