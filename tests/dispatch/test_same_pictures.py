"""Two mp4s, and whether they show the same to the bit."""

from __future__ import annotations

import io

import av
import numpy as np

from serve_app.dispatch.shadowing import same_pictures


def mp4(maker: str, brightness: int = 100) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = maker
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        for number in range(4):
            picture = np.full((32, 32, 3), brightness + number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return file.getvalue()


def test_only_the_pictures_count() -> None:
    assert mp4("one") != mp4("two")
    assert same_pictures(mp4("one"), mp4("two"))
    assert not same_pictures(mp4("one"), mp4("one", 101))


def test_what_is_no_video_is_compared_as_it_is() -> None:
    assert same_pictures(b"x", b"x") and not same_pictures(b"x", b"y")
