"""One decoder without a cluster: files are written while frames come, and only what is wanted is stored."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from benchmarks.parity import CASES
from serve_app.config import Config
from serve_app.errors import JobFailed
from serve_app.request import Params
from serve_app.stages.decoder import Decoder
from serve_app.tiny import CHECKPOINT
from serve_app.wan import video
from serve_app.wan.arrival import Arrival

PARAMS: Params = next(iter(CASES.values()))


@pytest.fixture
def decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    config = {"home": str(tmp_path), "model": {"path": str(CHECKPOINT)}, "decoder": {"device": "cpu", "warmup": False}}
    made = Decoder.func_or_class(Config.model_validate(config))
    batch = type(made)._decode_batch.__wrapped__

    async def alone(item: Any) -> Any:
        """Batches are Serve's, of replicas only. One goes on when who called is cancelled."""
        return (await asyncio.shield(asyncio.ensure_future(batch(made, [item]))))[0]

    made._decode_batch = alone
    return made


def latents() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, 16, *PARAMS.latent_shape)).astype(np.float32)


def stored(tmp_path: Path) -> dict[str, Path]:
    return {path.name: path for path in tmp_path.rglob("*") if path.suffix in (".mp4", ".jpg")}


def writing(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "tmp").iterdir())


async def test_files_of_a_video(decoder: Any, tmp_path: Path) -> None:
    decoded = await decoder.decode(latents(), PARAMS, "videos/a/1", "a")
    files = stored(tmp_path)
    path = files["video.mp4"]
    assert decoded.size_bytes == path.stat().st_size
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == PARAMS.num_frames
    assert set(files) == {"video.mp4", "thumbnail.jpg", "spritesheet.jpg"}
    assert set(decoded.outputs) == {"video", "thumbnail", "spritesheet"}
    assert not writing(tmp_path)


async def test_a_decode_that_nobody_waits_for_any_more_stores_nothing(decoder: Any, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    decode = decoder._decoder.decode

    def held(latents: Any, arrival: Arrival) -> Any:
        begun.set()
        assert go_on.wait(30)
        return decode(latents, arrival)

    decoder._decoder.decode = held
    call = asyncio.create_task(decoder.decode(latents(), PARAMS, "videos/a/1", "a"))
    await asyncio.to_thread(begun.wait, 30)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    go_on.set()
    decoder._decoder.decode = decode
    for _ in range(300):
        if not writing(tmp_path):
            break
        await asyncio.sleep(0.1)
    assert not writing(tmp_path) and not stored(tmp_path)
    await decoder.decode(latents(), PARAMS, "videos/b/1", "b")
    assert stored(tmp_path)["video.mp4"].parent.parent.name == "b"


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """When all frames are with the encoder, and when it may end."""
    fed, go_on = threading.Event(), threading.Event()
    write = video.write_mp4

    def held(*given: Any) -> None:
        write(*given)
        fed.set()
        assert go_on.wait(30)

    monkeypatch.setattr(video, "write_mp4", held)
    return fed, go_on


async def test_small_files_do_not_wait_for_the_encoder(
    decoder: Any, encoding: tuple[threading.Event, threading.Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, go_on = encoding
    put, second = decoder._storage.put, asyncio.Event()

    async def told(key: str, *others: Any) -> None:
        await put(key, *others)
        if key.endswith("spritesheet.jpg"):
            second.set()

    monkeypatch.setattr(decoder._storage, "put", told)
    call = asyncio.create_task(decoder.decode(latents(), PARAMS, "videos/a/1", "a"))
    await asyncio.wait_for(second.wait(), 20)
    assert set(stored(tmp_path / "videos")) == {"thumbnail.jpg", "spritesheet.jpg"}
    go_on.set()
    await call
    assert "video.mp4" in stored(tmp_path / "videos")


async def test_a_call_that_ends_while_its_video_is_encoded_leaves_nothing_behind(
    decoder: Any, encoding: tuple[threading.Event, threading.Event], tmp_path: Path
) -> None:
    fed, go_on = encoding
    call = asyncio.create_task(decoder.decode(latents(), PARAMS, "videos/a/1", "a"))
    await asyncio.to_thread(fed.wait, 30)
    call.cancel()
    asyncio.get_running_loop().call_later(0.3, go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await call
    assert go_on.is_set() and not writing(tmp_path), "the folder is the encoder's as long as it works"
    assert "video.mp4" not in stored(tmp_path / "videos")


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("no such"), "decode_failed"), (MemoryError(), "out_of_memory")]
)
async def test_a_decode_that_breaks_off_ends_its_file(
    decoder: Any, tmp_path: Path, error: Exception, code: str
) -> None:
    def breaks(latents: Any, arrival: Arrival) -> Any:
        arrival.begin(np.zeros((1, 5, 32, 32, 3), np.uint8))
        arrival.advance(2)
        raise error

    decoder._decoder.decode = breaks
    with pytest.raises(JobFailed) as failed:
        await decoder.decode(latents(), PARAMS, "videos/a/1", "a")
    assert failed.value.code == code
    assert not stored(tmp_path) and not writing(tmp_path)
