"""The builders that the YAML files name: `serve_app.app:wan` and `serve_app.app:gateway`.

Each takes the whole configuration as its `args` and returns a Serve application.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from serve_app.capacity import needs
from serve_app.compute import SEE_ALL_GPUS
from serve_app.config import Autoscaling, Config, ParallelConfig, Resources, below, home_of, placed, validate
from serve_app.errors import CheckpointError, ConfigError, InvalidRequest, without_password
from serve_app.jobs.forecast import boundary_step
from serve_app.logs import get_logger
from serve_app.model import fit, open_model
from serve_app.request import VideoRequest, resolve
from serve_app.shortage import shortages
from serve_app.wan.parallel.mesh import Mesh, default_mesh
from serve_app.wan.weights.checkpoint import Checkpoint
from serve_app.wan.weights.sharded import ShardedCheckpoint

logger = get_logger(__name__)

# glibc returns each large tensor to the kernel and asks for memory again. A VAE on CPUs makes such tensors in every
# layer: this was measured as a seventh of the decode time.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 28), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
# Tries to start a replica. A model that does not load, or a bucket that is missing, fails at the twentieth try as well.
_STARTS = 3


def wan(args: dict[str, Any]) -> Application:
    """Build the application of pipeline and stages. It has no route: the dispatcher and other Ray jobs call its handle.

    Raises:
        ConfigError: an option cannot work, or the folder of `model.path` or `model.sharded` is incomplete or does not
            fit.
    """
    from serve_app.stages.decoder import Decoder
    from serve_app.stages.denoiser import Denoiser
    from serve_app.stages.encoder import Encoder
    from serve_app.stages.pipeline import Pipeline

    config = _config(args, gateway=False)
    checkpoint = open_model(config)
    config = fit(config, checkpoint)
    _check_parallel(config.denoiser.parallel, checkpoint)
    _check_sharded(config, checkpoint)
    encoder = _deployment(
        Encoder,
        ray_actor_options=_actor(config.encoder.resources),
        **_stage(config.encoder, _by_work(config, "encoder", config.encoder.autoscaling)),
        graceful_shutdown_timeout_s=60,
    ).bind(config)
    denoisers = [_denoiser(Denoiser, config).bind(config)]
    if config.denoiser.experts == "split":
        if not checkpoint.has_two_experts:
            raise ConfigError(f"denoiser.experts has value 'split', but {checkpoint.folder} has one expert")
        low = config.denoiser.low_noise_autoscaling or config.denoiser.autoscaling
        share = _high_noise_share(config)
        high = config.denoiser.autoscaling
        denoisers = [
            _denoiser(Denoiser, config)
            .options(name=name, autoscaling_config=_autoscaling(options, _by_work(config, "denoiser", options, part)))
            .bind(config, (expert,))
            for name, expert, options, part in (
                ("HighNoiseDenoiser", "transformer", high, share),
                ("LowNoiseDenoiser", "transformer_2", low, 1 - share),
            )
        ]
    decoder = _deployment(
        Decoder,
        ray_actor_options=decoder_actor(config),
        **_stage(config.decoder, _by_work(config, "decoder", config.decoder.autoscaling)),
        graceful_shutdown_timeout_s=60,
    ).bind(config)
    made_by = {"model": config.model.name, "revision": checkpoint.revision}
    return _deployment(
        Pipeline,
        ray_actor_options={"num_cpus": config.pipeline.num_cpus},
        autoscaling_config=_autoscaling(config.pipeline.autoscaling),
        max_ongoing_requests=config.pipeline.max_ongoing_requests,
        graceful_shutdown_timeout_s=config.denoiser.shutdown_timeout_s,
    ).bind(
        encoder,
        denoisers[0],
        decoder,
        *denoisers[1:],
        store_wait_s=config.decoder.store_wait_s,
        finisher=_finisher(config, made_by),
        finishing=config.finisher,
    )


def gateway(args: dict[str, Any]) -> Application:
    """Build the application of HTTP gateway and dispatcher. They need only the model's shape, for estimates.

    Raises:
        ConfigError: an option cannot work.
    """
    from serve_app.db.database import Database
    from serve_app.dispatch.deployment import DispatcherDeployment
    from serve_app.gateway.ingress import Gateway

    config, expert = _with_model(_config(args, pipeline=False))
    _check_defaults(config)
    Database(config.store_url)
    dispatcher = _deployment(
        DispatcherDeployment,
        num_replicas=1,
        ray_actor_options={"num_cpus": config.dispatcher.num_cpus},
        max_constructor_retry_count=_STARTS,
    ).bind(config, expert)
    return _deployment(
        Gateway,
        num_replicas=config.gateway.num_replicas,
        ray_actor_options={"num_cpus": config.gateway.num_cpus},
        max_ongoing_requests=config.gateway.max_ongoing_requests,
        max_constructor_retry_count=_STARTS,
    ).bind(config, dispatcher, expert)


def _high_noise_share(config: Config) -> float:
    """Return the part of the steps that the high-noise expert makes of a video with the default parameters."""
    params = resolve(VideoRequest(prompt="x"), config)
    return boundary_step(params) / params.num_inference_steps


def _config(args: dict[str, Any], **parts: bool) -> Config:
    """Return the configuration in `args` with absolute paths, since each deployment works in another folder.

    Args:
        args: the `args` of the application in the YAML file.
        **parts: the applications whose needs are checked, as for `needs`.

    Raises:
        ConfigError: an option cannot work, or a path is relative although Ray calls the builder.
    """
    config = validate(args)
    # With `serve run FILE` a Ray task builds the application. It knows neither the file nor the caller's folder.
    if ray.is_initialized() and ray.get_runtime_context().get_task_id() is not None:
        config = placed(config, _absolute)
        logger.info("paths", extra={"home": config.home, "store": without_password(config.store_url)})
        for line in shortages(needs(config, **parts)):
            # A warning, not an error: hosts may be added later, and Serve would not try again.
            logger.warning("no host has what is asked for", extra={"reason": line})
        return config
    return placed(config, below(Path.cwd()))


def _absolute(option: str, path: str) -> Path:
    if not (found := home_of(option, path)).is_absolute():
        raise ConfigError(
            f"{option} has value {path!r}, expected an absolute path: with `serve run` a process of Ray reads it, in "
            "another folder; `wan-serve up` takes it as relative to the file"
        )
    return found


def _check_defaults(config: Config) -> None:
    """Check that the defaults make a valid request; otherwise every request with only a prompt would get a 400."""
    try:
        resolve(VideoRequest(prompt="x"), config)
    except InvalidRequest as error:
        raise ConfigError(f"defaults: {error.message}") from None


def _with_model(config: Config) -> tuple[Config, dict[str, Any] | None]:
    """Return the options completed from the model, and the configuration of its experts.

    If the model's folder cannot be read, the options stay as they are and the second value is None; `wan` refuses that.
    """
    try:
        checkpoint = open_model(config)
        return fit(config, checkpoint), checkpoint.expert_config("transformer")
    except ConfigError:
        return config, None


def _check_parallel(parallel: ParallelConfig, checkpoint: Checkpoint) -> None:
    """Check that the ranks of a group can share the model, before any of them starts."""
    for expert in checkpoint.experts:
        shape = checkpoint.expert_config(expert)
        if (mesh := Mesh.of(parallel)) is not None:
            mesh.check_fits(shape)
        else:
            default_mesh(parallel.size, shape, weight_bytes=lambda tensor: 0, device_bytes=1)


def _check_sharded(config: Config, checkpoint: Checkpoint) -> None:
    """Check that the sharded checkpoint has a file for every rank, before any of them starts."""
    parallel = config.denoiser.parallel
    if config.model.sharded_folder is not None:
        if parallel.ranks is not None:
            raise ConfigError(
                f"denoiser.parallel.ranks has value {parallel.ranks} and model.sharded is given, expected "
                "denoiser.parallel.tensor, the number that the shards were made for"
            )
        try:
            sharded = ShardedCheckpoint(config.model.sharded_folder, checkpoint, parallel.tensor, config.model.dtype)
            for expert in checkpoint.experts:
                for shard in range(parallel.tensor):
                    sharded.check_shard(expert, shard)
        except CheckpointError as error:
            raise ConfigError(f"model.sharded has value {config.model.sharded!r}: {error}") from None


def _deployment(deployment: Any, **options: Any) -> Any:
    return deployment.options(**options)


def _denoiser(deployment: Any, config: Config) -> Any:
    """Return the denoiser's deployment, with a bundle for the coordinator and then one for each rank."""
    stage = config.denoiser
    rank = _bundle(stage.rank)
    labels: dict[str, Any] = {}
    if stage.rank.labels:  # also for the coordinator, which stays with its ranks
        labels["placement_group_bundle_label_selector"] = [stage.rank.labels] * (1 + stage.parallel.size)
    return _deployment(
        deployment,
        ray_actor_options={"num_cpus": stage.coordinator_cpus},
        placement_group_bundles=[{"CPU": stage.coordinator_cpus}] + [rank] * stage.parallel.size,
        placement_group_strategy=stage.placement,
        **labels,
        request_router_config=RequestRouterConfig(request_router_class="serve_app.stages.router:EmptiestGroup"),
        **_stage(stage, _by_work(config, "denoiser", stage.autoscaling)),
        graceful_shutdown_timeout_s=stage.shutdown_timeout_s,
    )


def _finisher(config: Config, made_by: dict[str, str]) -> Application | None:
    """Return the finisher's deployment, which has no process until it is asked for; None if it is not to be."""
    from serve_app.stages.finisher import Finisher

    stage = config.finisher
    if not stage.enabled:
        return None
    deployment = _deployment(
        Finisher, ray_actor_options=_actor(stage.resources), **_stage(stage, None), graceful_shutdown_timeout_s=600
    )
    application: Application = deployment.bind(config, made_by)
    return application


def _stage(stage: Any, policy: AutoscalingPolicy | None) -> dict[str, Any]:
    return {
        "autoscaling_config": _autoscaling(stage.autoscaling, policy),
        "max_ongoing_requests": stage.max_ongoing_requests,
        "health_check_period_s": stage.health_check_period_s,
        "health_check_timeout_s": stage.health_check_timeout_s,
        "max_constructor_retry_count": _STARTS,
    }


def _autoscaling(options: Autoscaling, policy: AutoscalingPolicy | None = None) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=options.min_replicas,
        max_replicas=options.max_replicas,
        target_ongoing_requests=options.target_queue_length,
        upscale_delay_s=options.upscale_delay_s,
        downscale_delay_s=options.downscale_delay_s,
        look_back_period_s=options.look_back_s,
        **({} if policy is None else {"policy": policy}),
    )


def _by_work(config: Config, stage: str, options: Autoscaling, share: float = 1.0) -> AutoscalingPolicy | None:
    """Return the policy of a stage that is scaled by the work in the queue; None if it is not."""
    if options.by != "work":
        return None
    denoiser = config.denoiser
    if stage == "denoiser":
        bundles = [{"CPU": denoiser.coordinator_cpus}, *[_bundle(denoiser.rank)] * denoiser.parallel.size]
    else:
        bundles = [_bundle((config.encoder if stage == "encoder" else config.decoder).resources)]
    return AutoscalingPolicy(
        policy_function="serve_app.scaling.policy:WorkPolicy",
        policy_kwargs={
            "store_url": config.store_url,
            "stage": stage,
            "target_wait_s": (options if stage == "denoiser" else denoiser.autoscaling).target_wait_s.model_dump(),
            "places": denoiser.resident_samples,
            "bundles": bundles,
            "one_host": denoiser.placement == "STRICT_PACK" or stage != "denoiser",
            "bounded": not options.cluster_grows,
            "share": share,
            "most_groups": denoiser.autoscaling.max_replicas,
            "poll_s": options.poll_s,
        },
    )


def decoder_actor(config: Config) -> dict[str, Any]:
    """Return Ray's actor options for a replica of the decoder."""
    stage = config.decoder
    shared = stage.devices > 1 and stage.resources.num_gpus < 1
    environment = {**_KEEP_FREED_MEMORY, **(SEE_ALL_GPUS if shared else {})}
    return {**_actor(stage.resources), "runtime_env": {"env_vars": environment}}


def _actor(need: Resources) -> dict[str, Any]:
    options = {"num_cpus": need.num_cpus, "num_gpus": need.num_gpus, "resources": need.resources}
    return {**options, "label_selector": need.labels} if need.labels else options


def _bundle(need: Resources) -> dict[str, float]:
    bundle = {"CPU": need.num_cpus, "GPU": need.num_gpus, **need.resources}
    return {name: amount for name, amount in bundle.items() if amount}
