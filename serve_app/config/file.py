"""The Serve YAML file that configures a deployment."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from serve_app.config.gateway import is_loopback
from serve_app.config.paths import below, placed
from serve_app.config.section import Section
from serve_app.config.tree import Config, checked, validate
from serve_app.config.yaml_file import YamlFile
from serve_app.errors import ConfigError

# Keys that a Serve YAML file may hold beside our `args`. Ray ignores unknown keys, so a typing error would silently do
# nothing.
_FILE_KEYS = {"proxy_location", "http_options", "grpc_options", "controller_options", "logging_config", "applications"}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PROXIES = ("EveryNode", "HeadOnly", "Disabled")
# The builder of a pipeline. A canary is a second one, with options of its own.
_PIPELINE = "serve_app.app:wan"
_APPLICATION_KEYS = {"name", "import_path", "route_prefix", "runtime_env", "args", "external_scaler_enabled"}


class _Http(Section):
    """Ray's `http_options`, those of them that make sense here."""

    host: str | None = Field(None, min_length=1)
    port: int = Field(8000, ge=1, le=65535)
    root_path: str | None = None
    request_timeout_s: PositiveFloat | None = None
    keep_alive_timeout_s: PositiveInt | None = None

    @field_validator("host")
    @classmethod
    def _bare(cls, host: str | None) -> str | None:
        return host.strip().removeprefix("[").removesuffix("]") if host else host

    def given(self) -> dict[str, Any]:
        """Return the options for Ray, always with a host: without one, `serve run` and we would differ."""
        return {"host": "127.0.0.1", **self.model_dump(exclude_none=True)}


def load_file(path: Path) -> tuple[dict[str, Any], Config]:
    """Read and check a Serve YAML file.

    Returns:
        The file's content for Ray, and the one configuration that its applications share; a second pipeline, which is
        not `dispatcher.pipeline`, may have another. Paths are absolute: a relative path in the file is relative to the
        file's folder.

    Raises:
        ConfigError: the file cannot be read, or holds an unknown key or an option that cannot work.
    """
    file = YamlFile(path)
    content = file.content
    if content is None:
        raise ConfigError(f"{path}: is empty, expected a mapping with a list `applications`")
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("applications"), list)
        or not content["applications"]
    ):
        raise ConfigError(f"{path}: expected a mapping with a list `applications` of at least one")
    _check_keys(content, _FILE_KEYS, str(path), file, ())
    http = checked(
        _Http,
        content.get("http_options") or {},
        f"{path}: http_options",
        lambda place: file.line(("http_options", *place)),
    )
    if content.get("proxy_location", _PROXIES[0]) not in _PROXIES:
        raise ConfigError(
            f"{path}: proxy_location has value {content['proxy_location']!r}, expected one of {', '.join(_PROXIES)}"
        )
    configs: list[Config] = []
    names: list[str] = []
    for number, application in enumerate(content["applications"]):
        name = application.get("name") if isinstance(application, dict) else None
        where = f"{path}: " + (f"applications[{number}]" if name is None else f"application {name!r}")
        here = ("applications", number)
        _check_keys(application, _APPLICATION_KEYS, where, file, here)
        if not isinstance(name, str) or not name or name in names:
            raise ConfigError(f"{where}: name has value {name!r}, expected one that no other application has")
        names.append(name)

        def line(place: Sequence[object], here: tuple[object, ...] = here) -> int:
            return file.line((*here, "args", *place))

        configs.append(validate(application.get("args") or {}, where, line))
    shared = _shared(content["applications"], configs)
    if any(config != configs[shared[0]] for number, config in enumerate(configs) if number in shared):
        raise ConfigError(f"{path}: the applications' `args` differ, expected the same ones (share them by an anchor)")
    environment = variables(content["applications"][0], f"{path}: application {names[0]!r}")
    configs = [placed(config, below(path.parent), {**os.environ, **environment}) for config in configs]
    config = configs[shared[0]]
    _check_reach(config, http, path)
    for name, own in zip(names, configs, strict=True):
        if own.storage_url != config.storage_url:
            raise ConfigError(
                f"{path}: application {name!r}: storage.url has value {own.storage_url!r}, expected that of the other "
                f"applications, {config.storage_url!r}"
            )
    applications = [
        {**application, "args": own.model_dump(mode="json", exclude_unset=True)}
        for application, own in zip(content["applications"], configs, strict=True)
    ]
    return {**content, "http_options": http.given(), "applications": applications}, config


def _shared(applications: Sequence[dict[str, Any]], configs: Sequence[Config]) -> Sequence[int]:
    """Return the numbers of the applications that share one configuration: all but further pipelines, or else all."""
    main = [
        number
        for number, (application, config) in enumerate(zip(applications, configs, strict=True))
        if application.get("import_path") != _PIPELINE or application["name"] == config.dispatcher.pipeline
    ]
    return main or range(len(applications))


def variables(application: dict[str, Any], where: str) -> dict[str, str]:
    """Return the environment variables that an application's `runtime_env` sets.

    Raises:
        ConfigError: an environment cannot hold them.
    """
    runtime = application.get("runtime_env") or {}
    found = (runtime.get("env_vars") or {}) if isinstance(runtime, dict) else None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: runtime_env has value {runtime!r}, expected a mapping, with a mapping `env_vars`")
    for name, value in found.items():
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise ConfigError(f"{where}: runtime_env.env_vars has {name!r}, expected the name of a variable")
        if not isinstance(value, str):  # the message leaves out the value, which may be a password
            kind = type(value).__name__
            raise ConfigError(f"{where}: runtime_env.env_vars.{name} is of type {kind}, expected a text in quotes")
    return found


def _check_reach(config: Config, http: _Http, path: Path) -> None:
    host = http.host or "127.0.0.1"
    if config.auth.mode == "none" and not config.auth.open and not is_loopback(host):
        raise ConfigError(
            f"{path}: http_options.host has value {host!r}, expected a loopback address with auth.mode 'none'; "
            "set auth.mode to 'keys', or auth.open to true if anybody who reaches it may use it"
        )


def _check_keys(mapping: Any, keys: set[str], where: str, file: YamlFile, place: Sequence[object]) -> None:
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where}: has value {mapping!r}, expected a mapping")
    for key in mapping:
        if key not in keys:
            close = get_close_matches(str(key), keys, 1)
            instead = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(sorted(keys))}"
            raise ConfigError(f"{where}: unknown option {key!r}, {instead} (line {file.line((*place, key))})")
