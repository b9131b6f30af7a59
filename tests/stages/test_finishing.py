"""A decoder, a finisher and a pipeline in one process: whatever becomes of the finishing, there is a video."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from ray.exceptions import RayActorError

from serve_app.config import Config
from serve_app.errors import JobFailed
from serve_app.events import Done, Progress
from serve_app.finish import finisher as library
from serve_app.finish.failure import FinishFailed
from serve_app.finish.plan import Finish
from serve_app.stages.finisher import Finisher
from tests.support.finishing import PLAIN, App, app, is_plain, left_over

__all__ = ["app"]


async def test_a_finished_video_stands_beside_the_plain_one(app: App, tmp_path: Path) -> None:
    *progress, done = await app.make()
    assert isinstance(done, Done)
    assert set(done.outputs) == {"video", "plain", "preview", "thumbnail", "spritesheet"}
    assert app.path(done.outputs["video"]).read_bytes() == b"finished" and done.size_bytes == 8
    assert app.path(done.outputs["plain"]).name == "video.mp4"
    assert app.path(done.outputs["preview"]).read_bytes() == b"preview"
    made = {"width": 32, "height": 48, "fps": 32, "num_frames": 17, "content_type": "video/webm"}
    assert done.finished == {**made, "seconds": {"interpolate": 0.25}}
    assert done.warnings == ["Fine."] and done.timings["finish"] > 0
    assert [*done.timings] == ["encode", "denoise", "decode", "store", "finish", "total"]
    finish = [event for event in progress if event.stage == "finish"]
    assert (finish[0].step, finish[-1].step, finish[-1].steps, finish[-1].seconds_left) == (0, 17, 17, 0.0)
    stages = [event.stage for event in progress]
    assert stages == sorted(stages, key=["encode", "denoise", "decode", "finish"].index)
    assert len(app.steps.frames) == 9 and app.steps.frames[0].shape == (48, 32, 3)
    assert app.steps.metadata["seed"] == 1 and app.steps.metadata["revision"] == "abc"
    assert not left_over(tmp_path)
    before = [event.seconds_left for event in await app.make() if isinstance(event, Progress)]
    assert before[-1] == 0.0 and all(left is None or left >= 0 for left in before)


async def test_the_finisher_works_while_frames_are_decoded(app: App) -> None:
    """The decoder goes on to its second chunk only when the finisher has had the first frame."""
    seen = threading.Event()
    app.steps.trouble = lambda index: seen.set()
    (stream,) = app.decoder._decoder.tiled._decoders
    frames, waited = stream.frames, []

    def held(features: Any, spans: Any) -> Iterator[Any]:
        for index, chunk in enumerate(frames(features, spans)):
            if index == 2:
                waited.append(seen.wait(30))
            yield chunk

    stream.frames = held
    done = (await app.make())[-1]
    assert waited == [True] and done.finished is not None


@pytest.mark.parametrize("finish", [None, Finish()])
async def test_without_steps_nothing_is_asked_and_nothing_changes(app: App, finish: Finish | None) -> None:
    events = await app.make(finish=finish)
    done = events[-1]
    assert not app.finishers.calls and app.stored() == PLAIN
    assert done.finished is None and not done.warnings and "finish" not in done.timings
    assert all(event.stage != "finish" for event in events[:-1])
    plain = app.path(done.outputs["video"]).read_bytes()
    finished = (await app.make())[-1]
    assert app.path(finished.outputs["plain"]).read_bytes() == plain


async def test_a_step_that_fails_is_named(app: App, tmp_path: Path) -> None:
    def fail(index: int) -> None:
        if index == 4:
            raise FinishFailed("upscale", "the weights are damaged")

    app.steps.trouble = fail
    is_plain(app, await app.make(), "upscale: the weights are damaged.")
    assert not left_over(tmp_path)


async def test_an_error_that_nobody_thought_of_costs_no_video(app: App) -> None:
    def fail(index: int) -> None:
        raise ZeroDivisionError("in a step")

    app.steps.trouble = fail
    is_plain(app, await app.make(), "ZeroDivisionError: in a step")


@pytest.mark.parametrize("frames", [1, 5])
async def test_a_finisher_that_dies_leaves_the_plain_video(app: App, frames: int) -> None:
    """As Serve tells of a replica that was killed, in the midst of the frames or before any."""
    reached = asyncio.Event()
    loop = asyncio.get_running_loop()

    def note(index: int) -> None:
        if index == frames:
            loop.call_soon_threadsafe(reached.set)

    app.steps.trouble = note
    finish = app.finish

    async def dies(*given: Any) -> AsyncIterator[Any]:
        async with aclosing(finish(*given)) as events:
            async for event in events:
                yield event
                if not reached.is_set():
                    await reached.wait()
                    raise RayActorError

    app.finish = dies
    is_plain(app, await app.make(), "the finisher was lost with this video in it")


async def test_a_finisher_that_is_lost_before_it_gets_frames_is_replaced(app: App) -> None:
    finish = app.finish

    async def dies(*given: Any) -> AsyncIterator[Any]:
        app.finish = finish
        raise RayActorError
        yield

    app.finish = dies
    done = (await app.make())[-1]
    assert done.finished is not None and len(app.finishers.calls) == 2


async def test_no_place_within_the_time_means_a_plain_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(tmp_path, monkeypatch, wait_s=0.05)

    async def full(*given: Any) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    app.finish = full
    is_plain(app, await app.make(), "no finisher had a free place within 0.05 s")
    assert all(call.cancelled for call in app.finishers.calls)


def wait_for(event: threading.Event) -> None:
    """Hold a step until an event, or for half a minute."""
    event.wait(30)


async def test_a_finisher_that_stands_still_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(tmp_path, monkeypatch, progress_timeout_s=0.5)
    go_on = threading.Event()
    app.steps.trouble = lambda index: wait_for(go_on)
    making = asyncio.create_task(app.make())
    events = await making
    is_plain(app, events, "nothing happened for 0.5 s")
    go_on.set()


async def test_a_pipeline_without_a_finisher_says_so(app: App) -> None:
    app.pipeline._finisher = None
    is_plain(app, await app.make(), "this pipeline has no finisher")


async def test_a_storage_that_takes_the_plain_video_only(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(app.finisher._storage, "put", full)
    is_plain(app, await app.make(), "No space left on device")


async def test_while_the_storage_is_away_each_decode_gets_a_finisher(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    put, tries = app.decoder._storage.put, []

    async def away(*given: Any) -> None:
        tries.append(given)
        if len(tries) < 3:
            raise OSError("the storage is away")
        await put(*given)

    monkeypatch.setattr(app.decoder._storage, "put", away)
    done = (await app.make())[-1]
    assert done.finished is not None and len(app.decoders.calls) == 3
    assert app.stored() == {*PLAIN, "video.webm", "preview.gif"}


async def test_a_decoder_that_dies_fails_the_attempt_as_without_a_finisher(app: App, tmp_path: Path) -> None:
    async def dies(*given: Any) -> None:
        raise RayActorError

    app.decode = dies
    with pytest.raises(JobFailed) as failed:
        await app.make()
    assert (failed.value.code, failed.value.retryable) == ("decoder_lost", True)
    assert all(call.cancelled for call in app.finishers.calls)
    while left_over(tmp_path):  # noqa: ASYNC110 (it ends in a thread)
        await asyncio.sleep(0.01)
    assert not app.stored()


async def test_who_leaves_in_this_phase_ends_it(app: App, tmp_path: Path) -> None:
    """As a cancel, a deadline, a client that is gone and a superseded attempt do: the stream of events is closed."""
    go_on = threading.Event()
    app.steps.trouble = lambda index: wait_for(go_on)
    events = app.pipeline._generate(app.job())
    async for event in events:
        if event.stage == "finish":
            break
    asyncio.get_running_loop().call_later(0.1, go_on.set)
    await events.aclose()
    while app.steps.ended < 1 or left_over(tmp_path):  # noqa: ASYNC110 (it ends in a thread)
        await asyncio.sleep(0.01)
    assert len(app.steps.frames) < 9 and app.stored() == PLAIN, "the rest goes with the job's folder"


async def test_the_death_of_who_called_ends_the_finishing(app: App, tmp_path: Path, monkeypatch: Any) -> None:
    tasks: list[Any] = []
    watching = app.finisher._client_liveness.watching

    def watch(caller: Any) -> Any:
        tasks.append(asyncio.current_task())
        return watching(None)

    monkeypatch.setattr(app.finisher._client_liveness, "watching", watch)
    done = (await app.make())[-1]
    assert done.finished is not None and tasks[0] is not None


@pytest.mark.parametrize("name", ["preview.gif", "video.webm"])
async def test_a_file_that_is_stored_while_somebody_leaves_is_removed(
    app: App, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    put, begun, go_on, stored = app.finisher._storage._backend.put, *(threading.Event() for _ in range(3))

    def held(key: str, *others: Any) -> None:
        if key.endswith(name):
            begun.set()
            assert go_on.wait(30)
        put(key, *others)
        if key.endswith(name):
            stored.set()

    monkeypatch.setattr(app.finisher._storage._backend, "put", held)
    reached = asyncio.Event()

    async def make() -> None:
        async for event in app.pipeline._generate(app.job()):
            if isinstance(event, Progress) and event.stage == "finish":
                reached.set()

    making = asyncio.create_task(make())
    await asyncio.to_thread(begun.wait, 30)
    await reached.wait()  # the plain video is stored
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    for _ in range(10):  # the cancel reaches the finisher
        await asyncio.sleep(0)
    go_on.set()
    assert await asyncio.to_thread(stored.wait, 30)
    folder = app.path("videos/video_1/1")
    while any(path.is_file() for path in folder.glob("finished-*/*")):  # noqa: ASYNC110 (it ends in a thread)
        await asyncio.sleep(0.01)
    assert app.stored() <= PLAIN


async def test_the_warm_up_does_not_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **more: Any) -> Any:
        raise FinishFailed("interpolate", "no such")

    app = App(tmp_path, monkeypatch)
    monkeypatch.setattr(library, "finish_video", fail)
    options = {**app.config.model_dump(), "finisher": {"warmup": True}}
    assert Finisher.func_or_class(Config.model_validate(options), {}, "127.0.0.1")


def frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    ("num_frames", "finish", "made"),
    [
        (9, {"upscale": 2, "interpolate": {"fps": 32}}, (17, 96, 64)),
        (1, {"interpolate": {"fps": 48}}, (1, 48, 32)),
        (5, {"label": {"mark": "AI"}}, (5, 48, 32)),
    ],
    ids=["both", "one frame", "marked"],
)
async def test_real_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_frames: int, finish: Any, made: tuple[int, int, int]
) -> None:
    app = App(tmp_path, monkeypatch, real=True)
    done = (await app.make(finish=Finish.model_validate(finish), num_frames=num_frames))[-1]
    pictures = frames(app.path(done.outputs["video"]))
    assert (len(pictures), *pictures[0].shape[:2]) == made and done.warnings == []
    assert (done.finished["num_frames"], done.finished["height"], done.finished["width"]) == made
    assert done.size_bytes == app.path(done.outputs["video"]).stat().st_size
    assert len(frames(app.path(done.outputs["plain"]))) == num_frames


async def test_weights_that_cannot_be_read_leave_the_plain_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x2.pth").write_bytes(b"no weights")
    app = App(tmp_path, monkeypatch, real=True, upscalers={"x2": str(tmp_path / "x2.pth")})
    finish = Finish.model_validate({"upscale": {"factor": 2, "model": "x2"}})
    is_plain(app, await app.make(finish=finish), "could not be finished: upscale: ")
