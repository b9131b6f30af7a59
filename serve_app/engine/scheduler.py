"""Which samples advance in the next step. Pure: knows neither Ray nor torch, so that its rules can be tested alone."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass
class Entry:
    """What the scheduler knows of a sample.

    `boundary` is the first step that the low-noise expert does; `tokens` is the length of its token sequence.
    """

    id: str
    latent_shape: tuple[int, int, int]
    guided: bool
    tokens: int
    steps: int
    boundary: int
    step: int = 0

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.steps

    @property
    def cohort(self) -> Hashable:
        """Samples of equal cohort can share a forward pass: same latent shape, expert and guidance mode."""
        return self.latent_shape, self.step < self.boundary, self.guided


class Scheduler:
    """First come, first served, with company: the oldest sample leads and takes its cohort along.

    Args:
        samples_per_step: samples in one forward pass at most.
        tokens_per_step: tokens in one forward pass at most; the leader alone may exceed it.
    """

    def __init__(self, samples_per_step: int, tokens_per_step: int) -> None:
        self._samples_per_step = samples_per_step
        self._tokens_per_step = tokens_per_step
        self._entries: dict[str, Entry] = {}  # in order of admission

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._entries

    def add(self, entry: Entry) -> None:
        """Admit a sample; it may take part from the next step on."""
        self._entries[entry.id] = entry

    def remove(self, sample_id: str) -> None:
        """Forget a sample that has finished, failed or been cancelled."""
        self._entries.pop(sample_id, None)

    def pick(self) -> list[Entry]:
        """The samples of the next step, all of one cohort; empty when nothing is left to do."""
        leader = next((entry for entry in self._entries.values() if not entry.finished), None)
        if leader is None:
            return []
        chosen, tokens = [leader], leader.tokens
        for entry in self._entries.values():
            if len(chosen) >= self._samples_per_step:
                break
            if entry is leader or entry.finished or entry.cohort != leader.cohort:
                continue
            if tokens + entry.tokens <= self._tokens_per_step:
                chosen.append(entry)
                tokens += entry.tokens
        return chosen
