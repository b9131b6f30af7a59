"""Groups and pipelines on a virtual clock."""

from __future__ import annotations

import math
import random

import pytest

from serve_app.config import DenoiserConfig
from serve_app.engine.scheduler import Entry
from serve_app.engine.virtual_group import PassCost
from serve_app.engine.virtual_pipeline import VirtualPipeline, VirtualSample


def sample(name: str, steps: int = 10, work: float = 1.0, priority: int = 1, **more: float) -> VirtualSample:
    return VirtualSample(Entry(name, (1, 8, 8), True, 16, steps, steps, priority=priority, work=work), **more)


def run(pipeline: VirtualPipeline) -> None:
    while pipeline.next_at < math.inf:
        pipeline.run_next()


def pipeline(groups: int = 1, decoders: int = 1, cost: PassCost | None = None, **options: int) -> VirtualPipeline:
    return VirtualPipeline(cost or PassCost(0, 1), DenoiserConfig(**options), groups, decoders)


def test_one_after_the_other_the_least_work_first() -> None:
    one = pipeline()
    long, short = sample("long", 20), sample("short", 5)
    for each in (long, short):
        one.submit(each)
    run(one)
    assert (short.done_at, long.done_at) == (5, 25)


def test_shared_passes_save_their_fixed_part() -> None:
    shared = pipeline(decoders=4, cost=PassCost(1, 1), samples_per_step=4)
    samples = [sample(str(nth)) for nth in range(4)]
    for each in samples:
        shared.submit(each)
    run(shared)
    assert [each.done_at for each in samples] == [50, 50, 50, 50]  # 10 passes of 1 + 4
    assert shared.groups[0].busy_s == pytest.approx(50)


def test_an_urgent_sample_goes_first_after_the_pass_under_way() -> None:
    one = pipeline()
    patient, urgent = sample("patient", 10, 4.0, priority=2), sample("urgent", 3, priority=0)
    one.submit(patient)
    one.at(6.0, lambda now: one.submit(urgent))
    run(one)
    assert (urgent.done_at, patient.done_at) == (8 + 3, 43)


def test_a_place_is_given_up_for_a_more_urgent_class() -> None:
    one = pipeline(resident_samples=1)
    batch, other, urgent = sample("a", priority=2), sample("b", priority=2), sample("c", priority=0)
    for each in (batch, other):
        one.submit(each)
    one.at(3.5, lambda now: one.submit(urgent))
    run(one)
    assert (urgent.done_at, other.done_at, batch.done_at) == (14, 24, 30)


def test_stages() -> None:
    """Two groups, and one decoder that takes one video at a time."""
    two = pipeline(groups=2)
    samples = [sample(str(nth), encode_s=1, decode_s=3, after_s=0.5) for nth in range(2)]
    for each in samples:
        two.submit(each)
    run(two)
    assert sorted(each.done_at for each in samples) == [14.5, 17.5]


def test_groups_come_and_go() -> None:
    none = pipeline(groups=0)
    first, second = sample("a"), sample("b")
    for each in (first, second):
        none.submit(each)
    run(none)
    assert len(none.waiting) == 2 and first.done_at == math.inf
    groups = [none.add_group()]
    none.at(2.0, lambda now: groups.append(none.add_group()))
    none.at(4.0, lambda now: none.remove_group(groups[0]))
    run(none)
    assert len(none) == 0 and max(first.done_at, second.done_at) == 20  # all steps of both, and none twice


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_or_made_twice(seed: int) -> None:
    """At random: the passes add up to the work, and every sample ends once."""
    draw, ended = random.Random(seed), []
    some = VirtualPipeline(
        PassCost(0, 1), DenoiserConfig(samples_per_step=3, resident_samples=4), 2, 2, ended=lambda s, _: ended.append(s)
    )
    samples = [sample(str(nth), draw.randint(1, 9), draw.choice((1, 2)), draw.randint(0, 2)) for nth in range(60)]
    for each in samples:
        some.at(draw.uniform(0, 200), lambda now, each=each: some.submit(each))
    run(some)
    assert sorted(each.entry.id for each in ended) == sorted(each.entry.id for each in samples)
    assert sum(group.busy_s for group in some.groups) == pytest.approx(
        sum(e.entry.steps * e.entry.work for e in samples)
    )
