"""A configuration file as Kubernetes runs it: checked for what Pods cannot have, and the text for KubeRay."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from serve_app.config import Config, load_file
from serve_app.config.paths import placed
from serve_app.config.tree import validate
from serve_app.config.yaml_file import YamlFile
from serve_app.errors import ConfigError, without_password
from serve_app.launch.targets import check_applications

# Longer than the longest job, for whatever follows it: the decode, the upload and the end of the replica.
_AFTER_JOBS_S = 600
_PIPELINE, _GATEWAY = "serve_app.app:wan", "serve_app.app:gateway"


@dataclass(frozen=True)
class Secret:
    """An environment variable of all Pods that a key of the Secret holds, named as the variable is."""

    variable: str
    optional: bool = False


@dataclass(frozen=True)
class Source:
    """A configuration for Kubernetes.

    Attributes:
        config: its options.
        serve: the Serve configuration, `serveConfigV2` of KubeRay.
        secrets: the variables that come from the Secret.
        notes: a line for each thing that is changed, or left to whoever deploys.
    """

    config: Config
    serve: dict[str, Any]
    secrets: list[Secret]
    notes: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        """The HTTP port of the gateway."""
        return int(self.serve["http_options"]["port"])

    @property
    def pipelines(self) -> int:
        """Number of applications that hold a pipeline, each with stages of its own."""
        return sum(entry["import_path"] == _PIPELINE for entry in self.serve["applications"])

    @property
    def loading_s(self) -> int:
        """Seconds that KubeRay waits for a new cluster: three tries to load, and the images' download."""
        return 3 * int(self.config.denoiser.start_timeout_s) + 1800

    @property
    def draining_s(self) -> int:
        """Seconds that an old cluster is kept beside the new one: the longest job and what follows it."""
        return int(self.config.denoiser.shutdown_timeout_s) + _AFTER_JOBS_S

    @property
    def weights(self) -> PurePosixPath | None:
        """The folder that the Pods mount for the weights; None for the model inside the package."""
        if self.config.model.path == "tiny":
            return None
        folders = [PurePosixPath(self.config.model.path).parent]
        if self.config.model.sharded:
            folders.append(PurePosixPath(self.config.model.sharded).parent)
        return PurePosixPath(os.path.commonpath(folders))


def read(path: Path) -> Source:
    """Read a configuration file.

    Raises:
        ConfigError: the file cannot work, or cannot work in Pods; the message has the option, its value and what was
            expected.
    """
    content, config = load_file(path)
    notes = check_applications(path, content, config)
    _check(path, content, config)
    # Once more, for its paths as they are written: in a Pod there is no folder of the file.
    args = YamlFile(path).content["applications"][0].get("args") or {}
    placed(validate(args, str(path)), _absolute)
    serve = {**content, "proxy_location": "HeadOnly"}
    serve["http_options"] = {"port": 8000, **content["http_options"], "host": "0.0.0.0"}
    # A folder of the machine on which this runs; Pods have WAN_SERVE_HOME.
    args = {name: value for name, value in content["applications"][0]["args"].items() if name != "home"}
    serve["applications"] = [{**entry, "args": args} for entry in content["applications"]]
    if content.get("proxy_location", "EveryNode") != "HeadOnly":
        notes.append("proxy_location is 'HeadOnly' there: the Service sends requests to the head Pod")
    for option, file in (("webhooks", config.webhooks.ca_file), ("mail", config.mail and config.mail.ca_file)):
        if file:
            notes.append(f"{option}.ca_file has value {file!r}: mount it into all Pods, or build it into the image")
    source = Source(config, serve, _secrets(config), notes)
    if source.weights == PurePosixPath("/"):
        raise ConfigError(
            f"model.path has value {config.model.path!r}, expected a folder below another, as /models/a14b"
        )
    return source


def _absolute(option: str, path: str) -> Path:
    if option != "home" and not path.startswith("/"):  # nothing is kept in the home of a Pod
        raise ConfigError(f"{option} has value {path!r}, expected an absolute path, the same in every Pod")
    return Path(path)


def _check(path: Path, content: dict[str, Any], config: Config) -> None:
    """Refuse what cannot work when each process runs in another Pod."""
    imports = [entry["import_path"] for entry in content["applications"]]
    if imports.count(_GATEWAY) != 1 or _PIPELINE not in imports:
        raise ConfigError(f"{path}: applications are {', '.join(imports)}, expected {_PIPELINE} and one {_GATEWAY}")
    if content.get("proxy_location") == "Disabled":
        raise ConfigError(f"{path}: proxy_location has value 'Disabled', expected 'HeadOnly'")
    if config.auth.mode == "none" and not config.auth.open:
        raise ConfigError("auth.mode has value 'none', expected 'keys': other Pods reach the gateway (or auth.open)")
    if config.store_url.startswith("sqlite"):
        raise ConfigError(f"store.url has value {config.store.url!r}, expected PostgreSQL: Pods share no disk")
    if not config.storage.bucket:
        raise ConfigError(
            f"storage.url has value {config.storage.url!r}, expected s3://bucket/prefix: Pods share no disk"
        )
    for option, url, variable in (
        ("store.url", config.store.url, "PGPASSWORD"),
        ("queue.url", config.queue.url, "WAN_SERVE_QUEUE_URL"),
    ):
        if "password" in url or (url and urlsplit(url).password):
            raise ConfigError(
                f"{option} has value {without_password(url)!r}, expected no password: it belongs into the Secret, as "
                f"{variable}"
            )


def _secrets(config: Config) -> list[Secret]:
    """Return the variables that the services of a configuration need."""
    found = [Secret("PGPASSWORD", optional=True)]
    if config.queue.transport == "rabbitmq" and not config.queue.url:
        found.append(Secret("WAN_SERVE_QUEUE_URL"))
    # Optional: a Pod may have a web identity or a role instead.
    found += [Secret("AWS_ACCESS_KEY_ID", optional=True), Secret("AWS_SECRET_ACCESS_KEY", optional=True)]
    if config.mail is not None and config.mail.user:
        found.append(Secret("WAN_SERVE_MAIL_PASSWORD"))
    return found
