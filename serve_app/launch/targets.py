"""Building the applications of a file, which checks all that can be checked on this machine alone.

Starts nothing, and needs no running Ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

from serve_app import app
from serve_app.capacity import Need, needs
from serve_app.config import Config, variables
from serve_app.db.database import Database
from serve_app.errors import ConfigError, ServeAppError, without_password

BUILDERS: dict[str, Callable[[dict[str, Any]], serve.Application]] = {
    "serve_app.app:wan": app.wan,
    "serve_app.app:gateway": app.gateway,
}
LEFT_OUT = "database, broker, bucket, mail server, GPUs and free ports"
"""The things that are not checked here, in words."""

_VARIABLES = (
    "WAN_SERVE_BENCHMARK",
    "WAN_SERVE_GENERATION",
    "WAN_SERVE_HOME",
    "WAN_SERVE_KEY",
    "WAN_SERVE_MAIL_PASSWORD",
    "WAN_SERVE_QUEUE_URL",
)
_AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@dataclass(frozen=True)
class Targets:
    """The applications that Ray Serve is to run, and what is known of them.

    Attributes:
        run: the applications.
        runtime_env: the one that all of them share; None if it is empty.
        gateways: the route prefixes of the applications that answer HTTP.
        needs: the resources that their deployments ask for.
        notes: a line for each thing that is wrong, but does not prevent a start.
    """

    run: list[serve.RunTarget]
    runtime_env: dict[str, Any] | None
    gateways: list[str]
    needs: list[Need]
    notes: list[str]


def build(path: Path, content: dict[str, Any], config: Config) -> Targets:
    """Build the applications of a file.

    Args:
        path: the file, for messages.
        content: its content, as `load_file` returns it.
        config: its configuration, as `load_file` returns it.

    Raises:
        ConfigError: the file cannot work.
    """
    notes = check_applications(path, content, config)
    applications = content["applications"]
    runtime_env = _runtime_env(path, applications)
    environ = {**os.environ, **((runtime_env or {}).get("env_vars") or {})}
    names = {entry["import_path"] for entry in applications}
    gateways = [
        entry.get("route_prefix", "/") for entry in applications if BUILDERS[entry["import_path"]] is app.gateway
    ]
    wanted = needs(config, pipeline="serve_app.app:wan" in names, gateway=bool(gateways))
    notes += _environment(config, environ)
    if gateways and content.get("proxy_location") == "Disabled":
        notes.append("proxy_location has value 'Disabled': the gateway answers no HTTP, only calls of other Ray jobs")
    run = [_built(path, entry, content.get("logging_config")) for entry in applications]
    return Targets(run, runtime_env, gateways, wanted, notes)


def check_applications(path: Path, content: dict[str, Any], config: Config) -> list[str]:
    """Check the applications of a file without building them, which takes the model's folder and the broker's URL.

    Args:
        path: the file, for messages.
        content: its content, as `load_file` returns it.
        config: its configuration, as `load_file` returns it.

    Returns:
        A line for each thing that is wrong, but does not prevent a start.

    Raises:
        ConfigError: the file cannot work.
    """
    applications = content["applications"]
    for entry in applications:
        _import_path(path, entry)
    _runtime_env(path, applications)
    _routes(path, applications)
    _as_ray_reads_it(path, content)
    return _pipeline(path, applications, config)


def serve_options(content: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `serve.start` that a file asks for.

    Args:
        content: the file's content, as `load_file` returns it.
    """
    names = ("http_options", "grpc_options", "controller_options", "logging_config")
    return {
        "proxy_location": "EveryNode",
        **{name: content[name] for name in (*names, "proxy_location") if content.get(name)},
    }


def where_data_goes(config: Config) -> str:
    """Return a line on where jobs and videos are kept."""
    jobs = Database(config.store_url).file or without_password(config.store_url)
    return f"jobs are kept in {jobs}, videos in {config.storage_url}"


def _import_path(path: Path, entry: dict[str, Any]) -> None:
    given = entry.get("import_path")
    if given not in BUILDERS:
        close = get_close_matches(str(given), BUILDERS, 1)
        expected = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(BUILDERS)}"
        raise ConfigError(f"{path}: application {entry['name']!r}: import_path has value {given!r}, {expected}")


def _runtime_env(path: Path, applications: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the `runtime_env` of all applications, which the Ray job that deploys them gets; None if it is empty."""
    given = [entry.get("runtime_env") or {} for entry in applications]
    if any(one != given[0] for one in given):
        raise ConfigError(
            f"{path}: the applications' `runtime_env` differ, expected the same ones (or use `serve run`)"
        )
    where = f"{path}: application {applications[0]['name']!r}"
    for name in variables(applications[0], where):
        close = get_close_matches(name, _VARIABLES, 1)
        if name.startswith("WAN_SERVE_") and name not in _VARIABLES:
            instead = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(_VARIABLES)}"
            raise ConfigError(f"{where}: runtime_env.env_vars has {name!r}, which nothing reads, {instead}")
    for key in given[0]:
        if key not in RuntimeEnv.known_fields:
            raise ConfigError(f"{where}: unknown option 'runtime_env.{key}', which Ray does not know")
    return given[0] or None


def _routes(path: Path, applications: list[dict[str, Any]]) -> None:
    taken: dict[str, str] = {}
    for entry in applications:
        where = f"{path}: application {entry['name']!r}: route_prefix"
        route = entry.get("route_prefix", "/")  # Ray's default
        said = f"{where} has value {route!r}" if "route_prefix" in entry else f"{where} is missing, which is '/'"
        if BUILDERS[entry["import_path"]] is app.wan:
            if route is not None:
                raise ConfigError(f"{said}, expected null: the pipeline is called through the gateway")
            continue
        if route is None:
            raise ConfigError(f"{said}, expected a path such as '/'")
        if not isinstance(route, str) or not route.startswith("/") or (route != "/" and route.endswith("/")):
            raise ConfigError(f"{said}, expected a path that begins with '/' and does not end with it, or '/'")
        if any(sign in route for sign in "{}?#% "):
            raise ConfigError(f"{said}, expected a path of letters, digits, '/', '-', '_' and '.'")
        if route in taken:
            raise ConfigError(f"{said}, expected one that no other application has: {taken[route]!r} has it")
        taken[route] = entry["name"]


def _as_ray_reads_it(path: Path, content: dict[str, Any]) -> None:
    """Refuse what Ray's own schema of the file refuses, such as a wrong type in its logging options."""
    applications = [{**entry, "args": {}} for entry in content["applications"]]
    try:
        ServeDeploySchema.model_validate({**content, "applications": applications})
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {option}: {said}".replace(": :", ":")) from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None


def _pipeline(path: Path, applications: list[dict[str, Any]], config: Config) -> list[str]:
    """Check that the file has the pipeline that the dispatcher calls, and return notes."""
    pipelines = [entry["name"] for entry in applications if BUILDERS[entry["import_path"]] is app.wan]
    if len(pipelines) == len(applications) or config.dispatcher.pipeline in pipelines:
        return []
    said = f"dispatcher.pipeline has value {config.dispatcher.pipeline!r}"
    if pipelines:
        raise ConfigError(f"{path}: {said}, expected the name of the application that has it, {pipelines[0]!r}")
    return [f"{said}, which is no application of this file: until it is deployed, jobs wait"]


def _environment(config: Config, environ: dict[str, str]) -> list[str]:
    """Check the environment variables that the configuration relies on, and return notes.

    Raises:
        ConfigError: neither the environment nor the file has the broker's URL.
    """
    notes = []
    if config.queue.transport == "rabbitmq":
        config.broker_url(environ)
    absent = "is not set here, and has to be where Ray's processes run"
    if config.mail is not None and config.mail.user and not environ.get("WAN_SERVE_MAIL_PASSWORD"):
        notes.append(f"mail.user has value {config.mail.user!r}: WAN_SERVE_MAIL_PASSWORD {absent}")
    keys = [name for name in _AWS_KEYS if environ.get(name)]
    if config.storage.bucket and len(keys) == 1:
        (other,) = set(_AWS_KEYS) - set(keys)
        notes.append(f"storage.url has value {config.storage.url!r}: {other} {absent}, as {keys[0]} is")
    for name in sorted(environ):
        # Kubernetes sets variables with this beginning for a service called wan-serve: only near misses are noted.
        close = get_close_matches(name, _VARIABLES, 1, 0.85)
        if name.startswith("WAN_SERVE") and name not in _VARIABLES and close:
            notes.append(f"the environment variable {name} is not read: did you mean {close[0]}?")
    return notes


def _built(path: Path, entry: dict[str, Any], logging: dict[str, Any] | None) -> serve.RunTarget:
    try:
        application = BUILDERS[entry["import_path"]](entry.get("args") or {})
    except ServeAppError:
        raise
    except (ValueError, TypeError) as error:  # Ray's, of an option that it does not take, such as a label
        raise ConfigError(f"{path}: application {entry['name']!r}: {' '.join(str(error).split())}") from None
    return serve.RunTarget(
        target=application,
        name=entry["name"],
        route_prefix=entry.get("route_prefix", "/"),
        logging_config=logging,
        external_scaler_enabled=entry.get("external_scaler_enabled", False),
    )
