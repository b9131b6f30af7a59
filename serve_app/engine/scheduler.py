"""Decides which samples advance in the next step. Pure, without Ray or torch, so that its rules can be tested alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from serve_app.engine.pass_time import PassTime


@dataclass
class Entry:
    """A sample as the scheduler knows it.

    Attributes:
        id: the sample's.
        latent_shape: frames, height and width of its latents.
        guided: whether a step has two branches, with and without the prompt.
        tokens: length of its token sequence.
        steps: how many it has.
        boundary: the first step that the low-noise expert does.
        step: how many are done.
        priority: of its class; 0 is the most urgent.
        effective_deadline: the moment from which on no sample that was created later goes first, because this one has
            aged enough; on the clock of `Scheduler.pick`.
        work: of one step, in any unit that is the same for all samples.
        step_mib: working memory that its part of a forward pass takes.
        state_mib: memory of the state that it keeps between steps.
        alone: whether it must not share a forward pass.
        held: passes that it would have led, had it not waited for others to catch up.
    """

    id: str
    latent_shape: tuple[int, int, int]
    guided: bool
    tokens: int
    steps: int
    boundary: int
    step: int = 0
    priority: int = 1
    effective_deadline: float = float("inf")
    work: float = 1.0
    step_mib: float = 0.0
    state_mib: float = 0.0
    alone: bool = False
    held: int = 0

    @property
    def finished(self) -> bool:
        """True if no step is left."""
        return self.step >= self.steps

    @property
    def high_noise(self) -> bool:
        """True if the high-noise expert does the next step."""
        return self.step < self.boundary

    @property
    def remaining(self) -> float:
        """Work of all steps that are left."""
        return (self.steps - self.step) * self.work

    @property
    def cohort(self) -> Hashable:
        """Latent shape, expert and guidance mode: samples for which they are equal can share a forward pass."""
        return self.latent_shape, self.high_noise, self.guided


class Scheduler:
    """Decides before every step which samples take part and which are parked.

    Samples past their effective deadline go first, in the order of their deadlines. The others go by class. Within a
    class the sample with the least remaining work goes first, which gives the shortest mean wait. After its effective
    deadline a sample is overtaken only by samples that were created before it, of which at most `resident_samples - 1`
    are inside: whatever else arrives, it leads once they are done. The leader takes along, in the same order, as many
    samples of its cohort as the bounds allow.

    One exception serves all. Equal samples that are a few steps behind, still with the high-noise expert, may go first,
    so that all share the steps of the low-noise expert. This is done where the shared passes save more than the wait
    costs, by the measured cost of a pass. A sample waits like this for at most half as many passes as it has steps.

    Args:
        samples_per_step: most samples in one forward pass.
        tokens_per_step: most tokens in one forward pass; the leader alone may exceed it.
        step_memory_mib: most working memory of one forward pass; the leader alone may exceed it. No bound if 0.
        parked_memory_mib: most state on the device of samples that do not take part.
        costly_switch: whether a change of expert costs as much as steps do. Then, within a class, samples of the expert
            in use go first.
    """

    def __init__(
        self,
        samples_per_step: int,
        tokens_per_step: int,
        step_memory_mib: float = 0,
        parked_memory_mib: float = float("inf"),
        costly_switch: bool = False,
    ) -> None:
        self._samples_per_step = samples_per_step
        self._tokens_per_step = tokens_per_step
        self._step_memory_mib = step_memory_mib or float("inf")
        self._parked_memory_mib = parked_memory_mib
        self._costly_switch = costly_switch
        self._entries: dict[str, Entry] = {}  # in order of admission
        self.tight = False
        """True while memory is short: passes then have one sample, and the state of the others leaves the device."""
        self._last_high_noise: bool | None = None
        self._pass_time = PassTime()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._entries

    def add(self, entry: Entry) -> None:
        """Admit a sample; it may take part from the next step on."""
        self._entries[entry.id] = entry

    def remove(self, sample_id: str) -> None:
        """Forget a sample that has finished, failed, moved or been cancelled."""
        self._entries.pop(sample_id, None)

    def order(self, now: float) -> list[Entry]:
        """Return all samples with steps left, the most urgent first."""
        # Sorting is stable, so equally urgent samples go in the order of their admission.
        return sorted((e for e in self._entries.values() if not e.finished), key=lambda entry: self._key(entry, now))

    def pick(self, now: float) -> list[Entry]:
        """Return the samples of the next step, all of one cohort; none if nothing is left to do."""
        order = self.order(now)
        if not order:
            return []
        chosen = self._with_cohort(order)
        behind = self._worth_waiting_for(chosen, order, now)
        if behind:
            for entry in chosen:
                entry.held += 1
            chosen = behind
        self._last_high_noise = chosen[0].high_noise
        return chosen

    def note_pass(self, entries: list[Entry], seconds: float) -> None:
        """Note how many seconds a pass of these samples took."""
        self._pass_time.learn(sum(entry.work for entry in entries), seconds)

    def _with_cohort(self, order: list[Entry], taken: Sequence[Entry] = ()) -> list[Entry]:
        """Return the first of `order` and the samples of its cohort that fit beside it and `taken`."""
        leader = order[0]
        chosen = [leader]
        everybody = [*taken, leader]
        tokens = sum(entry.tokens for entry in everybody)
        memory = sum(entry.step_mib for entry in everybody)
        for entry in order[1:]:
            if self.tight or len(taken) + len(chosen) >= self._samples_per_step:
                break
            if leader.alone or entry.alone or entry.cohort != leader.cohort:
                continue
            if tokens + entry.tokens <= self._tokens_per_step and memory + entry.step_mib <= self._step_memory_mib:
                chosen.append(entry)
                tokens += entry.tokens
                memory += entry.step_mib
        return chosen

    def _worth_waiting_for(self, ahead: list[Entry], order: list[Entry], now: float) -> list[Entry]:
        """Return samples that go before `ahead`, so that all share the rest of the steps; mostly none.

        If `ahead`, the most urgent samples, go on, the others wait for their passes and then make the same ones again.
        If the others catch up first, each of them saves the fixed cost of every shared pass. Then each sample of
        `ahead` waits for the passes of catching up, and for the others' work in the shared passes.
        """
        leader = ahead[0]
        fixed = self._pass_time.per_pass
        if leader.high_noise or leader.alone or leader.effective_deadline <= now or self._costly_switch or not fixed:
            return []
        if self.tight:
            return []
        if any(entry.held >= entry.steps // 2 for entry in ahead):
            return []
        behind = [
            entry
            for entry in order
            if entry.high_noise
            and not entry.alone
            and entry.effective_deadline > now
            and (entry.priority, entry.latent_shape, entry.guided)
            == (leader.priority, leader.latent_shape, leader.guided)
        ]
        if not behind or len(ahead) >= self._samples_per_step:
            return []
        behind = self._with_cohort(behind, ahead)
        tokens = sum(entry.tokens for entry in (*ahead, *behind))
        memory = sum(entry.step_mib for entry in (*ahead, *behind))
        if tokens > self._tokens_per_step or memory > self._step_memory_mib:
            return []
        shared = leader.steps - leader.step
        passes = max(entry.boundary - entry.step for entry in behind)
        work = len(behind) * leader.work
        saved = len(behind) * shared * fixed
        cost = len(ahead) * (passes * (fixed + work) + shared * work)
        return behind if saved > cost else []

    def parked_off_device(self, chosen: list[Entry], now: float) -> list[str]:
        """Return ids of the samples whose state leaves the device while `chosen` step: the least urgent ones."""
        stepping = {entry.id for entry in chosen}
        used, away, most = 0.0, [], 0.0 if self.tight else self._parked_memory_mib
        for entry in self.order(now):
            if entry.id in stepping:
                continue
            if used + entry.state_mib > most:
                away.append(entry.id)
            else:
                used += entry.state_mib
        return away

    def lower_token_bound(self, chosen: list[Entry]) -> None:
        """Allow fewer tokens in a pass from now on, because these samples did not fit into one."""
        self._tokens_per_step = min(self._tokens_per_step, sum(entry.tokens for entry in chosen) - 1)

    def _key(self, entry: Entry, now: float) -> tuple[float, ...]:
        if entry.effective_deadline <= now:
            return (0, entry.effective_deadline)
        switch = self._costly_switch and self._last_high_noise is not None
        return (1, entry.priority, float(switch and entry.high_noise != self._last_high_noise), entry.remaining)
