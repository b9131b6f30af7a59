"""A group whose ranks answer differently, or not at all."""

from __future__ import annotations

import asyncio
import pickle
from concurrent.futures import Future
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from serve_app.engine import answers
from serve_app.engine.answers import Answers
from serve_app.engine.errors import GroupLost, OutOfMemory


class Reference:
    """A reference to a rank's answer, like Ray's."""

    def __init__(self) -> None:
        self.answer: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.answer


async def test_a_dead_rank_is_told_of_without_waiting_for_the_others(monkeypatch) -> None:
    monkeypatch.setattr(answers, "_STRAGGLER_S", 3600)
    dead, waiting = Reference(), Reference()
    dead.answer.set_exception(ActorDiedError())
    async with asyncio.timeout(60):
        with pytest.raises(GroupLost, match="a rank died"):
            (await Answers.gather(3600, [waiting, dead])).results()


async def test_an_error_on_one_rank_alone_is_put_down_to_the_one_that_died_of_it(monkeypatch) -> None:
    """The peer of a rank that died says so, in words of its own, before Ray does."""
    monkeypatch.setattr(answers, "_STRAGGLER_S", 3600)
    peer, dead = Reference(), Reference()
    peer.answer.set_exception(RuntimeError("Connection closed by peer"))
    asyncio.get_running_loop().call_later(0.01, dead.answer.set_exception, ActorDiedError())
    with pytest.raises(GroupLost, match="a rank died"):
        (await Answers.gather(3600, [peer, dead])).results()


@pytest.mark.parametrize(("places", "lost"), [((7, 7), False), ((7, 9), True)])
async def test_ranks_that_ran_out_of_memory_in_one_place_are_in_step(places: tuple[int, int], lost: bool) -> None:
    ranks = [Reference(), Reference()]
    for rank, place in zip(ranks, places, strict=True):
        error = pickle.loads(pickle.dumps(OutOfMemory("too many", place)))
        rank.answer.set_exception(RayTaskError("step", "", error).as_instanceof_cause())
    with pytest.raises(GroupLost if lost else OutOfMemory, match="too many"):
        (await Answers.gather(60, ranks)).results()
