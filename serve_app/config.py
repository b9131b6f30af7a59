"""Every option, in one frozen tree that is validated once.

The tree is the `args` of both Serve applications in a YAML file under configs/. Python defaults are those of
Wan2.2-T2V-A14B as published; a YAML file states what differs. Knows nothing of Ray: `serve_app.app` turns it into
deployments.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from serve_app.errors import ConfigError

# The fixed negative prompt of the Wan2.2 release (wan/configs/shared_config.py there); quality drops without it.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)

# A prefix is made of names as keys are; see `serve_app.storage`.
_S3_URL = re.compile(r"s3://[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9](/[A-Za-z0-9_][A-Za-z0-9._-]*)*/?")
_ENDPOINT = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?/?")

Device = Literal["auto", "cpu", "cuda"]
Priority = Literal["interactive", "standard", "batch"]
NonNegativeFloat = Annotated[float, Field(ge=0)]
# One bare address: what could end a header, name a second recipient or need quoting is not in it.
_MAIL_ADDRESS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")


def is_mail_address(text: str) -> bool:
    """Whether it is one plain e-mail address, `name@domain` in ASCII."""
    return len(text) <= 254 and _MAIL_ADDRESS.fullmatch(text) is not None


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """Which weights to serve."""

    path: str = "tiny"
    """A folder in the diffusers layout, or `tiny` for the model inside the package."""
    name: str = "wan2.2-t2v-a14b"
    """The id that `/v1/models` lists and requests may name."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the experts and the text encoder; modules that diffusers keeps in float32 stay so."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def folder(self) -> Path:
        """The folder that `path` names."""
        if self.path == "tiny":
            from serve_app.tiny import CHECKPOINT

            return CHECKPOINT
        return Path(self.path).expanduser()


class Defaults(Section):
    """What a request gets when it does not say."""

    width: PositiveInt = 1280
    height: PositiveInt = 720
    num_frames: PositiveInt = 81
    fps: PositiveInt = 16
    num_inference_steps: PositiveInt = 40
    guidance_scale: NonNegativeFloat = 4.0
    """Of the high-noise expert."""
    guidance_scale_2: NonNegativeFloat = 3.0
    """Of the low-noise expert."""
    flow_shift: PositiveFloat = 12.0
    boundary_ratio: float = Field(0.875, ge=0, le=1)
    """Share of the training timesteps from which on the high-noise expert denoises."""
    negative_prompt: str = WAN_NEGATIVE_PROMPT


class Limits(Section):
    """What a request may ask for at most."""

    prompt_chars: PositiveInt = 4000
    pixels: PositiveInt = 1280 * 720
    """Width times height of one frame."""
    num_frames: PositiveInt = 161
    num_inference_steps: PositiveInt = 100
    fps: PositiveInt = 60
    queued_jobs: PositiveInt = 1000
    """Waiting jobs beyond this many are answered 429."""
    body_bytes: PositiveInt = 1 << 20
    """Size of a request's body."""


class Resources(Section):
    """What Ray reserves for one process."""

    num_cpus: NonNegativeFloat = 1
    num_gpus: NonNegativeFloat = 0
    resources: dict[str, float] = {}
    """Custom Ray resources that it uses up."""
    labels: dict[str, str] = {}
    """Ray node labels that its host must have, e.g. `{pool: h200}`; a value may be `in(a, b)` or `!a`."""


class Autoscaling(Section):
    """How many replicas, by the number of requests that wait or run."""

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    target_queue_length: PositiveFloat = 2
    """Requests per replica, running and waiting, that the autoscaler aims at."""
    upscale_delay_s: NonNegativeFloat = 10
    downscale_delay_s: NonNegativeFloat = 300
    look_back_s: PositiveFloat = 10
    """Length of the window over which the queue length is averaged."""

    @model_validator(mode="after")
    def _order(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas}, expected at most {self.max_replicas} (max_replicas)"
            )
        return self


class Batch(Section):
    """The window of a `@serve.batch`."""

    size: PositiveInt = 1
    wait_s: NonNegativeFloat = 0.0
    """How long the first request of a batch waits for others."""


class Stage(Section):
    """What the three stages have in common."""

    device: Device = "auto"
    threads: int = Field(0, ge=0)
    """CPU threads of the stage's math in one process; 0 is all cores, shared among the ranks of a group."""
    autoscaling: Autoscaling = Autoscaling()
    max_ongoing_requests: PositiveInt = 64
    warmup: bool = True
    """Run once before the replica reports ready, so that the first request is not a slow one."""
    health_check_period_s: PositiveFloat = 5
    health_check_timeout_s: PositiveFloat = 10


class Encoder(Stage):
    """The text encoder."""

    resources: Resources = Resources(num_cpus=1, num_gpus=1)
    batch: Batch = Batch(size=8, wait_s=0.02)


class Denoiser(Stage):
    """A group of tensor-parallel ranks that denoise."""

    tensor_parallel: PositiveInt = 1
    """Ranks of a group. Must divide the number of attention heads."""
    rank: Resources = Resources(num_cpus=1, num_gpus=1)
    coordinator_cpus: NonNegativeFloat = 1
    placement: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "STRICT_PACK"
    """Ray placement strategy of a group. STRICT_PACK keeps its ranks on one host, where links are fast."""
    batch: Batch = Batch(size=4, wait_s=0.005)
    """Of the admissions: samples that arrive together start together."""
    experts: Literal["together", "swap", "split"] = "together"
    """`together`: every rank holds both. `swap`: both in host memory, the one in use on the device as well.
    `split`: two deployments with one expert each, which hand samples over at the boundary."""
    low_noise_autoscaling: Autoscaling | None = None
    """With `experts: split`, of the low-noise expert's replicas; `autoscaling` is then that of the high-noise ones, and
    of both if this is not given."""
    samples_per_step: PositiveInt = 1
    """Samples of equal shape that may share a forward pass."""
    tokens_per_step: PositiveInt = 80_000
    """Tokens that a shared forward pass may hold; a single sample may exceed it."""
    step_memory_mib: NonNegativeFloat = 0
    """Working memory that a shared forward pass may take on one rank; a single sample may exceed it. 0 is no bound."""
    resident_samples: PositiveInt = 8
    """Samples whose state a group holds at once; others wait outside."""
    parked_memory_mib: NonNegativeFloat = 4096
    """Device memory for the state of samples that do not take part in a step; the least urgent beyond it are kept in
    host memory."""
    text_memory_mib: NonNegativeFloat = 1024
    """Device memory of each expert on a rank for the keys and values of the texts in the last forward pass, which the
    next one uses again if the same samples step. A batch beyond it has them made anew at every step."""
    checkpoint_s: NonNegativeFloat = 30
    """A sample that was denoised for this long since it was last saved is saved again, for another group to continue if
    this one is lost. 0 is never."""
    fuse_guidance_tokens: int = Field(8192, ge=0)
    """Up to this many tokens both halves of guidance run as one forward pass."""
    step_timeout_s: PositiveFloat = 600
    """A step that takes longer counts as hung, and the group is replaced."""
    start_timeout_s: PositiveFloat = 1800
    """Time for the ranks to start and load."""
    shutdown_timeout_s: PositiveFloat = 3600
    """How long a replica that is scaled down or replaced may go on with its samples; at least the longest job."""


class Decoder(Stage):
    """The VAE and the video encoder."""

    resources: Resources = Resources(num_cpus=1, num_gpus=1)
    batch: Batch = Batch(size=1, wait_s=0.0)
    """One video fills a device, and alone its pixels are the same every time; batch mates change the last bits."""
    store_wait_s: NonNegativeFloat = 3600
    """How long a finished sample is kept in memory while the storage does not take its video."""


class Pipeline(Section):
    """The deployment that composes the stages."""

    autoscaling: Autoscaling = Autoscaling(target_queue_length=32)
    num_cpus: NonNegativeFloat = 0.1
    max_ongoing_requests: PositiveInt = 256


class Gateway(Section):
    """The HTTP ingress."""

    num_replicas: PositiveInt = 1
    num_cpus: NonNegativeFloat = 0.1
    max_ongoing_requests: PositiveInt = 256
    public_url: str = ""
    """Where users reach the gateway, e.g. `https://video.example.com`: mails then link to the video."""


class Auth(Section):
    """Who may call over HTTP. Handle calls come from inside of the cluster and are trusted."""

    mode: Literal["none", "keys"] = "none"
    """`none`: whoever reaches the port. `keys`: whoever has one that `wan-serve keys` made."""
    open: bool = False
    """With `mode: none`, answer calls from other machines too. Otherwise only those to a loopback address are."""


class Dispatcher(Section):
    """The process that leases jobs and drives them through a pipeline."""

    pipeline: str = "wan"
    """Name of the Serve application that holds the pipeline."""
    num_cpus: NonNegativeFloat = 0.1
    running_jobs: PositiveInt = 64
    """Jobs that one dispatcher drives at once; the rest waits in the store. More than groups hold, so that an urgent
    one finds its way to them."""
    max_attempts: PositiveInt = 5
    """A job fails after this many attempts in a row that ended badly and began no further than the one before."""
    max_interruptions: PositiveInt = 100
    """A job fails after this many attempts that were ended by losses around it, which it had no part in."""
    group_losses: PositiveInt = 2
    """A job whose group was lost this many times during one and the same step fails as poisonous."""
    lease_s: PositiveFloat = 15
    """A job whose dispatcher was silent for this long is taken up by another."""
    poll_s: PositiveFloat = 1
    """How often the store is asked for work when nobody announced any."""
    retry_s: NonNegativeFloat = 5
    """Wait before the third attempt of a job that failed, the second being made at once; doubles with each further one.
    Also before the next attempt of one that was interrupted sooner than this after it began."""
    late_outputs_s: NonNegativeFloat = 600
    """How long after a run was cut off files that it still stored are looked for and removed."""


class Patience(Section):
    """For each priority class the seconds of waiting after which a job is no longer overtaken by any that came later.

    Before, a more urgent class goes first, and within a class on a group of ranks whichever has the least work left.
    """

    interactive: NonNegativeFloat = 60
    standard: NonNegativeFloat = 900
    batch: NonNegativeFloat = 6 * 3600

    @model_validator(mode="after")
    def _order(self) -> Patience:
        if not self.interactive <= self.standard <= self.batch:
            given = f"{self.interactive:g}, {self.standard:g}, {self.batch:g}"
            raise ValueError(f"has {given}, expected interactive <= standard <= batch")
        return self


class Webhooks(Section):
    """Who is told over HTTP that a video has ended, and how often it is tried. Mails are tried on the same schedule."""

    endpoints: PositiveInt = 20
    """How many each key may have."""
    allow_http: bool = False
    """Whether an endpoint's URL may be `http`, which neither hides nor protects what is sent."""
    allow_networks: tuple[IPvAnyNetwork, ...] = ()
    """Networks that are not public and may be called all the same, e.g. `[10.20.0.0/16]`. Everybody who may create
    endpoints can then send requests into them."""
    ca_file: str = ""
    """PEM file of certificate authorities that are trusted besides the usual ones."""
    timeout_s: float = Field(20, gt=0, le=60)
    """Time for a receiver to answer, or a mail server to take a mail."""
    retries_s: tuple[NonNegativeFloat, ...] = Field(
        (0, 5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400), min_length=1, max_length=32
    )
    """Wait before each try, the first one included, up to a tenth more or less. After the last one it is given up."""
    concurrency: PositiveInt = 16
    """Deliveries that one dispatcher has under way at once."""
    retention_s: PositiveFloat = 7 * 86_400
    """How long events and the log of their deliveries are kept, and can be replayed."""

    @model_validator(mode="after")
    def _kept_while_tried(self) -> Webhooks:
        longest_s = 1.1 * sum(self.retries_s)
        if self.retention_s <= longest_s:
            raise ValueError(
                f"retention_s is {self.retention_s:g}, expected more than {longest_s:g} (all of retries_s)"
            )
        return self


class Mail(Section):
    """The SMTP server that takes mails to whoever asked for one when a video has ended."""

    host: str
    port: int = Field(587, ge=1, le=65_535)
    security: Literal["none", "starttls", "tls"] = "starttls"
    """`starttls`: refused where the server does not offer it. `tls`: from the first byte on, usually at port 465."""
    user: str = ""
    """Whom to log in as; the password is `$WAN_SERVE_MAIL_PASSWORD` of the dispatcher. Empty is no login."""
    sender: str
    """Address that the mails come from."""
    ca_file: str = ""
    """PEM file of certificate authorities that are trusted besides the usual ones."""

    @model_validator(mode="after")
    def _sender_is_an_address(self) -> Mail:
        if not is_mail_address(self.sender):
            raise ValueError(f"sender is {self.sender!r}, expected an address, name@domain")
        if self.user and self.security == "none":
            raise ValueError("security is 'none' with a user, expected 'starttls' or 'tls': the password would be open")
        return self


class Store(Section):
    """The database of jobs."""

    url: str = ""
    """A SQLAlchemy URL; empty is SQLite at `<home>/jobs.db`."""
    shared_disk: bool = False
    """All hosts see the same local disk, so SQLite may serve a cluster of several: for trying things out on one
    machine. A network file system is none: SQLite's locks do not hold there."""


class Queue(Section):
    """How dispatchers hear of jobs. The jobs themselves are in the store, whatever is chosen here."""

    transport: Literal["database", "rabbitmq"] = "database"
    """`database`: dispatchers ask the store every `dispatcher.poll_s`. `rabbitmq`: they are told, and ask the store
    every `poll_s` of this section only, or every `dispatcher.poll_s` while the broker is away."""
    url: str = ""
    """Of the broker, `amqp://user:password@host:5672/vhost` or `amqps://…`; empty is `$WAN_SERVE_QUEUE_URL`."""
    name: str = Field("wan-jobs", pattern=r"^[A-Za-z0-9._-]{1,200}$")
    """Of the queue; what cannot be read goes to `<name>.dead`."""
    poll_s: PositiveFloat = 15
    """With `rabbitmq`: how often the store is asked all the same, and after how long a job that still waits is
    announced again where the broker's queue is empty."""
    publish_timeout_s: PositiveFloat = 2
    """How long an announcement may take before the broker counts as away."""


class Retention(Section):
    """Seconds after which a job that has ended is forgotten, with its files. 0 keeps it until somebody deletes it."""

    completed_s: NonNegativeFloat = 7 * 86400
    failed_s: NonNegativeFloat = 7 * 86400


class Storage(Section):
    """Where videos and saved samples go. Access keys of S3 come from the environment (`AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, a web identity, a container's role) or from the instance."""

    url: str = ""
    """A folder, or `s3://bucket/prefix`; empty is `<home>/videos`."""
    endpoint: str = ""
    """URL of the S3 server, `http://` only where nobody else listens; empty is AWS."""
    public_endpoint: str = ""
    """URL under which those who download reach the S3 server, where it is not `endpoint`."""
    region: str = ""
    """Of the bucket; empty is `$AWS_REGION`, else us-east-1."""
    conditional_put: bool = True
    """Whether the S3 server knows `If-None-Match: *`, which keeps an object from being replaced even by a writer that
    comes at the same moment; without it a look beforehand has to do."""
    proxy: bool = False
    """Send videos through the gateway, instead of redirecting to a presigned URL of the S3 server."""
    presign_s: int = Field(900, ge=1, le=7 * 24 * 3600)
    """How long a presigned URL is valid."""
    timeout_s: PositiveFloat = 30
    """A request to the S3 server, which moves 8 MiB at most, fails after this long."""
    retry_s: NonNegativeFloat = 60
    """How long a request that failed is repeated before the call fails. A call ends at the latest this and `timeout_s`
    after the last request that got through."""
    min_free_mib: NonNegativeFloat = 512
    """Less free space than this on the disk of the folder, or of an SQLite database, and no more jobs are accepted."""

    @property
    def bucket(self) -> str:
        """The bucket that `url` names; empty for a folder."""
        return self._address[0]

    @property
    def prefix(self) -> str:
        """What all keys in the bucket begin with."""
        return self._address[1]

    @property
    def _address(self) -> tuple[str, str]:
        if not self.url.startswith("s3://"):
            return "", ""
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        return bucket, prefix.rstrip("/")

    @model_validator(mode="after")
    def _possible(self) -> Storage:
        if self.url.startswith("s3://"):
            if not _S3_URL.fullmatch(self.url):
                raise ValueError(f"url has value {self.url!r}, expected s3://bucket or s3://bucket/prefix")
            for name in ("endpoint", "public_endpoint"):
                value = getattr(self, name)
                if value and not _ENDPOINT.fullmatch(value):
                    raise ValueError(f"{name} has value {value!r}, expected https://host:port or http://host:port")
            return self
        if "://" in self.url.removeprefix("file://"):
            raise ValueError(f"url has value {self.url!r}, expected a folder or s3://bucket/prefix")
        for name in ("endpoint", "public_endpoint", "region"):
            if value := getattr(self, name):
                raise ValueError(f"{name} has value {value!r}, expected none, because url is not s3://bucket/prefix")
        return self


class Config(Section):
    """All options of a deployment."""

    home: str = ""
    """Folder of everything that outlives the process; empty is `$WAN_SERVE_HOME`, else `./data`."""
    model: Model = Model()
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    encoder: Encoder = Encoder()
    denoiser: Denoiser = Denoiser()
    decoder: Decoder = Decoder()
    pipeline: Pipeline = Pipeline()
    gateway: Gateway = Gateway()
    auth: Auth = Auth()
    dispatcher: Dispatcher = Dispatcher()
    patience: Patience = Patience()
    store: Store = Store()
    queue: Queue = Queue()
    retention: Retention = Retention()
    storage: Storage = Storage()
    webhooks: Webhooks = Webhooks()
    mail: Mail | None = None
    """None: no mails are sent, and requests that want one are refused."""

    @model_validator(mode="after")
    def _defaults_within_limits(self) -> Config:
        d, limit = self.defaults, self.limits
        for option, value, most in (
            ("width x height", d.width * d.height, limit.pixels),
            ("num_frames", d.num_frames, limit.num_frames),
            ("num_inference_steps", d.num_inference_steps, limit.num_inference_steps),
            ("fps", d.fps, limit.fps),
        ):
            if value > most:
                raise ValueError(f"defaults: {option} is {value}, expected at most limits' {most}")
        return self

    @property
    def home_path(self) -> Path:
        """The folder that `home` names, absolute."""
        return Path(self.home or os.environ.get("WAN_SERVE_HOME") or "data").expanduser().absolute()

    @property
    def store_url(self) -> str:
        """The SQLAlchemy URL of the job store."""
        return self.store.url or f"sqlite+aiosqlite:///{self.home_path / 'jobs.db'}"

    @property
    def queue_url(self) -> str:
        """The URL of the broker.

        Raises:
            ConfigError: none is given.
        """
        url = self.queue.url or os.environ.get("WAN_SERVE_QUEUE_URL", "")
        if not url.startswith(("amqp://", "amqps://")):
            said = "no URL of RabbitMQ" if url else "value ''"  # what it is instead may hold a password
            raise ConfigError(f"queue.url has {said}, expected amqp://user:password@host:5672/vhost")
        return url

    @property
    def storage_url(self) -> str:
        """Where videos are kept."""
        return self.storage.url or str(self.home_path / "videos")

    @property
    def storage_options(self) -> Storage:
        """The storage section with its `url` filled in."""
        return self.storage.model_copy(update={"url": self.storage_url})


def validate(args: dict[str, Any], where: str = "args") -> Config:
    """The configuration in `args`.

    Raises:
        ConfigError: one line for each option at fault, with its value and what was expected.
    """
    try:
        return Config.model_validate(args)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, where) for e in error.errors())) from None


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


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from the same machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _known(mapping: Any, keys: set[str], where: str) -> None:
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where}: has value {mapping!r}, expected a mapping")
    for key in mapping:
        if key not in keys:
            raise ConfigError(f"{where}: unknown option {key!r}, expected one of {', '.join(sorted(keys))}")


def _explain(error: Any, where: str) -> str:
    option = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown option {option!r}"
    subject = f"{where}: {option}" if option else where
    value = "" if isinstance(error["input"], dict) else f" has value {error['input']!r}"
    return f"{subject}{value}: {error['msg'].removeprefix('Value error, ')}"
