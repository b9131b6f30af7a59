"""A pipeline on a virtual clock: an encoder, groups of ranks, and decoders that take one video at a time.

Forecasts of the queue and the simulator run on it. Pure, without Ray or torch.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.config import DenoiserConfig
from serve_app.engine.scheduler import Entry
from serve_app.engine.virtual_group import PassCost, VirtualGroup

Choose = Callable[[Sequence[VirtualGroup], float], VirtualGroup]
"""Returns the group that a sample goes to at a time."""


@dataclass
class VirtualSample:
    """A sample on its way.

    Attributes:
        entry: the sample as a scheduler knows it.
        encode_s: seconds before it reaches a group.
        decode_s: seconds of a decoder.
        after_s: seconds after that, in which no stage is busy.
        denoise_at: when it reached a group.
        done_at: when its video is there; infinity until then.
    """

    entry: Entry
    encode_s: float = 0.0
    decode_s: float = 0.0
    after_s: float = 0.0
    denoise_at: float = math.inf
    done_at: float = math.inf


def fewest_samples(groups: Sequence[VirtualGroup], now: float) -> VirtualGroup:
    """Return the group with the fewest samples, as `serve_app.stages.router` does."""
    return min(groups, key=len)


class VirtualPipeline:
    """Samples on their way through the stages.

    Args:
        cost: seconds of a pass.
        options: the denoiser's options.
        groups: number of groups at first.
        decoders: number of decoders.
        now: time to begin at.
        choose: picks the group for a sample.
        ended: is called with each sample whose video is there, and the time.

    Attributes:
        now: time of the latest event.
        groups: those that take samples.
        waiting: samples that have found no group.
    """

    def __init__(
        self,
        cost: PassCost,
        options: DenoiserConfig,
        groups: int,
        decoders: int,
        now: float = 0.0,
        choose: Choose = fewest_samples,
        ended: Callable[[VirtualSample, float], None] | None = None,
    ) -> None:
        self.now = now
        self.groups: list[VirtualGroup] = []
        self.waiting: list[VirtualSample] = []
        self._cost = cost
        self._options = options
        self._choose = choose
        self._ended = ended
        self._events: list[tuple[float, int, Callable[[float], Any]]] = []
        self._numbers = itertools.count()
        self._samples: dict[str, VirtualSample] = {}
        self._due: dict[int, float] = {}
        """The latest `next_at` that an event was made for, by the group's id."""
        self._decoder_free_at = [now] * max(decoders, 1)
        for _ in range(groups):
            self.add_group()

    def __len__(self) -> int:
        """Return how many samples are on their way."""
        return len(self._samples)

    @property
    def next_at(self) -> float:
        """The time of the next event; infinity if there is none."""
        return self._events[0][0] if self._events else math.inf

    def at(self, when: float, call: Callable[[float], Any]) -> None:
        """Have a function called with the time once it is `when`."""
        heapq.heappush(self._events, (max(when, self.now), next(self._numbers), call))

    def add_group(self) -> VirtualGroup:
        """Add a group, which takes the samples that wait for one."""
        group = VirtualGroup(self._cost, self._options)
        self.groups.append(group)
        waiting, self.waiting = self.waiting, []
        for sample in waiting:
            self._denoise(sample, self.now)
        return group

    def remove_group(self, group: VirtualGroup) -> None:
        """Remove a group. Its samples go on in others, from where they are."""
        self.groups.remove(group)
        for entry in group.leave(self.now):
            self._denoise(self._samples[entry.id], self.now)

    def submit(self, sample: VirtualSample) -> None:
        """Take a sample now."""
        self._samples[sample.entry.id] = sample
        if sample.encode_s > 0:
            self.at(self.now + sample.encode_s, lambda now: self._denoise(sample, now))
        else:
            self._denoise(sample, self.now)

    def run_next(self) -> None:
        """Go on to the next event."""
        self.now, _, call = heapq.heappop(self._events)
        call(self.now)

    def _denoise(self, sample: VirtualSample, now: float) -> None:
        if sample.entry.finished:
            self._decode(sample, now)
            return
        if not self.groups:
            self.waiting.append(sample)
            return
        sample.denoise_at = min(sample.denoise_at, now)
        group = self._choose(self.groups, now)
        group.add(sample.entry, now)
        self._await(group)

    def _await(self, group: VirtualGroup) -> None:
        """Make an event of the next change in a group."""
        when = group.next_at
        if when < math.inf and self._due.get(id(group)) != when:
            self._due[id(group)] = when
            self.at(when, lambda now: self._advance(group, when))

    def _advance(self, group: VirtualGroup, when: float) -> None:
        if self._due.get(id(group)) == when:
            del self._due[id(group)]
        if group.next_at != when:  # another sample came meanwhile, and what was planned has changed
            return
        for entry in group.advance():
            self._decode(self._samples[entry.id], when)
        self._await(group)

    def _decode(self, sample: VirtualSample, now: float) -> None:
        free_at = max(heapq.heappop(self._decoder_free_at), now) + sample.decode_s
        heapq.heappush(self._decoder_free_at, free_at)
        self.at(free_at + sample.after_s, lambda at: self._end(sample, at))

    def _end(self, sample: VirtualSample, now: float) -> None:
        sample.done_at = now
        del self._samples[sample.entry.id]
        if self._ended is not None:
            self._ended(sample, now)
