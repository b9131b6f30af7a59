"""A frame buffer announces frames when all tiles have them, and its readers wait for them."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from serve_app.wan.vae.frame_buffer import FrameBuffer
from serve_app.wan.vae.tiled_decoder import TiledDecoder
from serve_app.wan.video import write_mp4
from tests.wan.vae.test_tiles import noise, small


class Watched(FrameBuffer):
    """A frame buffer that keeps copies of the frames at the moment when they were announced."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[np.ndarray] = []

    def advance(self, whole: int) -> None:
        self.seen.append(self.frames()[:whole].copy())
        super().advance(whole)


def latents() -> torch.Tensor:
    return noise(1, 16, 3, 8, 34)


@pytest.mark.parametrize(
    ("devices", "max_tile_bytes"), [(1, float("inf")), (1, 1), (2, 1)], ids=["whole", "tiles", "two"]
)
def test_announced_frames_are_there(devices: int, max_tile_bytes: float) -> None:
    one = small()
    decoder = TiledDecoder([one, *(copy.deepcopy(one) for _ in range(devices - 1))], max_tile_bytes)
    watched = Watched()
    frames = decoder.decode(latents(), frame_buffers=[watched]).numpy()
    counts = [len(seen) for seen in watched.seen]
    assert max(counts) == 9 and {1, 5} <= set(counts), "frames of the last tile are announced as they come"
    assert all(np.array_equal(seen, frames[0, : len(seen)]) for seen in watched.seen)


def test_a_tile_that_did_not_fit_is_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, watched, tries = TiledDecoder([small()]), Watched(), []
    whole = decoder._decoders[0].frames

    def short(features: object, spans: object) -> object:
        tries.append(1)
        for index, chunk in enumerate(whole(features, spans)):  # type: ignore[arg-type]
            if len(tries) == 1 and index == 2:
                raise torch.OutOfMemoryError("out of memory")
            yield chunk

    monkeypatch.setattr(decoder._decoders[0], "frames", short)
    frames = decoder.decode(latents(), frame_buffers=[watched]).numpy()
    assert len(decoder.tiles) > 1
    assert np.array_equal(watched.seen[-1], frames[0])


def test_an_mp4_that_is_written_while_frames_come_is_the_same(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), np.uint8)
    write_mp4(frames, tmp_path / "after.mp4", 16, {})
    frame_buffer, coming = FrameBuffer(), np.zeros_like(frames)

    def make() -> None:
        frame_buffer.begin(coming)
        for index in range(len(frames)):
            time.sleep(0.01)
            coming[index] = frames[index]
            frame_buffer.advance(index + 1)

    maker = threading.Thread(target=make)
    maker.start()
    write_mp4(frame_buffer.frames(), tmp_path / "meanwhile.mp4", 16, {}, frame_buffer.wait)
    maker.join()
    assert (tmp_path / "meanwhile.mp4").read_bytes() == (tmp_path / "after.mp4").read_bytes()


@pytest.mark.parametrize("begun", [False, True])
def test_a_reader_of_frames_that_never_come_gets_the_error(begun: bool, tmp_path: Path) -> None:
    frame_buffer = FrameBuffer()
    if begun:
        frame_buffer.begin(np.zeros((5, 32, 32, 3), np.uint8))
        frame_buffer.advance(2)
    threading.Timer(0.05, frame_buffer.fail, [MemoryError("no room")]).start()
    with pytest.raises(MemoryError, match="no room"):
        write_mp4(frame_buffer.frames(), tmp_path / "video.mp4", 16, {}, frame_buffer.wait)
    assert not list(tmp_path.iterdir())
