"""Suggestions for names that are unknown here: other servers' words for the same thing, and slips of the keyboard."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

# As vLLM-Omni, SGLang, LightX2V, ComfyUI, diffusers and hosted services call it, to what it is called here.
_OTHERS = {
    "prompt": ("text", "input", "caption", "description", "text_prompt", "positive_prompt"),
    "negative_prompt": ("negative", "neg_prompt", "negative_text", "n_prompt"),
    "num_frames": ("frames", "frame_num", "frame_count", "video_length", "target_video_length", "n_frames", "nframes"),
    "num_inference_steps": ("steps", "num_steps", "n_steps", "infer_steps", "inference_steps", "sample_steps",
                            "sampling_steps", "denoising_steps"),
    "guidance_scale": ("guidance", "cfg", "cfg_scale", "guide_scale", "sample_guide_scale", "true_cfg_scale",
                       "guidance_scale_1", "guidance_1", "guidance_high"),
    "guidance_scale_2": ("guidance_2", "guidance2", "cfg_2", "cfg_scale_2", "guidance_low"),
    "flow_shift": ("shift", "sample_shift", "timestep_shift", "time_shift"),
    "boundary_ratio": ("boundary", "boundary_step", "switch_ratio"),
    "seconds": ("duration", "length", "duration_s", "duration_seconds", "video_seconds", "secs", "num_seconds"),
    "fps": ("frame_rate", "framerate", "frames_per_second", "target_fps", "video_fps"),
    "size": ("resolution", "dimensions", "video_size", "image_size", "target_shape", "aspect_ratio", "ratio"),
    "width": ("w",),
    "height": ("h",),
    "seed": ("random_seed", "noise_seed", "rng_seed", "generator"),
    "model": ("model_id", "model_name"),
    "priority": ("urgency", "service_tier"),
    "deadline_s": ("deadline", "timeout", "timeout_s", "ttl"),
    "start_at": ("start", "start_time", "not_before", "scheduled_at"),
    "notify_email": ("email", "mail", "notify"),
}  # fmt: skip
_OURS = {other: name for name, others in _OTHERS.items() for other in others}


def unknown_field(name: str, known: Sequence[str]) -> str:
    """Return the sentence that refuses a field, with the known field that is meant, or all of them."""
    meant = suggestion(name, known)
    if meant is not None:
        return f"Unknown field '{name}', did you mean '{meant}'?"
    return f"Unknown field '{name}', expected one of {', '.join(known)}."


def suggestion(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that somebody most likely means; None if there is none."""
    # `numFrames`, `num-frames` and `NUM_FRAMES` are one name.
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").replace(" ", "_").lower()
    if plain in known:
        return plain
    if (meant := _OURS.get(plain)) in known:
        return meant
    close = get_close_matches(plain, [*known, *_OURS], 1, 0.75)
    found = _OURS.get(close[0], close[0]) if close else None
    return found if found in known else None
