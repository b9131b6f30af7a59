"""The one declaration of each field of a request.

Each field of `Parameters`, `Handling` and `Shorthands` is declared here and nowhere else: its type, sentence, range,
default, command line flags and synonyms. `VideoRequest`, `Params`, the option section `defaults`, the API schema, the
range checks, the options of `wan-serve generate`, the suggestions for misspelt names and the reference pages follow
from it. A new parameter is one more field here, and the code of the model that uses it.

Imports only the plan of finishing of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any, Generic, Literal, Never, TypeVar, get_args, get_origin

from pydantic import BaseModel, Field, create_model

from serve_app.finish.plan import Finish

N = TypeVar("N")
"""None if a field may be left out: `int | None`. Never if it has a value: `int | Never` is `int`."""
Priority = Literal["interactive", "standard", "batch"]

# Spatial sides are a multiple of VAE stride 8 x patch 2; frames are one plus a multiple of VAE stride 4.
SIDE_MULTIPLE = 16
FRAME_MULTIPLE = 4
MAX_SEED = 2**63 - 1
# Asks for a seed to be drawn, as elsewhere.
RANDOM_SEED = -1
# A year and a day: a longer time is a typing error, and nobody waits for it.
MAX_DEADLINE_S = 366 * 86400
MAX_DELAY_S = 366 * 86400
# The fixed negative prompt of the Wan2.2 release (wan/configs/shared_config.py there); quality drops without it.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)
_NONE: Any = object()


@dataclass(frozen=True)
class Parameter:
    """A field of a request.

    Attributes:
        meaning: what it does, in a sentence or two.
        default: default of its option in the section `defaults`. `configurable` is False where there is no such option.
        least: smallest value.
        above: bound that every value exceeds.
        most: largest value on any server.
        limit: option of `limits` that is the largest value, or the largest number of characters, on one server.
        step: distance between two values, counted from `least`.
        besides: words for a value outside of the range that is allowed as well.
        note: words for what the range does not say, for the reference.
        flags: flags of `wan-serve generate` beside the one with the field's name; None if it has no flag.
        synonyms: names for it in vLLM-Omni, SGLang, LightX2V, ComfyUI, diffusers and hosted services.
        name: name of the field.
        kind: type of a value, `None` left out.
        nullable: whether None is a value of its own: the model's choice.
    """

    meaning: str
    default: Any = _NONE
    least: float | None = None
    above: float | None = None
    most: float | None = None
    limit: str = ""
    step: int = 1
    besides: str = ""
    note: str = ""
    flags: tuple[str, ...] | None = ()
    synonyms: tuple[str, ...] = ()
    name: str = ""
    kind: Any = str
    nullable: bool = False

    @property
    def configurable(self) -> bool:
        """True if the section `defaults` has an option for it."""
        return self.default is not _NONE

    @property
    def plain(self) -> type:
        """Type that a command line reads: `kind`, or its last one of several, with words as text."""
        last = self.kind if isinstance(self.kind, type) else get_args(self.kind)[-1]
        return last if isinstance(last, type) else type(last)


def parameter(meaning: str, **more: Any) -> Any:
    """Declare a field, as pydantic's `Field` does; see `Parameter` for the arguments."""
    return Parameter(meaning, **more)


class Parameters(BaseModel, Generic[N]):
    """The generation parameters: all that determines a video's pixels, on a given checkpoint."""

    prompt: str = parameter(
        "What the video shows.",
        limit="prompt_chars",
        note="Something must be left of it when spaces, HTML entities and invisible characters are cleaned away.",
        flags=None,
        synonyms=("text", "input", "caption", "description", "text_prompt", "positive_prompt"),
    )
    negative_prompt: str | N = parameter(
        "What the video should not show. The default is the one that Wan2.2 was released with; quality drops without "
        "it.",
        default=WAN_NEGATIVE_PROMPT,
        limit="prompt_chars",
        flags=("--negative",),
        synonyms=("negative", "neg_prompt", "negative_text", "n_prompt"),
    )
    width: int | N = parameter(
        "Width in pixels, a multiple of 16.",
        default=1280,
        least=SIDE_MULTIPLE,
        limit="side",
        step=SIDE_MULTIPLE,
        note="Less where the model has fewer positions. Width x height is at most `limits.pixels`.",
        flags=None,
        synonyms=("w",),
    )
    height: int | N = parameter(
        "Height in pixels, a multiple of 16.",
        default=720,
        least=SIDE_MULTIPLE,
        limit="side",
        step=SIDE_MULTIPLE,
        note="Less where the model has fewer positions. Width x height is at most `limits.pixels`.",
        flags=None,
        synonyms=("h",),
    )
    num_frames: int | N = parameter(
        "Number of frames, 4k+1.",
        default=81,
        least=1,
        limit="num_frames",
        step=FRAME_MULTIPLE,
        flags=("--frames",),
        synonyms=(
            *("frames", "frame_num", "frame_count", "video_length", "target_video_length", "n_frames", "nframes"),
        ),
    )
    fps: int | N = parameter(
        "Frames per second.",
        default=16,
        least=1,
        limit="fps",
        synonyms=("frame_rate", "framerate", "frames_per_second", "target_fps", "video_fps"),
    )
    seed: int | N = parameter(
        "Seed of the noise: the same seed gives the same video. If it is -1 or not given, one is drawn, and returned.",
        least=0,
        most=MAX_SEED,
        besides=f"{RANDOM_SEED} to have one drawn",
        synonyms=("random_seed", "noise_seed", "rng_seed", "generator"),
    )
    num_inference_steps: int | N = parameter(
        "Number of denoising steps.",
        default=40,
        least=1,
        limit="num_inference_steps",
        flags=("--steps",),
        synonyms=(
            *("steps", "num_steps", "n_steps", "infer_steps", "inference_steps"),
            *("sample_steps", "sampling_steps", "denoising_steps"),
        ),
    )
    guidance_scale: float | N = parameter(
        "Guidance scale of the high-noise expert. Classifier-free guidance runs if it is above 1.",
        default=4.0,
        least=0,
        most=100,
        flags=("--guidance",),
        synonyms=(
            *("guidance", "cfg", "cfg_scale", "guide_scale", "sample_guide_scale", "true_cfg_scale"),
            *("guidance_scale_1", "guidance_1", "guidance_high"),
        ),
    )
    guidance_scale_2: float | N = parameter(
        "Guidance scale of the low-noise expert. A request that gives `guidance_scale` alone gives both.",
        default=3.0,
        least=0,
        most=100,
        flags=("--guidance-2",),
        synonyms=("guidance_2", "guidance2", "cfg_2", "cfg_scale_2", "guidance_low"),
    )
    flow_shift: float | N = parameter(
        "Shift of the noise schedule. Higher values spend more steps at high noise. 12 is what Wan2.2's authors "
        "sample with, at all sizes; 3 in the published folder is diffusers' default.",
        default=12.0,
        least=0.01,
        most=100,
        synonyms=("shift", "sample_shift", "timestep_shift", "time_shift"),
    )
    boundary_ratio: float | None = parameter(
        "Share of the training timesteps from which on the high-noise expert denoises. Null is the checkpoint's own, "
        "0.875 for A14B; if that is null too, the first expert does all steps.",
        default=None,
        least=0,
        most=1,
        synonyms=("boundary", "boundary_step", "switch_ratio"),
    )


class Handling(BaseModel):
    """The fields of a request beside the generation parameters.

    They say what is made of the decoded video, how soon it is wanted, and who is told.
    """

    finish: Finish | str | None = parameter(
        'Steps that finish the video after the decode, e.g. `{"interpolate": {"fps": 32}}`, or the name of a profile '
        "of the server.",
        note="Profiles are those of `finisher.profiles`.",
        synonyms=("postprocess", "post_processing", "interpolation", "upscaling", "finisher"),
    )

    model: str | None = parameter(
        "Id of the model. If given, it must be the one that is served.",
        flags=None,
        synonyms=("model_id", "model_name"),
    )
    priority: Priority | None = parameter(
        "Priority class in the queue: `interactive`, `standard` or `batch`, the most urgent first. Default is "
        "`standard`.",
        synonyms=("urgency", "service_tier"),
    )
    deadline_s: float | None = parameter(
        "Seconds from now after which the video is of no use. It then fails as `deadline_exceeded`.",
        above=0,
        most=MAX_DEADLINE_S,
        flags=("--deadline",),
        synonyms=("deadline", "timeout", "timeout_s", "ttl"),
    )
    start_at: float | None = parameter(
        "Earliest start, as a Unix time in seconds. A time that has passed means at once.",
        least=0,
        note="At most 366 days from now, and before the deadline.",
        synonyms=("start", "start_time", "not_before", "scheduled_at"),
    )
    degrade: str | dict[str, str | int] | None = parameter(
        'What the request agrees to under load, e.g. `{"min_size": "832x480", "min_steps": 20}`: a smaller picture '
        "first, then fewer steps, never less than this. `never`: exactly what it asks for.",
        note="Default is what the key allows, which is nothing unless its maker said so.",
        flags=None,
        synonyms=("fallback", "allow_degrade"),
    )
    notify_email: str | None = parameter(
        "Address that gets a mail when the video has ended. It is never shown.",
        note="One address, `name@domain`; refused where `mail` is not set.",
        synonyms=("email", "mail", "notify"),
    )


class Shorthands(BaseModel):
    """OpenAI's words for some of the parameters."""

    size: str | None = parameter(
        "WIDTHxHEIGHT in pixels, e.g. `128x128`; instead of `width` and `height`.",
        synonyms=("resolution", "dimensions", "video_size", "image_size", "target_shape", "aspect_ratio", "ratio"),
    )
    seconds: str | float | None = parameter(
        "Length in seconds, instead of `num_frames`. The nearest 4k+1 frames at `fps` are made.",
        above=0,
        synonyms=("duration", "length", "duration_s", "duration_seconds", "video_seconds", "secs", "num_seconds"),
    )


def declared(model: type[BaseModel]) -> dict[str, Parameter]:
    """Return the parameters that a class of this file declares, by name."""
    found = {}
    for name, field in model.model_fields.items():
        kinds = get_args(field.annotation) if get_origin(field.annotation) is not Literal else ()
        values = [kind for kind in kinds or (field.annotation,) if kind not in (type(None), N)]
        nullable = type(None) in kinds
        found[name] = replace(field.default, name=name, kind=reduce(or_, values), nullable=nullable)
    return found


PARAMETERS = declared(Parameters)
HANDLING = declared(Handling)
SHORTHANDS = declared(Shorthands)
EVERY: dict[str, Parameter] = {**PARAMETERS, **SHORTHANDS, **HANDLING}
"""All fields of a create request, by name."""


def _optional(several: Iterable[Parameter], *, bounded: bool = False) -> dict[str, Any]:
    """Return fields for `create_model` of which all but `prompt` may be left out."""
    fields: dict[str, Any] = {}
    for one in several:
        bounds: dict[str, Any] = {"gt": one.above, "ge": one.least, "le": one.most} if bounded else {}
        required = one.name == "prompt"
        kind = one.kind if required else one.kind | None
        fields[one.name] = (kind, Field(... if required else None, description=one.meaning, **bounds))
    return fields


# The type checker reads the classes above; at run time each derived class has fields of its own.
if TYPE_CHECKING:
    Resolved = Parameters[Never]
    Configured = Parameters[Never]

    class Given(Parameters[None], Handling):
        """The fields of a request. None, or left out, is the default."""

else:
    Resolved = create_model(
        "Resolved",
        **{
            name: (one.kind | None if one.nullable else one.kind, Field(description=one.meaning))
            for name, one in PARAMETERS.items()
        },
    )
    """The parameters of a video, each with its value."""
    Configured = create_model(
        "Configured",
        **{
            name: (
                one.kind | None if one.nullable else one.kind,
                Field(one.default, ge=one.least, le=one.most, description=one.meaning),
            )
            for name, one in PARAMETERS.items()
            if one.configurable
        },
    )
    """The options of the section `defaults`."""
    Given = create_model("Given", **_optional(PARAMETERS.values()), **_optional(HANDLING.values()))
    """The fields of a request. None, or left out, is the default."""

Fields = create_model(
    "Fields",
    **_optional(PARAMETERS.values()),
    **_optional(SHORTHANDS.values()),
    **_optional(HANDLING.values(), bounded=True),
)
"""The fields of a request as OpenAPI shows them. Ranges of parameters are left out: they depend on the server."""
