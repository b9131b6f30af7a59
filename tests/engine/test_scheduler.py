"""The scheduler's rules: who leads, who comes along, who is parked, and how long anybody waits at most."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.pass_time import PassTime
from serve_app.engine.scheduler import Entry, Scheduler

SHAPES = [(3, 8, 8), (9, 16, 16)]
AGEING = (5.0, 40.0, 200.0)
"""Seconds of ageing by class. The simulations below count a step as one second."""


@dataclass
class Arrival:
    """A sample that arrives: when its job was created, and how long it then waited outside."""

    entry: Entry
    created: float
    delay: float = 0.0
    led: list[float] = field(default_factory=list)


@st.composite
def arrivals(draw: st.DrawFn, most: int = 12) -> list[Arrival]:
    made = []
    for index in range(draw(st.integers(1, most))):
        created = draw(st.integers(0, 60))
        priority = draw(st.integers(0, 2))
        entry = Entry(
            id=str(index),
            latent_shape=draw(st.sampled_from(SHAPES)),
            guided=draw(st.booleans()),
            tokens=draw(st.integers(1, 900)),
            steps=draw(st.integers(1, 12)),
            boundary=draw(st.integers(0, 12)),
            priority=priority,
            effective_deadline=created + AGEING[priority],
            work=draw(st.floats(0.1, 100)),
            step_mib=draw(st.floats(0, 500)),
            state_mib=draw(st.floats(0, 100)),
            alone=draw(st.booleans()),
        )
        made.append(Arrival(entry, created, draw(st.integers(0, 30))))
    return made


schedulers = st.builds(
    Scheduler,
    samples_per_step=st.integers(1, 5),
    tokens_per_step=st.integers(1, 2000),
    step_memory_mib=st.one_of(st.just(0), st.floats(1, 1000)),
    parked_memory_mib=st.floats(0, 300),
    costly_switch=st.booleans(),
)


def simulate(scheduler: Scheduler, those: list[Arrival], fixed: float = 0.0) -> list[tuple[float, list[Entry]]]:
    """Return every step with its time, until all have finished. A pass takes `fixed` seconds beside its work."""
    steps, now, outside = [], 0.0, list(those)
    while outside or len(scheduler):
        for arrival in [a for a in outside if a.created + a.delay <= now]:
            outside.remove(arrival)
            scheduler.add(arrival.entry)
        batch = scheduler.pick(now)
        if batch:
            steps.append((now, batch))
            next(a for a in those if a.entry is batch[0]).led.append(now)
            scheduler.note_pass(batch, fixed + sum(entry.work for entry in batch))
        for entry in batch:
            entry.step += 1
            if entry.finished:
                scheduler.remove(entry.id)
        now += 1
        assert now < 10_000, "somebody never finishes"
    return steps


FIXED = st.sampled_from([0.0, 10.0, 1000.0])


@given(schedulers, arrivals(), FIXED)
def test_everybody_finishes_and_every_batch_is_one_cohort_within_bounds(scheduler, those, fixed):
    bounds = scheduler._samples_per_step, scheduler._tokens_per_step, scheduler._step_memory_mib
    done = dict.fromkeys((a.entry.id for a in those), 0)
    entries = {a.entry.id: a.entry for a in those}
    # Cohorts change with the step, so a batch is looked at as it was picked.
    pick = scheduler.pick

    def checked(now: float) -> list[Entry]:
        batch = pick(now)
        assert len({entry.cohort for entry in batch}) <= 1
        assert len({entry.id for entry in batch}) == len(batch) <= bounds[0]
        if len(batch) > 1:
            assert not any(entry.alone for entry in batch)
            assert sum(entry.tokens for entry in batch) <= bounds[1]
            assert sum(entry.step_mib for entry in batch) <= bounds[2]
        for entry in batch:
            done[entry.id] += 1
        return batch

    scheduler.pick = checked
    simulate(scheduler, those, fixed)
    assert all(entry.held <= max(1, entry.steps // 2) for entry in entries.values())
    assert done == {name: entry.steps for name, entry in entries.items()}
    assert scheduler.pick(0) == [] and len(scheduler) == 0


@given(schedulers, arrivals(), FIXED)
def test_after_its_effective_deadline_nobody_created_later_goes_first(scheduler, those, fixed):
    """The bound on waiting: after its effective deadline a sample waits only for samples whose deadline came before."""
    simulate(scheduler, those, fixed)
    for one in those:
        finished = max(one.led, default=None)
        if finished is None:  # never led: it always went along, which is no wait
            continue
        for other in those:
            if other.created > one.entry.effective_deadline:
                between = [
                    t
                    for t in other.led
                    if one.entry.effective_deadline <= t and one.created + one.delay <= t < finished
                ]
                assert not between, f"{other.entry.id} went before {one.entry.id}, whose effective deadline had passed"
        # So it is done within its own steps and those of the samples whose deadline came before.
        ahead = sum(o.entry.steps for o in those if o.entry.effective_deadline <= one.entry.effective_deadline)
        late = max(
            (o.created + o.delay for o in those if o.entry.effective_deadline <= one.entry.effective_deadline),
            default=0,
        )
        assert finished <= max(one.entry.effective_deadline, one.created + one.delay, late) + ahead


@given(arrivals(), st.integers(1, 5), st.integers(1, 2000))
def test_before_any_effective_deadline_the_class_decides_and_then_the_least_remaining_work(those, samples, tokens):
    scheduler = Scheduler(samples, tokens)
    inside = [a.entry for a in those]
    for entry in inside:
        entry.effective_deadline = float("inf")
        scheduler.add(entry)
    while batch := scheduler.pick(0):
        left = [entry for entry in inside if not entry.finished]
        assert (batch[0].priority, batch[0].remaining) == min((e.priority, e.remaining) for e in left)
        for entry in batch:
            entry.step += 1


@given(schedulers, arrivals(), st.integers(0, 300))
def test_what_is_parked_fits_and_the_most_urgent_stay(scheduler, those, now):
    for arrival in those:
        scheduler.add(arrival.entry)
    chosen = scheduler.pick(now)
    away = scheduler.parked_off_device(chosen, now)
    assert not {entry.id for entry in chosen} & set(away)
    stays = [e for e in scheduler.order(now) if e.id not in away and e not in chosen]
    assert sum(entry.state_mib for entry in stays) <= scheduler._parked_memory_mib
    for name in away:  # it would not have fitted beside those that are more urgent and stay
        order = [entry.id for entry in scheduler.order(now)]
        before = sum(e.state_mib for e in stays if order.index(e.id) < order.index(name))
        mine = next(a.entry.state_mib for a in those if a.entry.id == name)
        assert before + mine > scheduler._parked_memory_mib


def test_a_sample_joins_at_the_next_step_and_leaves_at_once():
    first, second = (Entry(name, SHAPES[0], True, 10, 4, 2) for name in "ab")
    scheduler = Scheduler(4, 100)
    scheduler.add(first)
    assert [entry.id for entry in scheduler.pick(0)] == ["a"]
    first.step = 1
    scheduler.add(second)
    assert [entry.id for entry in scheduler.pick(0)] == ["a", "b"]
    first.step = 2  # another expert now
    assert [entry.id for entry in scheduler.pick(0)] == ["a"]
    scheduler.remove("a")
    assert [entry.id for entry in scheduler.pick(0)] == ["b"]
    assert "a" not in scheduler and len(scheduler) == 1


def test_a_sample_that_fills_the_budget_alone_is_never_batched():
    scheduler = Scheduler(4, 100)
    for name in "ab":
        scheduler.add(Entry(name, SHAPES[0], True, 90, 4, 2))
    assert [entry.id for entry in scheduler.pick(0)] == ["a"]


def test_a_preview_overtakes_and_the_overtaken_one_goes_on_after():
    long = Entry("long", SHAPES[1], True, 500, 40, 20, work=10)
    scheduler = Scheduler(1, 1000)
    scheduler.add(long)
    long.step = 10
    preview = Entry("preview", SHAPES[0], True, 50, 2, 1, work=0.1)
    scheduler.add(preview)
    assert scheduler.pick(0) == [preview]
    preview.step = 2
    assert scheduler.pick(0) == [long]


def test_where_changing_experts_is_costly_the_one_in_use_goes_on_within_a_class():
    low = Entry("low", SHAPES[0], True, 10, 4, 2, step=2)
    high = Entry("high", SHAPES[0], True, 10, 20, 10)
    urgent = Entry("urgent", SHAPES[0], True, 10, 20, 0, priority=0)
    scheduler = Scheduler(1, 100, costly_switch=True)
    scheduler.add(high)
    assert scheduler.pick(0) == [high]
    scheduler.add(low)
    assert scheduler.pick(0) == [high]  # although `low` has less left
    scheduler.add(urgent)
    assert scheduler.pick(0) == [urgent]  # a class is worth the change
    scheduler.remove("urgent")
    assert scheduler.pick(0) == [low]
    low.effective_deadline = high.effective_deadline = 5
    high.effective_deadline = 1
    assert scheduler.pick(9) == [high]


def test_after_memory_ran_out_fewer_tokens_share_a_pass():
    scheduler = Scheduler(4, 1000)
    those = [Entry(name, SHAPES[0], True, 10, 4, 2) for name in "abcd"]
    for entry in those:
        scheduler.add(entry)
    assert len(scheduler.pick(0)) == 4
    scheduler.lower_token_bound(those)
    assert len(scheduler.pick(0)) == 3


def equal(name: str, step: int, **changes) -> Entry:
    return Entry(name, (3, 8, 8), True, tokens=48, steps=20, boundary=9, step=step, **changes)


def taught(scheduler: Scheduler, fixed: float) -> Scheduler:
    """Show a scheduler passes over one and over three samples."""
    for count in (1, 3):
        scheduler.note_pass([equal("seen", 0)] * count, fixed + count)
    return scheduler


def passes(fixed: float, *entries: Entry) -> int:
    return len(simulate(taught(Scheduler(8, 10_000), fixed), [Arrival(entry, 0) for entry in entries], fixed))


def test_equal_samples_catch_up_where_a_pass_costs_much_whatever_is_in_it():
    late = lambda: [equal(str(n), step) for n, step in enumerate((9, 7, 6, 6))]  # noqa: E731
    assert passes(0.0, *late()) == 11 + 2 + 11 + 1 + 11
    assert passes(50.0, *late()) == 3 + 11


def test_nobody_waits_for_others_that_it_cannot_or_should_not_share_with():
    def first(scheduler: Scheduler, other: Entry, **changes) -> str:
        ahead = equal("ahead", 12, **changes)
        scheduler.add(ahead)
        scheduler.add(other)
        return taught(scheduler, 50.0).pick(0)[0].id

    near = equal("behind", 7)
    assert first(Scheduler(8, 10_000), near) == "behind"
    assert first(Scheduler(1, 10_000), near) == "ahead"
    assert first(Scheduler(8, 95), near) == "ahead"
    assert first(Scheduler(8, 10_000, costly_switch=True), near) == "ahead"
    assert first(Scheduler(8, 10_000), equal("behind", 0)) == "ahead", "nine passes for what eight save"
    assert first(Scheduler(8, 10_000), equal("behind", 7, priority=2)) == "ahead"
    assert first(Scheduler(8, 10_000), equal("behind", 7, alone=True)) == "ahead"
    assert first(Scheduler(8, 10_000), near, alone=True) == "ahead"
    assert first(Scheduler(8, 10_000), near, effective_deadline=-1.0) == "ahead"
    assert first(Scheduler(8, 10_000), near, held=10) == "ahead"


def test_the_cost_of_a_pass_is_learnt_and_follows():
    time = PassTime()
    time.learn(1, 13)
    assert time.per_pass == 0
    for work in (1, 2, 4, 8) * 5:
        time.learn(work, 10 + 3 * work)
    assert time.per_pass == pytest.approx(10 / 3, rel=0.01)
    for work in (1, 2, 4, 8) * 200:
        time.learn(work, 3 * work)
    assert time.per_pass < 0.1
