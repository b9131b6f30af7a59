"""The whole tree of options, validated once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError, model_validator

from serve_app.config.finisher import FinisherConfig
from serve_app.config.gateway import AuthConfig, GatewayConfig
from serve_app.config.gpu_memory import Taker, too_much
from serve_app.config.jobs import (
    AdmissionConfig,
    Ageing,
    DegradeConfig,
    DispatcherConfig,
    QueueConfig,
    RetentionConfig,
    StoreConfig,
)
from serve_app.config.model import Defaults, Limits, ModelConfig
from serve_app.config.notifications import MailConfig, WebhooksConfig
from serve_app.config.paths import default_home, home_of, sqlite_url
from serve_app.config.section import Section
from serve_app.config.stages import DecoderConfig, DenoiserConfig, EncoderConfig, PipelineConfig
from serve_app.config.storage import StorageConfig
from serve_app.errors import ConfigError, without_password
from serve_app.parameters import PARAMETERS

T = TypeVar("T", bound=Section)
Line = Callable[[Sequence[object]], int]


class Config(Section):
    """All options of a deployment."""

    home: str = ""
    """Folder of all data that outlives the process. In a file it is relative to the file. Empty is `$WAN_SERVE_HOME`,
    else `./data`, both relative to the folder in which the server is started."""
    model: ModelConfig = ModelConfig()
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    encoder: EncoderConfig = EncoderConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    decoder: DecoderConfig = DecoderConfig()
    finisher: FinisherConfig = FinisherConfig()
    pipeline: PipelineConfig = PipelineConfig()
    gateway: GatewayConfig = GatewayConfig()
    auth: AuthConfig = AuthConfig()
    dispatcher: DispatcherConfig = DispatcherConfig()
    ageing: Ageing = Ageing()
    admission: AdmissionConfig = AdmissionConfig()
    degrade: DegradeConfig = DegradeConfig()
    store: StoreConfig = StoreConfig()
    queue: QueueConfig = QueueConfig()
    retention: RetentionConfig = RetentionConfig()
    storage: StorageConfig = StorageConfig()
    webhooks: WebhooksConfig = WebhooksConfig()
    mail: MailConfig | None = None
    """Null: no mails are sent, and requests with `notify_email` are refused."""

    @model_validator(mode="after")
    def _home_is_a_folder(self) -> Config:
        if "://" in self.home:
            raise ValueError(f"home is {self.home!r}, expected a folder (storage.url and store.url may be elsewhere)")
        return self

    @model_validator(mode="after")
    def _defaults_within_limits(self) -> Config:
        d, limit = self.defaults, self.limits
        bounded = [one for one in PARAMETERS.values() if one.limit and one.configurable and one.kind is not str]
        for option, value, most in (
            ("width x height", d.width * d.height, limit.pixels),
            *((one.name, getattr(d, one.name), getattr(limit, one.limit)) for one in bounded),
        ):
            if value > most:
                raise ValueError(f"defaults: {option} is {value}, expected at most limits' {most}")
        return self

    @model_validator(mode="after")
    def _all_origins_have_keys(self) -> Config:
        if "*" in self.gateway.origins and self.auth.mode != "keys":
            raise ValueError("gateway: origins is '*', expected with auth.mode 'keys', or the origins by name")
        return self

    @model_validator(mode="after")
    def _disk_offload_has_files(self) -> Config:
        if self.denoiser.offload == "disk" and self.model.sharded is None:
            raise ValueError("denoiser: offload is 'disk', expected with model.sharded, from whose files it reads")
        return self

    @model_validator(mode="after")
    def _memory_of_shared_gpus(self) -> Config:
        encoder, denoiser, decoder, finisher = self.encoder, self.denoiser, self.decoder, self.finisher
        groups = denoiser.autoscaling.max_replicas
        if denoiser.experts == "split":
            groups += (denoiser.low_noise_autoscaling or denoiser.autoscaling).max_replicas
        takers = [
            Taker(name, need.num_gpus, stage.memory_fraction, most, need.labels, devices)
            for name, stage, need, most, devices in (
                ("encoder", encoder, encoder.resources, encoder.autoscaling.max_replicas, 1),
                ("denoiser rank", denoiser, denoiser.rank, groups * denoiser.parallel.size, 1),
                ("decoder", decoder, decoder.resources, decoder.autoscaling.max_replicas, decoder.devices),
                ("finisher", finisher, finisher.resources, finisher.autoscaling.max_replicas, 1),
            )
            if stage.device != "cpu" and (stage is not finisher or (finisher.enabled and need.num_gpus))
        ]
        if wrong := too_much(takers):
            raise ValueError(wrong)
        return self

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens of a forward pass."""
        shared = self.denoiser.tokens_per_step if self.denoiser.samples_per_step > 1 else 0
        return max(self.limits.tokens, shared, self.denoiser.fuse_guidance_tokens)

    @property
    def home_path(self) -> Path:
        """The folder that `home` names, absolute."""
        return home_of("home", self.home).absolute() if self.home else default_home()

    def make_home(self) -> None:
        """Make the folder `home`.

        Raises:
            ConfigError: it cannot be made or written to.
        """
        home = self.home_path
        given = os.environ.get("WAN_SERVE_HOME")
        name = "WAN_SERVE_HOME" if given and home == default_home() else "home"
        expected = f"{name} has value '{home}', expected a folder that can be written to"
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{expected}: {error.strerror}") from None
        if not os.access(home, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigError(expected)

    @property
    def store_url(self) -> str:
        """The SQLAlchemy URL of the job store."""
        return self.store.url or sqlite_url(self.home_path / "jobs.db")

    @property
    def queue_url(self) -> str:
        """The URL of the broker.

        Raises:
            ConfigError: none is given.
        """
        return self.broker_url(os.environ)

    def broker_url(self, environ: Mapping[str, str]) -> str:
        """Return the URL of the broker for processes with these environment variables.

        Raises:
            ConfigError: none is given, or it cannot be read.
        """
        url = self.queue.url or environ.get("WAN_SERVE_QUEUE_URL", "")
        expected = "expected amqp://user:password@host:5672/vhost"
        if not url.startswith(("amqp://", "amqps://")):
            said = (
                "no URL of RabbitMQ" if url else "value ''"
            )  # the message leaves out another URL, which may hold a password
            raise ConfigError(f"queue.url has {said}, {expected}")
        try:
            host = urlsplit(url).port is not None or urlsplit(url).hostname
        except ValueError as error:  # the port is not a number
            raise ConfigError(f"queue.url has value {without_password(url)!r}, {expected}: {error}") from None
        if not host:
            raise ConfigError(f"queue.url has value {without_password(url)!r}, {expected}")
        return url

    @property
    def storage_url(self) -> str:
        """Folder or bucket of the videos."""
        return self.storage.url or str(self.home_path / "videos")

    @property
    def storage_options(self) -> StorageConfig:
        """The storage section with its `url` filled in."""
        return self.storage.model_copy(update={"url": self.storage_url})


_RENAMED = {
    "denoiser.peer_memory": "denoiser.symmetric_memory",
    "denoiser.text_memory_mib": "denoiser.text_cache_mib",
    "model.prepared": "model.sharded",
    "patience": "ageing",
}
"""Options that had another name before version 0.2.0, by that name."""


def validate(args: dict[str, Any], where: str = "args", line: Line | None = None) -> Config:
    """Return the configuration in `args`.

    Args:
        args: the tree as plain values.
        where: place that messages begin with.
        line: returns the line of an option, if `args` are from a file.

    Raises:
        ConfigError: one line for each option at fault, with its value and what was expected.
    """
    return checked(Config, args, where, line)


def checked(section: type[T], args: Any, where: str, line: Line | None = None) -> T:
    """Return `args` as a `section`.

    Raises:
        ConfigError: as `validate`.
    """
    try:
        return section.model_validate(args)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(section, e, where, line) for e in error.errors())) from None


def _explain(section: type[Section], error: Any, where: str, line: Line | None) -> str:
    if line is not None:
        return f"{_explain(section, error, where, None)} (line {line(error['loc'])})"
    option = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown option {option!r}{_instead(section, error['loc'])}"
    subject = f"{where}: {option}" if option else where
    value = "" if isinstance(error["input"], dict) else f" has value {without_password(repr(error['input']))}"
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] == "model_type":
        said = "Input should be a mapping"
    if said.startswith("Input should be "):
        return f"{subject}{value}, expected {said.removeprefix('Input should be ')}"
    return f"{subject}{value}: {said}"


def _instead(section: type[BaseModel], path: tuple[Any, ...]) -> str:
    """Return what may stand where an unknown option was found: its new name, a similar one, or the list of all."""
    if (renamed := _RENAMED.get(".".join(str(part) for part in path))) is not None:
        return f", it is now {renamed!r}"
    for name in path[:-1]:
        if name not in section.model_fields:  # a key of a mapping
            continue
        kind = section.model_fields[name].annotation
        section = next(one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel))
    names = sorted(section.model_fields)
    close = get_close_matches(str(path[-1]), names, 1)
    return f", did you mean {close[0]!r}?" if close else f", expected one of {', '.join(names)}"
