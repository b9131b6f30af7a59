"""A Serve YAML file of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from serve_app.config.gateway import is_loopback
from serve_app.config.tree import Config, validate
from serve_app.errors import ConfigError

# What a Serve YAML file may hold beside our `args`. Ray ignores keys that it does not know, so a typing error in one
# would silently do nothing.
_FILE_KEYS = {"proxy_location", "http_options", "grpc_options", "controller_options", "logging_config", "applications"}
_HTTP_KEYS = {"host", "port", "root_path", "request_timeout_s", "keep_alive_timeout_s"}
_APPLICATION_KEYS = {"name", "import_path", "route_prefix", "runtime_env", "args", "external_scaler_enabled"}


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
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("applications"), list)
        or not content["applications"]
    ):
        raise ConfigError(f"{path}: expected a mapping with a list `applications` of at least one")
    _known(content, _FILE_KEYS, str(path))
    _known(content.get("http_options") or {}, _HTTP_KEYS, f"{path}: http_options")
    configs = []
    for application in content["applications"]:
        name = application.get("name") if isinstance(application, dict) else None
        where = f"{path}: application {name!r}"
        _known(application, _APPLICATION_KEYS, where)
        configs.append(validate(application.get("args") or {}, where))
    if any(config != configs[0] for config in configs):
        raise ConfigError(f"{path}: the applications' `args` differ, expected the same ones (share them by an anchor)")
    _guarded(configs[0], content, path)
    return content, configs[0]


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
