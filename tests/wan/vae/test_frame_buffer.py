"""Frames are told when they are whole, whatever tiles they are made of, and readers wait for them."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from serve_app.wan.vae.decode import TiledDecoder
from serve_app.wan.vae.frame_buffer import FrameBuffer
from serve_app.wan.video import write_mp4
from tests.wan.vae.test_tiles import noise, small


class Watched(FrameBuffer):
    """Keeps what the told frames looked like at that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[np.ndarray] = []

    def advance(self, whole: int) -> None:
        self.seen.append(self.frames()[:whole].copy())
        super().advance(whole)


def latents() -> torch.Tensor:
    return noise(1, 16, 3, 8, 34)


@pytest.mark.parametrize(("devices", "most_bytes"), [(1, float("inf")), (1, 1), (2, 1)], ids=["whole", "tiles", "two"])
def test_what_is_told_to_be_there_is_there(devices: int, most_bytes: float) -> None:
    one = small()
    decoder = TiledDecoder([one, *(copy.deepcopy(one) for _ in range(devices - 1))], most_bytes)
    watched = Watched()
    frames = decoder.decode(latents(), arrivals=[watched]).numpy()
    counts = [len(seen) for seen in watched.seen]
    assert max(counts) == 9 and {1, 5} <= set(counts), "frames of the last tile are told as they come"
    assert all(np.array_equal(seen, frames[0, : len(seen)]) for seen in watched.seen)


def test_a_tile_that_did_not_fit_is_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, watched, tries = TiledDecoder([small()]), Watched(), []
    whole = decoder._streams[0].frames

    def short(features: object, spans: object) -> object:
        tries.append(1)
        for index, chunk in enumerate(whole(features, spans)):  # type: ignore[arg-type]
            if len(tries) == 1 and index == 2:
                raise torch.OutOfMemoryError("out of memory")
            yield chunk

    monkeypatch.setattr(decoder._streams[0], "frames", short)
    frames = decoder.decode(latents(), arrivals=[watched]).numpy()
    assert len(decoder.tiles) > 1
    assert np.array_equal(watched.seen[-1], frames[0])


def test_an_mp4_that_is_written_while_frames_come_is_the_same(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), np.uint8)
    write_mp4(frames, tmp_path / "after.mp4", 16, {})
    arrival, coming = FrameBuffer(), np.zeros_like(frames)

    def make() -> None:
        arrival.begin(coming)
        for index in range(len(frames)):
            time.sleep(0.01)
            coming[index] = frames[index]
            arrival.advance(index + 1)

    maker = threading.Thread(target=make)
    maker.start()
    write_mp4(arrival.frames(), tmp_path / "meanwhile.mp4", 16, {}, arrival.wait)
    maker.join()
    assert (tmp_path / "meanwhile.mp4").read_bytes() == (tmp_path / "after.mp4").read_bytes()


@pytest.mark.parametrize("begun", [False, True])
def test_who_waits_for_frames_that_never_come_hears_why(begun: bool, tmp_path: Path) -> None:
    arrival = FrameBuffer()
    if begun:
        arrival.begin(np.zeros((5, 32, 32, 3), np.uint8))
        arrival.advance(2)
    threading.Timer(0.05, arrival.fail, [MemoryError("no room")]).start()
    with pytest.raises(MemoryError, match="no room"):
        write_mp4(arrival.frames(), tmp_path / "video.mp4", 16, {}, arrival.wait)
    assert not list(tmp_path.iterdir())
