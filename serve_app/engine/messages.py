"""What a group's coordinator and its ranks tell one another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serve_app.errors import ServeAppError


class OutOfMemory(ServeAppError):
    """A step did not fit into memory. No sample has changed.

    Args:
        message: what was refused.
        exchanged: messages between ranks that the step had begun until then.
    """

    def __init__(self, message: str, exchanged: int = 0) -> None:
        super().__init__(message, exchanged)
        self.exchanged = exchanged

    def __str__(self) -> str:
        return str(self.args[0])


class DeviceBroken(ServeAppError):
    """The device failed in a way that this process cannot go on from."""


@dataclass(frozen=True)
class Admitted:
    """What the scheduler needs of a new sample; `Entry` says what each field is.

    `refused` says why a saved state was not used, the sample then being at step 0; None if it was, or none was given.
    """

    tokens: int
    step: int
    steps: int
    boundary: int
    work: float
    step_mib: float
    state_mib: float
    refused: str | None


@dataclass(frozen=True)
class StepRequest:
    """One step: who advances, whose state leaves the device before, and whose is saved after (id to storage prefix)."""

    advance: list[str]
    park: list[str] = field(default_factory=list)
    save: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StepResult:
    """A step is done: its seconds, and for samples that did not survive it, why."""

    seconds: float
    failed: dict[str, str]


@dataclass(frozen=True)
class Survey:
    """What a mesh is picked by: an expert's configuration; bytes of the weights that a rank would hold, by the
    size of tensor parallelism, and of its device's memory, as much as it may take."""

    shape: dict[str, Any]
    weight_bytes: dict[int, float]
    device_bytes: float


@dataclass(frozen=True)
class RankStatus:
    """A sign of life.

    `busy_s` says for how many seconds the present step has been running (None: idle); `samples` how many are held;
    `rss_mib` and `device_mib` the memory of the process and of its tensors on a GPU; `weights_mib` that of the experts'
    parameters on the device; `retries` how often memory of a GPU was given back and asked for anew, since what was held
    did not do: steps wait for that, and a share of the device that is a little larger avoids it.
    """

    node_id: str
    pid: int
    busy_s: float | None
    samples: int
    rss_mib: float
    device_mib: float
    weights_mib: float
    retries: int
