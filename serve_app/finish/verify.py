"""The verification of a file: what it says about how it was made, and whether that can be trusted."""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_app.finish import manifest
from serve_app.finish.label import AI_MADE, read_xmp


@dataclass(frozen=True)
class Verification:
    """The statements of a file about itself.

    Attributes:
        video: container, codec, size, rate and colours, as text by name; empty for a picture.
        parameters: what the video was made from: the comment of the file.
        description: the file's description, for people.
        xmp: fields of its XMP packet.
        c2pa: its signed manifest, see `manifest.read`; None without one.
        c2pa_note: the reason why manifests could not be read; empty otherwise.
    """

    video: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    description: str = ""
    xmp: dict[str, str] = field(default_factory=dict)
    c2pa: dict[str, Any] | None = None
    c2pa_note: str = ""

    @property
    def ai_made(self) -> bool:
        """True if anything in the file says that a machine made it."""
        codes = (self.xmp.get("Iptc4xmpExt:DigitalSourceType"), (self.c2pa or {}).get("source_type"))
        return AI_MADE in codes or self.description.startswith("AI-generated")

    @property
    def changed(self) -> bool:
        """True if a signature shows that the file was changed after it was signed, or cannot be checked."""
        return self.c2pa is not None and self.c2pa["state"] not in ("valid", "trusted")


def verify(path: Path, anchors: Path | None = None) -> Verification:
    """Read what a video or picture says about itself.

    Args:
        path: the file.
        anchors: PEM file with certificates whose signatures are trusted.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no video and no picture.
    """
    with path.open("rb"):  # a file that is not there is an error of its own
        tags, video = _open(path)
    try:
        parameters = json.loads(tags.get("comment", ""))
    except ValueError:
        parameters = {}
    note, signed = "", None
    try:
        signed = manifest.read(path, anchors)
    except manifest.NoManifest:
        pass
    except ImportError as error:
        note = str(error)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        packet = read_xmp(content)
    return Verification(
        video,
        parameters if isinstance(parameters, dict) else {},
        tags.get("description", "") or ("" if parameters else tags.get("comment", "")),
        packet,
        signed,
        note,
    )


def _open(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the tags of a file with lower-case names, and what its video is."""
    if path.suffix.lower() in (".gif", ".webp", ".png", ".jpg", ".jpeg"):
        return _open_picture(path), {}
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
            stream = container.streams.video[0]
            context = stream.codec_context
            video = {
                "container": container.format.name,
                "codec": f"{context.name} ({context.codec_tag.strip(chr(0))})",
                "size": f"{context.width}x{context.height}",
                "fps": str(stream.average_rate),
                "frames": str(stream.frames or "not said"),
                "pixel format": str(context.pix_fmt),
                "colours": _colours(context),
            }
    except (FFmpegError, IndexError):
        raise ValueError(f"{path} is no video, expected mp4 or webm") from None
    return tags, video


def _open_picture(path: Path) -> dict[str, str]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            comment = image.info.get("comment", "")
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no picture, expected the one that its name says") from None
    return {"comment": comment.decode(errors="replace") if isinstance(comment, bytes) else str(comment)}


def _colours(context: Any) -> str:
    """Return matrix and range of a video, in words where they are BT.709's."""
    matrix = "bt709" if context.colorspace == 1 else f"matrix {int(context.colorspace)}"
    ranges = {1: "limited range", 2: "full range"}
    return f"{matrix}, {ranges.get(int(context.color_range), 'range not said')}"
