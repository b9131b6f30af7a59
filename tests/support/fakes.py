"""A pipeline that needs no model: real events, real files, and trouble on demand."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve_app.events import Done, Event, Progress
from serve_app.job_spec import JobSpec
from serve_app.request import Params
from serve_app.storage import Storage, download_name

PARAMS = Params(
    prompt="a red circle moves right",
    negative_prompt="",
    width=64,
    height=64,
    num_frames=9,
    fps=16,
    seed=7,
    num_inference_steps=4,
    guidance_scale=4.0,
    guidance_scale_2=3.0,
    flow_shift=5.0,
    boundary_ratio=0.875,
)


class FakePipeline:
    """A pipeline that yields the events of `num_inference_steps` steps and stores three files.

    Args:
        step_s: time of a step.
        errors: raised by the first attempts, one each, half-way through denoising.
        gate: if given, every run waits for it half-way through denoising.
        stubborn: store the files even when cancelled, as a stage does whose call is already under way.
        saving: save a state after each step, and begin at the last one saved.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        step_s: float = 0.0,
        errors: list[Exception] | None = None,
        gate: asyncio.Event | None = None,
        stubborn: bool = False,
        saving: bool = False,
    ) -> None:
        self.storage = storage
        self.step_s = step_s
        self.errors = list(errors or [])
        self.gate = gate
        self.stubborn = stubborn
        self.saving = saving
        self.jobs: list[JobSpec] = []
        self.ended: list[str] = []

    async def __call__(self, job: JobSpec) -> AsyncGenerator[Event, None]:
        self.jobs.append(job)
        steps = job.params.num_inference_steps
        try:
            yield Progress("encode", 0, 1)
            yield Progress("encode", 1, 1)
            for step in range(await self._saved_step(job), steps + 1):
                await asyncio.sleep(self.step_s)
                if step == steps // 2:
                    if self.gate is not None:
                        await self.gate.wait()
                    if self.errors:
                        raise self.errors.pop(0)
                if self.saving:
                    with contextlib.suppress(FileExistsError):
                        await self.storage.put(f"{job.state_prefix}/{step:04d}", b"state")
                yield Progress("denoise", step, steps, seconds_left=(steps - step) * self.step_s)
            yield Progress("decode", 0, 1)
            outputs = await self._store(job)
            yield Progress("decode", 1, 1)
            done = Done(outputs, {"encode": 0.1, "denoise": 2.0, "decode": 0.3}, 200_000, ["The prompt is short."])
            if job.finish is not None:
                yield Progress("finish", 1, 2)
                done = await self._finish(job, done)
            yield done
        except (asyncio.CancelledError, GeneratorExit):
            if self.stubborn:
                self.late = asyncio.create_task(self._store_late(job))
            raise
        finally:
            self.ended.append(job.id)

    async def _finish(self, job: JobSpec, done: Done) -> Done:
        key = f"{job.prefix}/finished/video.webm"
        await self.storage.put(key, b"finished", download_name(job.id, key))
        made = {"width": 64, "height": 64, "fps": 32, "num_frames": 17, "content_type": "video/webm"}
        outputs = {**done.outputs, "plain": done.outputs["video"], "video": key}
        return replace(
            done,
            outputs=outputs,
            timings={**done.timings, "finish": 0.5},
            finished={**made, "seconds": {"interpolate": 0.4}},
            finish_gpu_seconds=1.5,
        )

    async def _saved_step(self, job: JobSpec) -> int:
        saved = await self.storage.list(job.state_prefix) if self.saving and job.state_prefix else []
        return int(saved[-1].rpartition("/")[2]) if saved else 0

    async def _store_late(self, job: JobSpec) -> None:
        await asyncio.sleep(0.05)
        with contextlib.suppress(FileNotFoundError):  # the folder is swept at the same time
            await self._store(job)
            if self.saving:
                await self.storage.put(f"{job.state_prefix}/9999", b"state")

    async def _store(self, job: JobSpec) -> dict[str, str]:
        outputs = {
            "video": f"{job.prefix}/video.mp4",
            "thumbnail": f"{job.prefix}/thumbnail.jpg",
            "spritesheet": f"{job.prefix}/spritesheet.jpg",
        }
        for key, content in (
            (outputs["video"], bytes(range(256)) * 782),
            (outputs["thumbnail"], b"\xff\xd8 thumbnail"),
            (outputs["spritesheet"], b"\xff\xd8 spritesheet"),
        ):
            await self.storage.put(key, content, download_name(job.id, key))
        return outputs


async def until(condition: Callable[[], Awaitable[Any]], within_s: float = 120) -> Any:
    """Wait for the first true value of `condition` and return it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            while not (value := await condition()):  # noqa: ASYNC110 (the condition is in a database)
                await asyncio.sleep(0.01)
            return value
    raise AssertionError(f"not within {within_s} s")


def files(storage: Storage) -> list[str]:
    """Return the files in a storage. os.walk, because a folder may vanish while it is walked."""
    if not hasattr(storage._backend, "folder"):
        return storage._backend.list("videos") + storage._backend.list("samples")
    found = [Path(folder, name) for folder, _, names in os.walk(storage.folder) for name in names]
    return sorted(str(path.relative_to(storage.folder)) for path in found)
