"""A decoder, a finisher and a pipeline in one process: whatever becomes of the finishing, there is a video."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import pytest
from ray.exceptions import RayActorError, RayTaskError

from serve_app.config import Config
from serve_app.engine.sample_request import Denoised
from serve_app.errors import JobFailed
from serve_app.events import Done, Event, Progress
from serve_app.finish import finisher as library
from serve_app.finish.failure import FinishFailed, FinishStopped
from serve_app.finish.finisher import FinishedVideo
from serve_app.finish.plan import Finish, VideoFormat
from serve_app.job_spec import JobSpec
from serve_app.request import VideoRequest, resolve
from serve_app.stages import decoder
from serve_app.stages.decoder import Decoder
from serve_app.stages.denoiser import Started
from serve_app.stages.finisher import Finisher
from serve_app.stages.pipeline import Pipeline
from serve_app.tiny import CHECKPOINT

PLAN = Finish.model_validate({"interpolate": {"fps": 32}})


class Steps:
    """Stands in for the library of steps: writes down what came, and gets into trouble on demand.

    Attributes:
        frames: frames that came.
        trouble: called with each frame's index before the next.
    """

    def __init__(self) -> None:
        self.frames: list[np.ndarray] = []
        self.trouble: Callable[[int], None] = lambda index: None
        self.metadata: Mapping[str, Any] = {}
        self.plans: list[Finish] = []
        self.ended = 0

    def __call__(
        self, frames: Iterator[np.ndarray], source: VideoFormat, finish: Finish, folder: Path, **more: Any
    ) -> FinishedVideo:
        self.frames, self.metadata = [], more["metadata"]
        self.plans.append(finish)
        try:
            for index, frame in enumerate(frames):
                if more["stop"]():
                    raise FinishStopped
                self.frames.append(frame)
                self.trouble(index)
                for step in ("interpolate", "encode"):
                    more["progress"](step, (index + 1) / source.num_frames)
        finally:
            self.ended += 1
        (folder / "finished.webm").write_bytes(b"finished")
        (folder / "small.gif").write_bytes(b"preview")
        made = finish.result(source)
        extras = {"preview": folder / "small.gif"}
        return FinishedVideo(folder / "finished.webm", "video/webm", made, extras, {"interpolate": 0.25}, ("Fine.",))


@contextmanager
def _wrapped() -> Iterator[None]:
    """Raise errors of a replica's code as Ray does at its caller."""
    try:
        yield
    except (StopAsyncIteration, RayActorError):
        raise
    except Exception as error:
        raise RayTaskError("call", "", error) from error


class Call:
    """A call of a method as a Serve handle makes it: a stream or one answer, which can be cancelled."""

    def __init__(self, made: Any) -> None:
        self._stream = made if hasattr(made, "__aiter__") else None
        self._task = None if self._stream is not None else asyncio.ensure_future(made)
        self._steps: list[asyncio.Task[Any]] = []
        self._closing: asyncio.Task[None] | None = None
        self.cancelled = False

    def __await__(self) -> Any:
        with _wrapped():
            return (yield from self._task.__await__())

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        step = asyncio.ensure_future(anext(cast(Any, self._stream)))
        self._steps = [step]
        with _wrapped():
            return await step

    def cancel(self) -> None:
        self.cancelled = True
        if self._task is not None:
            self._task.cancel()
        elif self._closing is None:
            self._closing = asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        for step in self._steps:
            step.cancel()
        await asyncio.gather(*self._steps, return_exceptions=True)
        await self._stream.aclose()


class Handle:
    """A handle of one replica in this process; records its calls."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        self.calls: list[Call] = []
        self._methods = methods

    def options(self, **_: Any) -> Handle:
        return self

    def __getattr__(self, name: str) -> Any:
        method = self._methods[name]

        class Method:
            def remote(_, *given: Any) -> Call:
                call = Call(method(*given))
                self.calls.append(call)
                return call

        return Method()


class App:
    """The stages without a cluster. The denoiser hands over noise.

    Attributes:
        steps: what the finisher does with frames.
        decodes: calls of the decoder.
    """

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, real: bool = False, **finisher: Any) -> None:
        self.steps = Steps()
        if not real:
            monkeypatch.setattr(library, "finish_video", self.steps)
        no_gpus = SimpleNamespace(get_accelerator_ids=dict)
        monkeypatch.setattr(decoder, "ray", SimpleNamespace(get_runtime_context=lambda: no_gpus))
        self.config = Config.model_validate(
            {
                "home": str(home),
                "model": {"path": str(CHECKPOINT), "name": "tiny"},
                "defaults": {"width": 32, "height": 48, "num_frames": 9, "num_inference_steps": 5},
                "decoder": {"device": "cpu", "warmup": False, "threads": 1},
                "finisher": {"warmup": False, "wait_s": 20, **finisher},
            }
        )
        self.decoder = Decoder.func_or_class(self.config)
        batch = type(self.decoder)._decode_batch.__wrapped__

        async def alone(item: Any) -> Any:
            return (await batch(self.decoder, [item]))[0]

        self.decoder._decode_batch = alone
        self.finisher = Finisher.func_or_class(self.config, {"model": "tiny", "revision": "abc"}, "127.0.0.1")
        self.decode = self.decoder.decode
        self.finish = self.finisher.finish
        self.finishers = Handle(finish=lambda *given: self.finish(*given))
        self.decoders = Handle(decode=lambda *given: self.decode(*given))
        self.pipeline = Pipeline.func_or_class(
            Handle(encode=self._encode),
            Handle(denoise=self._denoise),
            self.decoders,
            store_wait_s=20,
            finisher=self.finishers,
            finishing=self.config.finisher,
        )

    async def _encode(self, *_: Any) -> None:
        return None

    async def _denoise(self, request: Any, *_: Any) -> AsyncIterator[Any]:
        yield Started(0.1, [], 0)
        for step in range(1, 6):
            yield Progress("denoise", step, 5, 1.0)
        shape = (1, 16, *request.params.latent_shape)
        yield Denoised(np.random.default_rng(0).normal(size=shape).astype(np.float32), 2.0)

    def job(self, finish: Finish | None = PLAN, **fields: Any) -> JobSpec:
        params = resolve(VideoRequest(prompt="a", seed=1, **fields), self.config)
        return JobSpec("video_1", params, "videos/video_1/1", finish=finish)

    async def make(self, **fields: Any) -> list[Any]:
        return [event async for event in self.pipeline._generate(self.job(**fields))]

    def path(self, key: str) -> Path:
        return Path(self.config.storage_url) / key

    def stored(self) -> set[str]:
        folder = self.path("videos/video_1/1")
        return {path.name for path in folder.rglob("*") if path.is_file()}


PLAIN = {"video.mp4", "thumbnail.jpg", "spritesheet.jpg"}


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> App:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("serve_app.stages.finisher._STORE_AGAIN_S", (0.01,))
    monkeypatch.setattr("serve_app.stages.pipeline._STORE_AGAIN_S", (0.01, 0.01))
    return App(tmp_path, monkeypatch)


def left_over(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "tmp").glob("wan-*"))


def is_plain(app: App, events: list[Event], reason: str) -> None:
    """Assert that a job has ended with the plain video and says why."""
    done = events[-1]
    assert isinstance(done, Done)
    assert done.finished is None and app.path(done.outputs["video"]).name == "video.mp4"
    assert done.size_bytes == app.path(done.outputs["video"]).stat().st_size
    (warning,) = done.warnings
    assert warning.startswith("The video is as it was decoded, because it could not be finished: ")
    assert reason in warning, warning
    assert app.stored() == PLAIN and "finish" not in done.timings


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
