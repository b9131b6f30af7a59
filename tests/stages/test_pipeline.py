"""A job through all stages: its events, its files, its pixels."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline

from benchmarks.model.parity import arguments
from serve_app.engine.sample_request import SampleRequest
from serve_app.errors import JobFailed
from serve_app.events import Done, Progress
from serve_app.finish.plan import Finish
from serve_app.wan.vae.decoder import VideoDecoder
from serve_app.wan.video import read_metadata
from serve_app.wan.weights.checkpoint import Checkpoint
from tests.stages.conftest import Wan, deploy_ranks, processes, until


@pytest.fixture(scope="module", params=[pytest.param(1, id="tp1", marks=pytest.mark.slow), pytest.param(2, id="tp2")])
def app(request, deploy) -> Wan:
    return deploy_ranks(deploy, request.param)


@pytest.fixture(scope="module")
def reference(app: Wan) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(app.config.model.folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def frames(path) -> np.ndarray:
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def denoise(app: Wan, sample_id: str, params) -> np.ndarray:
    """Return the latents of one sample, through encoder and denoiser."""
    encoded = app.handle("Encoder").encode.remote(params.prompt, params.negative_prompt if params.guided else None)
    stream = app.handle("Denoiser").options(stream=True).denoise.remote(SampleRequest(sample_id, params), encoded)
    return list(stream)[-1].latents


def test_events_are_true_and_in_order_and_the_files_are_there(app):
    job = app.job("一个红色的圆", seed=3)
    *progress, done = list(app.pipeline.generate.remote(job))
    assert [(p.stage, p.step, p.steps) for p in progress] == [
        ("encode", 0, 1),
        ("encode", 1, 1),
        *[("denoise", step, 6) for step in range(7)],
        ("decode", 0, 1),
        ("decode", 1, 1),
    ]
    assert isinstance(done, Done) and all(isinstance(p, Progress) for p in progress)
    assert set(done.outputs) == {"video", "thumbnail", "spritesheet"}
    assert done.size_bytes == app.path(done.outputs["video"]).stat().st_size
    assert frames(app.path(done.outputs["video"])).shape == (9, 48, 64, 3)
    metadata = read_metadata(app.path(done.outputs["video"]))
    assert metadata["prompt"] == "一个红色的圆" and metadata["seed"] == 3 and metadata["id"] == job.id
    assert done.timings["total"] >= done.timings["denoise"] > 0


def test_a_truncated_prompt_is_said(app):
    done = list(app.pipeline.generate.remote(app.job("红" * 700)))[-1]
    assert done.warnings == ["'prompt' is longer than the text encoder reads; its end was ignored."]


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 1},
        {"seed": 2, "prompt": "蓝色的正方形向上移动", "guidance_scale": 6.0, "guidance_scale_2": 2.0},
        {"seed": 3, "guidance_scale": 1.0},
        {"seed": 4, "width": 96, "height": 32, "num_frames": 5, "negative_prompt": "blurry", "num_inference_steps": 3},
    ],
    ids=lambda fields: f"seed{fields['seed']}",
)
def test_latents_equal_wan_pipeline_on_the_same_folder(app, reference, fields):
    params = app.params(**fields)
    ours = denoise(app, f"parity-{fields['seed']}-{app.config.denoiser.parallel.size}", params)
    reference.scheduler = UniPCMultistepScheduler.from_config(reference.scheduler.config, flow_shift=params.flow_shift)
    theirs = reference(**arguments(params), output_type="latent").frames.numpy()
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert error <= (1e-5 if app.config.denoiser.parallel.size == 1 else 1e-4)


async def test_batch_mates_do_not_change_a_video(app):
    """Jobs of equal shape share forward passes, and each gives the frames that it gives alone.

    Compared before the mp4: its encoder turns a difference of one into several here and there.
    """
    wanted = [app.params(seed=11), app.params("绿色的星星", seed=12, guidance_scale=5.0)]
    denoiser = app.handle("Denoiser")

    async def latents(name, params):
        encoded = app.handle("Encoder").encode.remote(params.prompt, params.negative_prompt)
        async for event in denoiser.options(stream=True).denoise.remote(SampleRequest(name, params), encoded):
            last = event
        return last.latents

    alone = [await latents(f"alone-{params.seed}", params) for params in wanted]
    before = await denoiser.describe.remote()
    together = await asyncio.gather(*(latents(f"together-{params.seed}", params) for params in wanted))
    after = await denoiser.describe.remote()
    assert after["advanced"] - before["advanced"] == 12
    made = after["steps"] - before["steps"]
    assert made < 12, "the two jobs never shared a step"
    assert sum(after["latest_s"][-made:]) == pytest.approx(after["step_s"] - before["step_s"], abs=1e-2)
    for ours, lone in zip(together, alone, strict=True):
        assert np.linalg.norm(ours - lone) <= 1e-5 * np.linalg.norm(lone)

    decoder = VideoDecoder(Checkpoint(app.config.model.folder), torch.device("cpu"), torch.float32)
    batch = decoder.decode(torch.tensor(np.concatenate(together)))
    for ours, lone in zip(batch, alone, strict=True):
        assert np.abs(ours.astype(int) - decoder.decode(torch.tensor(lone))[0].astype(int)).max() <= 1


async def test_encoder_and_decoder_batch_what_arrives_together(app):
    """Batch mates are timed together, so seconds that are equal to the last digit mean one batch."""
    prompts = ["a red circle", "蓝色的正方形", "a star"]
    encoder, decoder = app.handle("Encoder"), app.handle("Decoder")
    encoded = await asyncio.gather(*(encoder.encode.remote(prompt, "模糊") for prompt in prompts))
    assert len({one.seconds for one in encoded}) == 1
    alone = await encoder.encode.remote(prompts[1], "模糊")
    assert alone.seconds != encoded[1].seconds
    np.testing.assert_allclose(encoded[1].positive, alone.positive, atol=1e-5)
    np.testing.assert_allclose(encoded[1].negative, encoded[0].negative, atol=0)

    async def decode(name, **fields):
        params = app.params(**fields)
        latents = np.zeros((1, 16, *params.latent_shape), dtype=np.float32)
        return await decoder.decode.remote(latents, params, f"videos/{name}/1", name)

    tag = f"tp{app.config.denoiser.parallel.size}"
    same = await asyncio.gather(decode(f"{tag}a"), decode(f"{tag}b"))
    assert len({one.timings["vae"] for one in same}) == 1
    mixed = await asyncio.gather(decode(f"{tag}c"), decode(f"{tag}d", width=32), return_exceptions=True)
    assert len({one.timings["vae"] for one in mixed}) == 2, "latents of two shapes cannot be one pass"


async def test_a_failure_concerns_its_own_item_only(app):
    decoder = app.handle("Decoder")
    params = app.params()
    good = np.zeros((1, 16, *params.latent_shape), dtype=np.float32)
    bad = np.zeros((1, 3, *params.latent_shape), dtype=np.float32)  # no such channels
    name = f"good{app.config.denoiser.parallel.size}"
    fine: Any
    failed: Any
    fine, failed = await asyncio.gather(
        decoder.decode.remote(good, params, f"videos/{name}/1", name),
        decoder.decode.remote(bad, params, "videos/bad/1", "bad"),
        return_exceptions=True,
    )
    assert app.path(fine.outputs["video"]).is_file()
    assert isinstance(failed.cause, JobFailed) and failed.cause.code == "decode_failed"


async def test_a_decode_that_is_cancelled_makes_room_for_the_next(app):
    decoder = app.handle("Decoder")
    before = await decoder.describe.remote()
    name = f"cancelled{app.config.denoiser.parallel.size}"
    long, short = app.params(width=512, height=512, num_frames=161), app.params()

    def decode(params, name):
        latents = np.zeros((1, 16, *params.latent_shape), dtype=np.float32)
        return decoder.decode.remote(latents, params, f"videos/{name}/1", name)

    cancelled = decode(long, name)
    while (await decoder.describe.remote())["videos"] == before["videos"]:  # noqa: ASYNC110 (it is in a replica)
        await asyncio.sleep(0.01)
    cancelled.cancel()
    await decode(short, f"after-{name}")
    after = await decoder.describe.remote()
    assert {what: after[what] - before[what] for what in after} == {"videos": 2, "stopped": 1, "repeated": 0}
    assert not app.path(f"videos/{name}").exists()


def test_only_processes_that_do_math_hold_torch(app):
    """The coordinator and the pipeline must stay small: there may be many of them on one host."""
    list(app.pipeline.generate.remote(app.job(seed=5)))

    def holds_torch(process) -> bool:
        return any("libtorch" in region.path for region in process.memory_maps())

    light = processes("ray::ServeReplica:wan:Denoiser") + processes("ray::ServeReplica:wan:Pipeline")
    heavy = processes("ray::Rank") + processes("ray::ServeReplica:wan:Decoder")
    assert len(light) == 2 and not any(map(holds_torch, light))
    assert len(heavy) == app.config.denoiser.parallel.size + 1 and all(map(holds_torch, heavy))


def finisher_ports(status: str) -> set[int]:
    """Return the TCP ports of finishers' sockets of this status."""
    return {
        connection.laddr.port
        for process in processes("ray::ServeReplica:wan:Finisher")
        for connection in process.net_connections("tcp")
        if connection.status == status
    }


def test_a_finisher_is_started_killed_and_replaced(app):
    """One video starts it, the next one loses it in the midst of its frames and stays plain, a third is finished."""
    plan = Finish.model_validate({"interpolate": {"fps": 32}, "upscale": 2})

    def made(job) -> Done:
        return list(app.pipeline.generate.remote(replace(job, finish=plan)))[-1]

    assert not processes("ray::ServeReplica:wan:Finisher")
    done = made(app.job(seed=6))
    assert frames(app.path(done.outputs["video"])).shape == (17, 96, 128, 3)
    assert frames(app.path(done.outputs["plain"])).shape == (9, 48, 64, 3)
    assert done.finished["fps"] == 32 and not done.warnings
    (finisher,) = processes("ray::ServeReplica:wan:Finisher")
    assert not any("libtorch" in region.path for region in finisher.memory_maps())

    others = finisher_ports("LISTEN")
    with ThreadPoolExecutor() as pool:
        making = pool.submit(made, app.job(seed=7, num_frames=161))
        ports: set[int] = set()

        def sending() -> bool:
            ports.update(finisher_ports("LISTEN") - others)
            return bool(ports & finisher_ports("ESTABLISHED"))

        until(sending)
        finisher.kill()  # the decoder has just begun to send
        done = making.result()
    (warning,) = done.warnings
    assert warning.endswith("could not be finished: the finisher was lost with this video in it.")
    assert done.finished is None and frames(app.path(done.outputs["video"])).shape == (161, 48, 64, 3)

    done = made(app.job(seed=8))
    assert done.finished is not None and not done.warnings
