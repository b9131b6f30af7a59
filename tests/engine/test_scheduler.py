"""The scheduler's rules: who leads, who comes along, and who never does."""

from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.scheduler import Entry, Scheduler

SHAPES = [(3, 8, 8), (9, 16, 16)]

entries = st.lists(
    st.builds(
        Entry,
        id=st.uuids().map(str),
        latent_shape=st.sampled_from(SHAPES),
        guided=st.booleans(),
        tokens=st.integers(1, 900),
        steps=st.integers(1, 6),
        boundary=st.integers(0, 6),
    ),
    max_size=12,
    unique_by=lambda entry: entry.id,
)


def make(samples: int, tokens: int, those: list[Entry]) -> Scheduler:
    scheduler = Scheduler(samples, tokens)
    for entry in those:
        scheduler.add(entry)
    return scheduler


@given(entries, st.integers(1, 5), st.integers(1, 2000))
def test_everybody_finishes_and_every_batch_is_one_cohort_within_bounds(those, samples, tokens):
    scheduler = make(samples, tokens, those)
    work = sum(entry.steps for entry in those)
    for _ in range(work):
        batch = scheduler.pick()
        if not batch:
            break
        assert len({entry.cohort for entry in batch}) == 1
        assert len(batch) <= samples
        assert len(batch) == 1 or sum(entry.tokens for entry in batch) <= tokens
        assert len({entry.id for entry in batch}) == len(batch)
        for entry in batch:
            entry.step += 1
    assert all(entry.finished for entry in those)
    assert scheduler.pick() == []


@given(entries.filter(lambda those: len(those) > 0), st.integers(1, 5), st.integers(1, 2000))
def test_the_oldest_unfinished_sample_always_advances(those, samples, tokens):
    scheduler = make(samples, tokens, those)
    while batch := scheduler.pick():
        assert batch[0] is next(entry for entry in those if not entry.finished)
        for entry in batch:
            entry.step += 1


def test_a_sample_joins_at_the_next_step_and_leaves_at_once():
    first, second = (Entry(name, SHAPES[0], True, 10, 4, 2) for name in "ab")
    scheduler = make(4, 100, [first])
    assert [entry.id for entry in scheduler.pick()] == ["a"]
    first.step = 1
    scheduler.add(second)
    assert [entry.id for entry in scheduler.pick()] == ["a", "b"]
    first.step = 2  # another expert now
    assert [entry.id for entry in scheduler.pick()] == ["a"]
    scheduler.remove("a")
    assert [entry.id for entry in scheduler.pick()] == ["b"]
    assert "a" not in scheduler and len(scheduler) == 1
