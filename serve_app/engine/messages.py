"""Requests of a group's coordinator to its ranks, and their answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serve_app.device_memory import DeviceMemory


@dataclass(frozen=True)
class Admitted:
    """A new sample as the scheduler needs to know it; `Entry` says what each field is.

    `refused` says why a saved state was not used and the sample begins at step 0. It is None if the state was used, or
    none was given.
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
    """One denoising step of some samples, all of one cohort.

    Attributes:
        advance: ids of the samples that make the step.
        park: ids of samples whose state leaves the device before it.
        save: samples whose state is saved after it, from id to storage prefix.
    """

    advance: list[str]
    park: list[str] = field(default_factory=list)
    save: dict[str, str] = field(default_factory=dict)

    def to_wire(self) -> list[Any]:
        """Return lists and mappings alone: pickling classes both ways was a tenth of what is added to every step."""
        return [self.advance, self.park, self.save]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> StepRequest:
        """Return the request that `to_wire` was called on."""
        return cls(*wire)


@dataclass(frozen=True)
class StepResult:
    """A step that is done.

    Attributes:
        seconds: how long it took on the rank.
        failed: samples that did not survive it, from id to reason.
        headroom: share of the rank's memory that it has left.
        largest: the component that takes most of it, in words, where little is left.
    """

    seconds: float
    failed: dict[str, str]
    headroom: float = 1.0
    largest: str = ""

    def to_wire(self) -> list[Any]:
        """Return lists and mappings alone, as `StepRequest.to_wire` does."""
        return [self.seconds, self.failed, self.headroom, self.largest]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> StepResult:
        """Return the result that `to_wire` was called on."""
        return cls(*wire)


@dataclass(frozen=True)
class Survey:
    """Facts about model and device, by which a mesh is picked.

    Attributes:
        shape: configuration of an expert.
        weight_bytes: bytes of the weights that a rank would hold, by the size of tensor parallelism.
        device_bytes: bytes of its device's memory that the rank may take.
    """

    shape: dict[str, Any]
    weight_bytes: dict[int, float]
    device_bytes: float


@dataclass(frozen=True)
class Loaded:
    """A rank that has loaded its shard.

    Attributes:
        seconds: how long that took.
        peak_rss_mib: the most memory that its process held.
    """

    seconds: float
    peak_rss_mib: float


@dataclass(frozen=True)
class RankStatus:
    """A rank's answer to a health check.

    Attributes:
        node_id: Ray's id of its host.
        pid: its process there.
        busy_s: for how many seconds the present step has been running; None if no step is.
        samples: how many it holds.
        rss_mib: memory of its process.
        device_mib: memory of its tensors on a GPU.
        weights_mib: memory of the experts' parameters on the device.
        memory: all of it on its device, by component.
        retries: how often a GPU's memory was given back and asked for anew because what was held did not do. Steps wait
            for that; a slightly larger share of the device avoids it.
    """

    node_id: str
    pid: int
    busy_s: float | None
    samples: int
    rss_mib: float
    device_mib: float
    weights_mib: float
    retries: int
    memory: DeviceMemory = field(default_factory=DeviceMemory)
