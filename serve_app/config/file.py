"""A Serve YAML file of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveFloat

from serve_app.config.gateway import is_loopback
from serve_app.config.section import Section
from serve_app.config.tree import Config, checked, validate
from serve_app.errors import ConfigError

# What a Serve YAML file may hold beside our `args`. Ray ignores keys that it does not know, so a typing error in one
# would silently do nothing.
_FILE_KEYS = {"proxy_location", "http_options", "grpc_options", "controller_options", "logging_config", "applications"}
_PROXIES = ("EveryNode", "HeadOnly", "Disabled")
_APPLICATION_KEYS = {"name", "import_path", "route_prefix", "runtime_env", "args", "external_scaler_enabled"}


class _Http(Section):
    """What Ray takes as `http_options`, as far as it makes sense here."""

    host: str | None = None
    port: int = Field(8000, ge=1, le=65535)
    root_path: str | None = None
    request_timeout_s: PositiveFloat | None = None
    keep_alive_timeout_s: PositiveFloat | None = None


def load_file(path: Path) -> tuple[dict[str, Any], Config]:
    """Read and check a Serve YAML file of ours.

    Returns:
        The file as Ray wants it, and the one configuration that its applications share.

    Raises:
        ConfigError: the file cannot be read, holds an unknown key, or an option that cannot work.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {_where(error)}") from None
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("applications"), list)
        or not content["applications"]
    ):
        raise ConfigError(f"{path}: expected a mapping with a list `applications` of at least one")
    _known(content, _FILE_KEYS, str(path))
    checked(_Http, content.get("http_options") or {}, f"{path}: http_options")
    if content.get("proxy_location", _PROXIES[0]) not in _PROXIES:
        raise ConfigError(
            f"{path}: proxy_location has value {content['proxy_location']!r}, expected one of {', '.join(_PROXIES)}"
        )
    configs: list[Config] = []
    names: list[str] = []
    for number, application in enumerate(content["applications"]):
        name = application.get("name") if isinstance(application, dict) else None
        where = f"{path}: " + (f"applications[{number}]" if name is None else f"application {name!r}")
        _known(application, _APPLICATION_KEYS, where)
        if not isinstance(name, str) or not name or name in names:
            raise ConfigError(f"{where}: name has value {name!r}, expected one that no other application has")
        names.append(name)
        configs.append(validate(application.get("args") or {}, where))
    if any(config != configs[0] for config in configs):
        raise ConfigError(f"{path}: the applications' `args` differ, expected the same ones (share them by an anchor)")
    _guarded(configs[0], content, path)
    return content, configs[0]


def _where(error: yaml.YAMLError) -> str:
    """A mistake in YAML as its line and what is wrong there."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _guarded(config: Config, content: dict[str, Any], path: Path) -> None:
    host = str((content.get("http_options") or {}).get("host") or "127.0.0.1")
    if config.auth.mode == "none" and not config.auth.open and not is_loopback(host):
        raise ConfigError(
            f"{path}: http_options.host has value {host!r}, expected a loopback address with auth.mode 'none'; "
            "set auth.mode to 'keys', or auth.open to true if anybody who reaches it may use it"
        )


def _known(mapping: Any, keys: set[str], where: str) -> None:
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where}: has value {mapping!r}, expected a mapping")
    for key in mapping:
        if key not in keys:
            raise ConfigError(f"{where}: unknown option {key!r}, expected one of {', '.join(sorted(keys))}")
