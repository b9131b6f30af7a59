"""A decoder, a finisher and a pipeline in one process, with steps that get into trouble on demand."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayTaskError

from serve_app.config import Config
from serve_app.engine.sample_request import Denoised
from serve_app.events import Done, Event, Progress
from serve_app.finish import finisher as library
from serve_app.finish.failure import FinishStopped
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
        self.decoder = cast(Any, Decoder).func_or_class(self.config)
        batch = type(self.decoder)._decode_batch.__wrapped__

        async def alone(item: Any) -> Any:
            return (await batch(self.decoder, [item]))[0]

        self.decoder._decode_batch = alone
        self.finisher = cast(Any, Finisher).func_or_class(
            self.config, {"model": "tiny", "revision": "abc"}, "127.0.0.1"
        )
        self.decode = self.decoder.decode
        self.finish = self.finisher.finish
        self.finishers = Handle(finish=lambda *given: self.finish(*given))
        self.decoders = Handle(decode=lambda *given: self.decode(*given))
        self.pipeline = cast(Any, Pipeline).func_or_class(
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
