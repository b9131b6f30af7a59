"""What stored files are called and what they are, from their keys."""

from __future__ import annotations

from pathlib import PurePosixPath

_TYPES = {".mp4": "video/mp4", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}


def content_type(key: str) -> str:
    """The media type that a key's suffix stands for."""
    return _TYPES.get(PurePosixPath(key).suffix, "application/octet-stream")


def download_name(video_id: str, key: str) -> str:
    """The file name for somebody who saves a video's file: `<id>.mp4`, `<id>-thumbnail.jpg`."""
    path = PurePosixPath(key)
    return f"{video_id}{path.suffix}" if path.stem == "video" else f"{video_id}-{path.name}"


def disposition(filename: str) -> str:
    """The `Content-Disposition` of a file that browsers show, and save under `filename`."""
    return f'inline; filename="{filename}"'
