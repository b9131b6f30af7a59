"""The unmodified openai SDK against the application on a real socket."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.gateway.conftest import Server

# The SDK marks its videos API as deprecated; open servers carry the API on.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MODEL = "wan2.2-t2v-a14b"


async def test_create_and_poll_and_download(client: openai.AsyncOpenAI, server: Server) -> None:
    server.pipeline.step_s = 0.02
    video = await client.videos.create_and_poll(
        prompt="一只猫 🐈",
        model=MODEL,
        seconds="2",  # type: ignore[arg-type]
        size="128x64",  # type: ignore[arg-type]
        extra_body={
            "num_inference_steps": 3,
            "seed": 5,
            "guidance_scale": 3.5,
            "negative_prompt": "blurry",
            "priority": "interactive",
            "deadline_s": 60,
        },
    )
    assert (video.status, video.progress, video.model, video.size) == ("completed", 100, MODEL, "128x64")
    assert (video.prompt, video.seconds, video.error) == ("一只猫 🐈", "2.0625", None)
    extra = video.model_extra or {}
    assert (extra["num_frames"], extra["seed"], extra["num_inference_steps"]) == (33, 5, 3)
    assert (extra["guidance_scale"], extra["negative_prompt"]) == (3.5, "blurry")
    assert (extra["priority"], extra["deadline_at"] > video.created_at) == ("interactive", True)
    for variant, size in (("video", 200_192), ("thumbnail", 12), ("spritesheet", 14)):
        content = await client.videos.download_content(video.id, variant=variant)  # type: ignore[arg-type]
        assert len(await content.aread()) == size


async def test_create_retrieve_delete(client: openai.AsyncOpenAI, server: Server, held: asyncio.Event) -> None:
    video = await client.videos.create(prompt="a cat")
    assert video.status in ("queued", "in_progress")
    assert (await client.videos.retrieve(video.id)).id == video.id
    held.set()
    assert (await client.videos.poll(video.id, poll_interval_ms=20)).status == "completed"
    remix = await client.videos.remix(video.id, prompt="a dog")
    assert (remix.remixed_from_video_id, remix.prompt) == (video.id, "a dog")
    deleted = await client.videos.delete(video.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        await client.videos.retrieve(video.id)


async def test_list_pages_by_itself(client: openai.AsyncOpenAI) -> None:
    created = [(await client.videos.create(prompt=f"cat {index}")).id for index in range(7)]
    assert [video.id async for video in client.videos.list(limit=3)] == created[::-1]
    assert [video.id async for video in client.videos.list(limit=2, order="asc")] == created
    assert [video.id async for video in client.videos.list(after=created[2])] == created[1::-1]
    # Deleting while paging: the next page starts after a video that is gone.
    async for video in client.videos.list(limit=2):
        await client.videos.delete(video.id)
    assert [video.id async for video in client.videos.list()] == []


async def test_errors_map_to_its_classes(client: openai.AsyncOpenAI, server: Server, held: asyncio.Event) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.videos.create(prompt="a cat", extra_body={"num_frames": 32})
    assert (bad.value.param, bad.value.code, bad.value.type) == ("num_frames", "invalid_value", "invalid_request_error")
    assert bad.value.request_id
    with pytest.raises(openai.BadRequestError) as unknown:
        await client.videos.create(prompt="a cat", extra_body={"metadata": {"k": "v"}})
    assert unknown.value.param == "metadata[k]"
    with pytest.raises(openai.BadRequestError) as reference:
        await client.videos.create(prompt="a cat", input_reference=b"\x89PNG")
    assert (reference.value.param, reference.value.code) == ("input_reference", "unsupported")
    with pytest.raises(openai.BadRequestError):
        await client.videos.edit(prompt="x", video=b"mp4")
    with pytest.raises(openai.BadRequestError):
        await client.videos.extend(prompt="x", seconds="4", video=b"mp4")
    video = await client.videos.create(prompt="a cat")
    with pytest.raises(openai.ConflictError):
        await client.videos.download_content(video.id)
    with pytest.raises(openai.NotFoundError):
        await client.videos.delete("video_unknown")


async def test_a_cancelled_video_ends_polling(client: openai.AsyncOpenAI, held: asyncio.Event) -> None:
    video = await client.videos.create(prompt="a cat")
    await client.post(f"/videos/{video.id}/cancel", cast_to=object)
    ended = await client.videos.poll(video.id, poll_interval_ms=20)
    assert ended.status == "failed" and ended.error is not None and ended.error.code == "cancelled"
