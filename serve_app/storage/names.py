"""File names and media types of stored files, derived from their keys."""

from __future__ import annotations

from pathlib import PurePosixPath

_TYPES = {".mp4": "video/mp4", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
_TYPES |= {".webm": "video/webm", ".gif": "image/gif", ".zip": "application/zip"}


def content_type(key: str) -> str:
    """Return the media type of a key by its suffix."""
    return _TYPES.get(PurePosixPath(key).suffix, "application/octet-stream")


def download_name(video_id: str, key: str) -> str:
    """Return the name under which a video's file is saved: `<id>.mp4`, `<id>-thumbnail.jpg`."""
    path = PurePosixPath(key)
    return f"{video_id}{path.suffix}" if path.stem == "video" else f"{video_id}-{path.name}"


def disposition(filename: str) -> str:
    """Return the `Content-Disposition` of a file that browsers show, and save under `filename`."""
    return f'inline; filename="{filename}"'
