"""The search for a Ray to join. It takes seconds and joins nothing.

`ray.init` needs minutes, in C++, for an address where nothing is left or a control process that hangs. So the control
process (the GCS) is asked first whether it lives, and whether a node of its cluster runs here.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import ray
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest, GetAllNodeInfoRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from serve_app.compat.ray import (
    bootstrap_address,
    control_addresses,
    enable_token_auth,
    grpc_channel,
    last_started_address,
    node_ids,
)
from serve_app.errors import ConfigError, ServeAppError

_ANSWER_S = 5
# A Ray that is starting or ending has done so after this long.
_SETTLE_S = 10
_INSTEAD = "start a Ray beside it with --own-ray"


@dataclass(frozen=True)
class Address:
    """The address where a Ray may run, and the source of that knowledge."""

    host_port: str
    source: str
    wished: bool  # named by the user, who must not get another Ray instead

    def __str__(self) -> str:
        return f"the Ray at {self.host_port} ({self.source})"


class RayAway(ServeAppError):
    """An error that says why a Ray cannot be joined, and what to do.

    Args:
        message: the error's text.
        nothing_there: nothing listens at the address.
        may_change: the Ray may be starting or ending.
    """

    def __init__(self, message: str, *, nothing_there: bool = False, may_change: bool = False) -> None:
        super().__init__(message)
        self.nothing_there = nothing_there
        self.may_change = may_change


def find(say: Callable[[str], None]) -> Address | None:
    """Return the Ray to join: the one of RAY_ADDRESS, else one that runs on this machine; None if there is none.

    Args:
        say: called with a line if an address is left out, since its Ray has ended.

    Raises:
        ConfigError: RAY_ADDRESS has a value that cannot work.
        ServeAppError: there is a Ray, but it cannot be joined.
    """
    wish = os.environ.get("RAY_ADDRESS", "")
    if wish == "local":
        return None
    if wish not in ("", "auto"):
        address = _wished(wish)
        _check_for_a_while(address)
        return address
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it warns of what it does by default
    enable_token_auth()
    for address in _seen_here():
        try:
            _check_for_a_while(address)
        except RayAway as away:
            if not away.nothing_there or address.host_port in _raylets():
                raise
            say(f"{address} has ended; `ray stop` forgets it")
        else:
            return address
    if wish:
        raise ConfigError(f"RAY_ADDRESS has value {wish!r}, expected a Ray that runs on this machine: there is none")
    return None


def _wished(wish: str) -> Address:
    expected = "expected host:port of a Ray's control process, `auto` or `local`"
    if "://" in wish:
        kind = "Ray Client's address, by which nothing can be served" if wish.startswith("ray://") else "a URL"
        raise ConfigError(f"RAY_ADDRESS has value {wish!r}, which is {kind}, {expected}")
    host, colon, port = wish.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"RAY_ADDRESS has value {wish!r}, {expected}")
    try:
        return Address(bootstrap_address(wish) or wish, f"RAY_ADDRESS={wish}", wished=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"RAY_ADDRESS has value {wish!r}, {expected}: {error}") from None


def _seen_here() -> list[Address]:
    """Return the Rays that this machine knows: first that of the last `ray start`, then those whose nodes run here."""
    found = []
    if last := last_started_address():
        found.append(Address(last, "the last `ray start` here", wished=False))
    found += [Address(one, "a node of it runs here", wished=False) for one in _raylets() if one != last]
    return found


def _raylets() -> list[str]:
    return sorted(control_addresses())


def _check_for_a_while(address: Address) -> None:
    """Check a Ray as `check_can_join` does, again while it may be starting or ending."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        try:
            return check_can_join(address)
        except RayAway as away:
            # Where nothing listens, only nodes that still run here are a sign that something may change.
            if away.nothing_there and address.host_port not in _raylets():
                raise
            if not away.may_change or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def answers(host_port: str) -> bool:
    """Tell whether a control process answers there at the moment."""
    channel = grpc_channel(host_port, [("grpc.enable_http_proxy", 0)])
    try:
        NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=_ANSWER_S)
    except grpc.RpcError:
        return False
    finally:
        channel.close()
    return True


def check_can_join(address: Address) -> None:
    """Check that a Ray can be joined from this machine.

    Raises:
        RayAway: it cannot.
    """
    channel = grpc_channel(address.host_port, [("grpc.enable_http_proxy", 0)])
    try:
        nodes = NodeInfoGcsServiceStub(channel)
        version = nodes.CheckAlive(CheckAliveRequest(), timeout=_ANSWER_S).ray_version
        alive = nodes.GetAllNodeInfo(GetAllNodeInfoRequest(state_filter=GcsNodeInfo.ALIVE), timeout=_ANSWER_S)
    except grpc.RpcError as error:
        raise _away(address, error) from None
    finally:
        channel.close()
    if version != ray.__version__:
        raise RayAway(f"{address} has version {version}, expected {ray.__version__}; {_INSTEAD}")
    here = node_ids()
    raylets = [
        f"{node.node_manager_address}:{node.node_manager_port}"
        for node in alive.node_info_list
        if node.node_id.hex() in here
    ]
    if not raylets:
        raise RayAway(
            f"{address} has no living node on this machine: run `ray start --address={address.host_port}` first, or "
            + _INSTEAD,
            may_change=True,
        )
    for raylet in raylets:
        _check_raylet(address, raylet)


def _check_raylet(address: Address, raylet: str) -> None:
    """Check that a node's own process answers, since `ray.init` would wait for it."""
    channel = grpc_channel(raylet, [("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(timeout=_ANSWER_S)
    except grpc.FutureTimeoutError:
        raise RayAway(
            f"the node of {address} on this machine, {raylet}, does not answer within {_ANSWER_S} s: end it with "
            f"`ray stop --force`, or {_INSTEAD}",
            may_change=True,
        ) from None
    finally:
        channel.close()


def _away(address: Address, error: grpc.RpcError) -> RayAway:
    code = error.code()
    if code == grpc.StatusCode.UNAUTHENTICATED:
        mode = os.environ.get("RAY_AUTH_MODE", "")
        do = "RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN has another" if mode == "token" else "export RAY_AUTH_MODE=token"
        return RayAway(f"{address} asks for its token: {do}")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        do = f"end it with `ray stop --force`, or {_INSTEAD}"
        return RayAway(f"{address} does not answer within {_ANSWER_S} s: {do}", may_change=True)
    if address.wished:
        do = f"start it, correct or unset RAY_ADDRESS, or {_INSTEAD}"
    else:
        do = f"wait until it has started or ended, end it with `ray stop --force`, or {_INSTEAD}"
    gone = code == grpc.StatusCode.UNAVAILABLE
    return RayAway(f"nothing answers for {address}: {do}", nothing_there=gone, may_change=gone)
