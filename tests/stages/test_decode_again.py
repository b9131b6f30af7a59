"""A decoder whose memory is short: the latents wait in the pipeline, and are offered again."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayTaskError

from benchmarks.model.parity import CASES
from serve_app.errors import JobFailed
from serve_app.job_spec import JobSpec
from serve_app.stages import pipeline
from serve_app.stages.decoder import Decoded

DECODED = Decoded({"video": "videos/a/1/video.mp4"}, 1, {"vae": 1.0, "store": 1.0}, "0")
PARAMS = next(iter(CASES.values()))


class FakeCall:
    """A call of a handle. It goes on when its caller stops waiting."""

    def __init__(self, work: Coroutine[Any, Any, Decoded]) -> None:
        self.task = asyncio.ensure_future(work)
        self.cancel = self.task.cancel

    def __await__(self) -> Generator[Any, None, Decoded]:
        return asyncio.shield(self.task).__await__()


class FakeDecoder:
    """A decoder's handle. Fails in turn with `failures`, as Serve reports them, and keeps the latents it was given."""

    def __init__(self, failures: list[JobFailed], hangs: bool = False) -> None:
        self.failures, self.hangs = failures, hangs
        self.given: list[np.ndarray] = []
        self.asked = asyncio.Event()
        self.decode = self

    def options(self) -> FakeDecoder:
        return self

    def remote(self, latents: np.ndarray, *_: Any) -> FakeCall:
        self.given.append(latents)
        self.asked.set()
        self.call = FakeCall(self._decode())
        return self.call

    async def _decode(self) -> Decoded:
        if self.hangs:
            await asyncio.Event().wait()
        if self.failures:
            raise RayTaskError("decode", "", self.failures.pop(0)).as_instanceof_cause()
        return DECODED


async def decode(decoder: FakeDecoder, latents: np.ndarray) -> Decoded:
    made = pipeline.Pipeline.func_or_class(FakeHandle(), FakeHandle(), decoder)
    decoded: Decoded = await made._decode(latents, PARAMS, JobSpec("a", PARAMS, "videos/a/1"))
    return decoded


class FakeHandle:
    """A handle of a stage that is not called."""

    def options(self, **_: Any) -> FakeHandle:
        return self


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_DECODE_AGAIN_S", (0.0, 0.0))


async def test_the_same_latents_are_decoded_again_when_memory_was_short() -> None:
    latents = np.ones((1, 16, 3, 6, 8), dtype=np.float32)
    decoder = FakeDecoder([JobFailed("out_of_memory", "short", retryable=True)] * 2)
    assert await decode(decoder, latents) == DECODED
    assert len(decoder.given) == 3 and all(given is latents for given in decoder.given)


@pytest.mark.parametrize(
    ("failed", "tries"),
    [(JobFailed("out_of_memory", "short", retryable=True), 3), (JobFailed("decode_failed", "no such channels"), 1)],
    ids=["memory stays short", "nothing that another try could help"],
)
async def test_it_ends(failed: JobFailed, tries: int) -> None:
    decoder = FakeDecoder([failed] * 9)
    with pytest.raises(RayTaskError) as error:
        await decode(decoder, np.ones(1, dtype=np.float32))
    assert (error.value.cause.code, error.value.cause.retryable) == (failed.code, failed.retryable)
    assert len(decoder.given) == tries


async def test_a_pipeline_that_ends_early_ends_the_decode_too() -> None:
    """Serve cancels the calls of a cancelled call by itself, but not of one that ends because its caller has died."""
    decoder = FakeDecoder([], hangs=True)
    ending = asyncio.create_task(decode(decoder, np.ones(1, dtype=np.float32)))
    await decoder.asked.wait()
    ending.cancel()
    await asyncio.wait([ending])
    await asyncio.wait([decoder.call.task])
    assert decoder.call.task.cancelled()
