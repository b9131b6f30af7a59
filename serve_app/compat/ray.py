"""Private names of Ray. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# --- Ray 2.60: actors ---


def actor_id(handle: Any) -> str:
    """Return the id of the actor behind a handle, in hexadecimal digits.

    Uses `ActorHandle._actor_id`. Without it two handles of one process cannot be told to be of the same one.
    """
    return str(handle._actor_id.hex())


def actor_ready(handle: Any) -> Any:
    """Ask an actor whether it lives. Returns an awaitable reference, which raises `ActorDiedError` if it does not.

    Uses the method `__ray_ready__` that Ray gives to every actor. Without it the actor's class needs such a method.
    """
    return handle.__ray_ready__.remote()


# --- Ray 2.60: the key-value store of its control process ---

_NOTES = b"wan-serve"


def put_note(key: str, value: bytes) -> None:
    """Keep a few bytes where every process of the cluster finds them, until the cluster ends.

    Uses `ray.experimental.internal_kv`. Without it `wan-serve status` knows nothing of replicas but that they run.
    """
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key.encode(), value, overwrite=True, namespace=_NOTES)


def notes() -> dict[str, bytes]:
    """Return all that `put_note` keeps, by key."""
    from ray.experimental import internal_kv

    keys = internal_kv._internal_kv_list(b"", namespace=_NOTES)
    found = {key.decode(): internal_kv._internal_kv_get(key, namespace=_NOTES) for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def remove_note(key: str) -> None:
    """Forget what `put_note` keeps under a key."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(key.encode(), namespace=_NOTES)


# --- Ray 2.60: nodes ---


def free_resources() -> list[dict[str, float]]:
    """Return the resources of each living host that nobody has reserved. Blocks for an answer of the GCS.

    Uses `ray._private.state.available_resources_per_node`. Without it only sums over all hosts are known, from
    `ray.available_resources`, and a group that needs one host may be asked for in vain.
    """
    from ray._private.state import available_resources_per_node

    return [
        {str(name): float(amount) for name, amount in host.items()} for host in available_resources_per_node().values()
    ]


# --- Ray 2.60: Serve ---


def serve_controller() -> Any:
    """Return the handle of Serve's controller.

    Uses `ray.serve._private.constants`. Without it a replica does not learn that Serve is about to stop it.

    Raises:
        ValueError: there is no controller at this moment.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)


def replicas_key(deployment_id: Any) -> tuple[Any, Any]:
    """Return the key under which Serve's controller tells of changes in the replicas of a deployment.

    Uses `ray.serve._private.long_poll.LongPollNamespace`. Without it see `serve_controller`.
    """
    from ray.serve._private.long_poll import LongPollNamespace

    return LongPollNamespace.DEPLOYMENT_TARGETS, deployment_id


def serve_client(*, needed: bool = True) -> Any:
    """Return the client of the Serve instance on the Ray that this process has joined.

    Uses `ray.serve.context._get_global_client`, and of what it returns `SERVE_CLIENT`. Without it only `serve.status`
    is left, which tells neither routes nor versions nor where the proxy listens.

    Args:
        needed: raise where there is no Serve; else return None.

    Raises:
        RayServeException: there is no Serve, or it has ended.
    """
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=needed)


SERVE_CLIENT = ("http_config", "get_serve_details", "list_serve_statuses", "get_deployment_info", "delete_apps")
"""Attributes and methods that are used of the client that `serve_client` returns."""


def set_version(application: Any, version: str) -> None:
    """Give the ingress deployment of a Serve application a version, which the controller keeps and tells.

    Uses `Application._bound_deployment` and `Deployment._version`. Without it a server cannot tell its own applications
    from those that somebody else has deployed since under the same name.
    """
    application._bound_deployment._version = version


def ingress_name(application: Any) -> str:
    """Return the name of the ingress deployment of a Serve application.

    Uses `Application._bound_deployment`. Without it see `set_version`.
    """
    return str(application._bound_deployment.name)


# --- Ray 2.60: finding and joining a Ray ---


def bootstrap_address(wish: str) -> str | None:
    """Return the `host:port` that Ray makes of a value of `RAY_ADDRESS`.

    Uses `ray._private.services.canonicalize_bootstrap_address`. Without it a wrong name of a host is noticed
    only by the timeout of `ray.init`.

    Raises:
        OSError: the host is not known.
        ValueError: it is no address.
    """
    from ray._private import services

    address: str | None = services.canonicalize_bootstrap_address(wish)
    return address


def control_addresses() -> set[str]:
    """Return the `host:port` of the control process of each Ray of which a node runs on this machine.

    Uses `ray._private.services.find_gcs_addresses` and its cache. Without it a Ray that runs here is found only if
    `RAY_ADDRESS` names it.
    """
    from ray._private import services

    services.find_gcs_addresses.cache_clear()
    return set(services.find_gcs_addresses())


def node_ids() -> set[str]:
    """Return the ids of all Ray nodes that run on this machine, in hexadecimal digits.

    Uses `ray._private.services.find_node_ids`. Without it a Ray without a node here is noticed only by the timeout of
    `ray.init`.
    """
    from ray._private import services

    return set(services.find_node_ids())


def last_started_address() -> str | None:
    """Return the address that the last `ray start` on this machine has noted, None where `ray stop` has cleared it.

    Uses `ray._private.utils.read_ray_address`. Without it see `control_addresses`.
    """
    from ray._private.utils import read_ray_address

    address: str | None = read_ray_address()
    return address


def grpc_channel(address: str, options: list[tuple[str, Any]]) -> Any:
    """Return a gRPC channel to a Ray process, with the cluster's TLS and access token.

    Uses `ray._private.grpc_utils.init_grpc_channel`. Without it a Ray that needs a token or TLS cannot be asked before
    `ray.init` waits for it.
    """
    from ray._private.grpc_utils import init_grpc_channel

    return init_grpc_channel(address, options)


def dead_processes() -> set[str]:
    """Return the kinds of processes, such as `gcs_server`, that have died of the Ray that this process started.

    Uses `ray._private.worker._global_node`. Without it a server would go on waiting for a Ray that has ended.
    """
    from ray._private import worker

    node = worker._global_node
    return set() if node is None else {kind for kind, _ in node.dead_processes()}


def enable_token_auth() -> None:
    """Use this machine's access token for Ray if there is one, and say nothing where there is none.

    Uses `ray._private.authentication`. Without it a Ray that needs a token cannot be asked before `ray.init`.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def token_auth_enabled() -> bool:
    """Tell whether this process uses an access token for Ray.

    Uses `ray._private.authentication`. Without it users are not told what another shell has to export.
    """
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


@contextmanager
def any_agent_port() -> Iterator[None]:
    """Let a Ray that is started meanwhile choose any free port for its agent.

    Uses `ray._private.parameter.RayParams`. Without it the agent of a second Ray on a machine takes no jobs, since it
    cannot have the usual port: `ray start` has an option for it, `ray.init` has none.
    """
    import functools

    from ray._private import parameter

    with_usual_port = parameter.RayParams
    parameter.RayParams = functools.partial(with_usual_port, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = with_usual_port
