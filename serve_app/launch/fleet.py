"""The replicas that run on a Ray, with what each says of itself: for people, by `wan-serve status`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray

from serve_app.compat.ray import serve_client
from serve_app.errors import ServeAppError, one_line
from serve_app.stages.status_board import key_of, read_board

_STAGES = ("Encoder", "Denoiser", "HighNoiseDenoiser", "LowNoiseDenoiser", "Decoder", "Finisher")
_STATES = {"STARTING": "loading", "UPDATING": "loading", "RECOVERING": "loading", "RUNNING": "running"}


@dataclass(frozen=True)
class Replica:
    """A replica of a stage.

    Attributes:
        application, deployment: where it belongs.
        id: Serve's, unique in its deployment.
        state: `loading`, `running`, `stopping` or Serve's own word.
        host: its host's address; empty while it has none.
        seconds: since it was started.
        note: what it says of itself, see `StatusBoard`; empty if nothing yet.
        note_s: seconds since it said so.
    """

    application: str
    deployment: str
    id: str
    state: str
    host: str
    seconds: float
    note: dict[str, Any] = field(default_factory=dict)
    note_s: float = 0.0

    @property
    def group(self) -> bool:
        """True if it is a group of ranks."""
        return self.deployment not in ("Encoder", "Decoder", "Finisher")

    def plain(self) -> dict[str, Any]:
        """Return it as plain values."""
        return dict(vars(self))


def _word(state: Any) -> str:
    """Return a state of Serve, one of its enumeration or its name, as our word."""
    name = str(getattr(state, "value", state))
    return _STATES.get(name, name.lower())


def join(address: str) -> None:
    """Join a Ray to look at it.

    Raises:
        ServeAppError: it cannot be reached, or Serve does not run there.
    """
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ServeAppError(f"--ray has value {address!r}, expected a running Ray: {one_line(error)}") from None
    if serve_client(needed=False) is None:
        raise ServeAppError(f"--ray has value {address!r}, expected a Ray on which Serve runs")


def replicas() -> list[Replica]:
    """Return the replicas of all stages on the Ray that this process has joined."""
    details = serve_client().get_serve_details()
    board, now = read_board(), time.time()
    return list(_replicas(details["applications"], board, now))


def _replicas(applications: dict[str, Any], board: dict[str, dict[str, Any]], now: float) -> Iterator[Replica]:
    for application, detail in applications.items():
        for name in _STAGES:
            deployment = detail["deployments"].get(name)
            for one in () if deployment is None else deployment["replicas"]:
                note = dict(board.get(key_of(application, name, one["replica_id"]), {}))
                said = note.pop("at", now)
                began = one.get("start_time_s") or now
                yield Replica(
                    application,
                    name,
                    one["replica_id"],
                    _word(one["state"]),
                    one.get("node_ip") or "",
                    max(0.0, now - began),
                    note,
                    max(0.0, now - said),
                )
