"""A Ray job of its own beside a deployment, which uses it by handle calls in all the ways there are."""

import asyncio
import sys

import serve_app
from serve_app.errors import InvalidRequest, JobFailed


async def use_async(client) -> None:
    video, other = await asyncio.gather(
        client.generate_async("一个绿色的三角形", seed=2), client.generate_async("a blue square", seed=3)
    )
    assert video.status == other.status == "completed"
    steps = [change.info["step"] async for change in client.stream_async("a star", seed=4, num_inference_steps=12)]
    assert steps, "nothing was streamed"


def main(out: str) -> None:
    client = serve_app.connect()

    video = client.generate("a red circle", seed=1)
    assert video.save(out).stat().st_size == len(video.content())
    assert video.content("thumbnail")[:3] == b"\xff\xd8\xff"

    changes = list(client.stream(serve_app.VideoRequest(prompt="a red circle", seed=1)))
    progress = [change.info["progress"] for change in changes]
    assert progress == sorted(progress) and progress[-1] == 100, progress
    assert len({change.info["stage"] for change in changes}) > 1, "the stages went by unseen"

    asyncio.run(use_async(client))

    try:
        client.generate("too long", num_frames=6)
    except InvalidRequest as error:
        assert error.param == "num_frames", error
    else:
        raise AssertionError("6 frames were accepted")

    slow = client.submit("a slow one", num_inference_steps=1000)
    assert client.cancel(slow.id)
    try:
        for change in iter(lambda: client.get(slow.id), None):
            if change.finished:
                change.checked()
                raise AssertionError("a cancelled video was completed")
    except JobFailed as error:
        assert error.code == "cancelled", error
    assert client.delete(slow.id) and client.get(slow.id) is None
    print("all handle calls work")


if __name__ == "__main__":
    main(sys.argv[1])
