"""The configuration files that ship with the package: `configs/` of a checkout, `serve_app/configs` once installed."""

from __future__ import annotations

from pathlib import Path

from serve_app.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Return the folder that holds the shipped files."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Return the names of the shipped files, without `.yaml`."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def config_file(given: Path) -> Path:
    """Return the file that a user means: the one under that path, else the shipped one of that name.

    Args:
        given: a path, or a name such as `tiny`, `tiny.yaml` or `configs/tiny.yaml`.

    Raises:
        ConfigError: it is a bare name, and neither a file nor a shipped one.
    """
    if given.exists() or given.is_absolute() or given.parent.name not in ("", "configs"):
        return given
    shipped = folder() / given.with_suffix(".yaml").name
    if given.suffix in ("", ".yaml") and shipped.is_file():
        return shipped
    if given.suffix == "" and given.parent.name == "":
        raise ConfigError(f"{given}: there is no such file, expected a file or one of {', '.join(names())}")
    return given
