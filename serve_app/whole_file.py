"""A file that appears under its name only when it is complete."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from serve_app.errors import ConfigError


def check_target(path: Path, option: str, value: Path | None = None) -> None:
    """Check that a file can be written. Called before the work whose result it will hold.

    Args:
        path: the file to be written.
        option: the name of the option or argument that `path` came from.
        value: the given folder, if the user names a folder and not the file itself.

    Raises:
        ConfigError: no file can be written there.
    """
    what = "a file" if value is None else "a folder for a file"
    expected = f"{option} has value '{value or path}', expected {what}"
    try:
        if path.is_dir():
            raise ConfigError(f"{expected}: '{path}' is a folder")
        if not (parent := path.absolute().parent).is_dir():
            raise ConfigError(f"{expected} in a folder that is there: '{parent}' is none")
        if _is_special(path):
            return
        if path.exists() and not os.access(path, os.W_OK):
            raise ConfigError(f"{expected} that can be written: it is read-only")
        part = _part(path)
        part.open("xb").close()  # only a try detects read-only file systems, quotas and access lists
        part.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{expected} that can be written: {reason}") from None


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a part file beside `path` for writing. It takes the name of `path` when the block ends well.

    If the block raises, also by Ctrl-C, the part file is removed and an older file under that name stays as it was.
    A device or a pipe (`/dev/stdout`) is written to directly.

    Raises:
        OSError: the file cannot be written.
    """
    if _is_special(path):
        with path.open("wb") as file:
            yield file
        return
    target = Path(os.path.realpath(path))  # a link stays a link, now to the new content
    part = _part(target)
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            shutil.copymode(target, part)
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _part(path: Path) -> Path:
    """Return a free name beside `path`, of a length that any file system takes."""
    return Path(os.path.realpath(path)).parent / f".wan-{secrets.token_hex(6)}.part"


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()
