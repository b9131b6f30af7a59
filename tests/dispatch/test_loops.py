"""Loops of a dispatcher's process: started, watched, ended."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.dispatch.loops import Loops, NamedLoops


class Two(Loops):
    """Two loops, one of which ends by an error when it is told to."""

    def __init__(self) -> None:
        self.fail = asyncio.Event()
        self.cancelled = 0

    def _loops(self) -> NamedLoops:
        return {"first": self._run, "second": self._fail}

    async def _run(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _fail(self) -> None:
        await self.fail.wait()
        raise ValueError("no such column")


async def test_a_loop_that_ends_by_itself_is_named_with_its_cause() -> None:
    two = Two()
    two.raise_if_ended()
    two.start()
    await asyncio.sleep(0)
    two.raise_if_ended()
    two.fail.set()
    for _ in range(3):
        await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="the loop 'second' has ended") as ended:
        two.raise_if_ended()
    assert str(ended.value.__cause__) == "no such column"
    await two.stop()
    two.raise_if_ended()
    assert two.cancelled == 1


async def test_a_loop_that_somebody_else_cancels_has_ended() -> None:
    two = Two()
    two.start()
    await asyncio.sleep(0)
    next(task for task in asyncio.all_tasks() if task.get_name() == "first").cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="the loop 'first' has ended"):
        two.raise_if_ended()
    await two.stop()
