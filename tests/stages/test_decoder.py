"""One decoder without a cluster: files are written while frames come, and only what is wanted is stored."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from benchmarks.model.parity import CASES
from serve_app.config import Config
from serve_app.errors import JobFailed
from serve_app.request import Params
from serve_app.stages.decoder import Decoder, _Item
from serve_app.tiny import CHECKPOINT
from serve_app.wan import video
from serve_app.wan.vae.frame_buffer import FrameBuffer

PARAMS: Params = next(iter(CASES.values()))


Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes decoders, with options of the model."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def decoder(**model: Any) -> Any:
        model = {"path": str(CHECKPOINT), **model}
        config = {"home": str(tmp_path), "model": model, "decoder": {"device": "cpu", "warmup": False}}
        made = Decoder.func_or_class(Config.model_validate(config))
        batch = type(made)._decode_batch.__wrapped__
        made.batch = lambda items: batch(made, items)
        one_by_one = asyncio.Semaphore(1)

        async def alone(item: Any) -> Any:
            """Stand in for Serve's batches, which replicas alone have. A batch goes on when its caller is cancelled."""

            async def run() -> Any:
                async with one_by_one:
                    return (await made.batch([item]))[0]

            return await asyncio.shield(asyncio.ensure_future(run()))

        made._decode_batch = alone
        return made

    return decoder


@pytest.fixture
def decoder(make: Make) -> Any:
    return make()


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

    def held(latents: Any, frame_buffers: list[FrameBuffer]) -> Any:
        begun.set()
        assert go_on.wait(30)
        return decode(latents, frame_buffers)

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
    """Events: all frames are with the encoder, and it may end."""
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
    await asyncio.wait_for(second.wait(), 60)
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
    def breaks(latents: Any, arrivals: list[FrameBuffer]) -> Any:
        arrivals[0].begin(np.zeros((5, 32, 32, 3), np.uint8))
        arrivals[0].advance(2)
        raise error

    decoder._decoder.decode = breaks
    with pytest.raises(JobFailed) as failed:
        await decoder.decode(latents(), PARAMS, "videos/a/1", "a")
    assert failed.value.code == code
    assert not stored(tmp_path) and not writing(tmp_path)


class Counted:
    """Records the widths of the chunks that a decoder begins; while `held`, each waits to be let go."""

    def __init__(self, decoder: Any) -> None:
        self.widths: list[int] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        (stream,) = decoder._decoder.tiled._decoders
        frames = stream.frames

        def counted(features: Any, spans: Any) -> Iterator[Any]:
            for chunk in frames(features, spans):
                self.widths.append(chunk.shape[-1])
                self.begun.set()
                assert self.go_on.wait(30)
                yield chunk

        stream.frames = counted


SMALL = PARAMS.model_copy(update={"width": 32, "height": 32, "num_frames": 5})
LONG = PARAMS.model_copy(update={"num_frames": 81})


def noise(params: Params) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, 16, *params.latent_shape)).astype(np.float32)


async def test_a_video_after_one_that_was_cancelled_does_not_wait_for_its_frames(decoder: Any, tmp_path: Path) -> None:
    chunks = Counted(decoder)
    cancelled = asyncio.create_task(decoder.decode(noise(LONG), LONG, "videos/a/1", "a"))
    await asyncio.to_thread(chunks.begun.wait, 30)
    after = asyncio.create_task(decoder.decode(noise(SMALL), SMALL, "videos/b/1", "b"))
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    chunks.go_on.set()
    await after
    assert chunks.widths == [LONG.width, SMALL.width, SMALL.width], "one chunk of 21 was under way"
    assert await decoder.describe() == {"videos": 2, "stopped": 1, "repeated": 0}
    assert stored(tmp_path / "videos").keys() == {"video.mp4", "thumbnail.jpg", "spritesheet.jpg"}
    assert not (tmp_path / "videos" / "videos" / "a").exists() and not writing(tmp_path)


async def test_of_a_batch_only_who_was_cancelled_is_dropped(decoder: Any, tmp_path: Path) -> None:
    chunks = Counted(decoder)
    leaving, staying = (_Item(latents(), PARAMS, f"videos/{name}/1", name, False) for name in "ab")
    batch = asyncio.create_task(decoder.batch([leaving, staying]))
    await asyncio.to_thread(chunks.begun.wait, 30)
    leaving.abandoned = True
    await leaving.end()
    chunks.go_on.set()
    _, (storing, _) = await batch
    assert (await storing).outputs["video"].startswith("videos/b/")
    assert {path.parent.parent.name for path in stored(tmp_path / "videos").values()} == {"b"}


async def test_who_leaves_before_its_batch_begins_is_not_decoded(decoder: Any) -> None:
    chunks = Counted(decoder)
    leaving = _Item(latents(), PARAMS, "videos/a/1", "a", False, abandoned=True)
    await decoder.batch([leaving])
    assert not chunks.widths


@pytest.mark.parametrize("name", ["thumbnail.jpg", "spritesheet.jpg", "video.mp4"])
async def test_a_call_that_ends_while_a_file_is_stored_leaves_nothing_there(
    decoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    put, begun, go_on = decoder._storage._backend.put, threading.Event(), threading.Event()

    def held(key: str, *others: Any) -> None:
        if key.endswith(name):
            begun.set()
            assert go_on.wait(30)
        put(key, *others)

    monkeypatch.setattr(decoder._storage._backend, "put", held)
    call = asyncio.create_task(decoder.decode(latents(), PARAMS, "videos/a/1", "a"))
    await asyncio.to_thread(begun.wait, 30)
    call.cancel()
    asyncio.get_running_loop().call_later(0.1, go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await call
    assert go_on.is_set() and not stored(tmp_path) and not writing(tmp_path)


async def test_the_death_of_who_called_ends_the_decode(decoder: Any, tmp_path: Path) -> None:
    """`client_liveness` cancels the task."""
    chunks, tasks = Counted(decoder), []

    @contextmanager
    def watching(caller: Any) -> Iterator[None]:
        tasks.append(asyncio.current_task())
        assert caller == "the pipeline"
        yield

    decoder._client_liveness.watching = watching
    call = asyncio.create_task(decoder.decode(noise(LONG), LONG, "videos/a/1", "a", caller="the pipeline"))
    await asyncio.to_thread(chunks.begun.wait, 30)
    tasks[0].cancel()
    chunks.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not stored(tmp_path) and not writing(tmp_path)


def spoil(decoder: Any) -> None:
    decoder._decoder.vae.decoder.conv_out.bias.data[0] = float("nan")


async def test_pixels_that_are_not_finite_fail_the_job(decoder: Any, tmp_path: Path) -> None:
    spoil(decoder)
    with pytest.raises(JobFailed, match="decode stage made pixels that are not finite numbers") as failed:
        await decoder.decode(latents(), PARAMS, "videos/a/1", "a")
    assert (failed.value.code, failed.value.retryable) == ("not_finite", False)
    assert type(failed.value) is JobFailed, "others have to unpickle it without torch"
    assert not stored(tmp_path) and not writing(tmp_path)


async def test_latents_that_are_not_finite_are_named_before_they_are_decoded(decoder: Any) -> None:
    bad = latents()
    bad[0, 0, 0, 0, 0] = np.inf
    with pytest.raises(JobFailed, match="latents that came to the decode stage") as failed:
        await decoder.decode(bad, PARAMS, "videos/a/1", "a")
    assert failed.value.code == "not_finite"


async def test_what_bfloat16_has_no_pixels_for_is_decoded_once_more_in_float32(make: Make, tmp_path: Path) -> None:
    decoder = make(vae_dtype="bfloat16")
    spoil(decoder)
    decoded = await decoder.decode(latents(), PARAMS, "videos/a/1", "a")
    (warning,) = decoded.warnings
    assert "bfloat16" in warning and "float32" in warning and "model.vae_dtype" in warning
    exact = make().batch
    assert stored(tmp_path / "videos").keys() == {"video.mp4", "thumbnail.jpg", "spritesheet.jpg"}
    assert not writing(tmp_path)
    item = _Item(latents(), PARAMS, "videos/b/1", "b", False)
    await (await exact([item]))[0][0]
    pictures = sorted((tmp_path / "videos").rglob("thumbnail.jpg"))
    assert len(pictures) == 2 and pictures[0].read_bytes() == pictures[1].read_bytes(), "as if it had been float32"


async def test_what_float32_has_no_pixels_for_either_fails(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make(vae_dtype="bfloat16")
    spoil(decoder)
    load = decoder._decoder.in_float32

    def spoiled() -> Any:
        loaded = load()
        loaded.vae.decoder.conv_out.bias.data[0] = float("nan")
        return loaded

    monkeypatch.setattr(decoder._decoder, "in_float32", spoiled)
    with pytest.raises(JobFailed, match="float32") as failed:
        await decoder.decode(latents(), PARAMS, "videos/a/1", "a")
    assert failed.value.code == "not_finite"
    assert await decoder.describe() == {"videos": 1, "stopped": 0, "repeated": 1}


async def test_of_a_batch_only_who_is_not_finite_fails(decoder: Any) -> None:
    bad = latents()
    bad[0, 0, 0, 0, 0] = np.nan
    items = [_Item(one, PARAMS, f"videos/{name}/1", name, False) for one, name in ((latents(), "a"), (bad, "b"))]
    (storing, _), failed = await decoder.batch(items)
    assert failed.code == "not_finite"
    assert (await storing).outputs["video"] == "videos/a/1/video.mp4"


def test_a_warm_up_does_not_judge(decoder: Any) -> None:
    spoil(decoder)
    decoder._math.call(decoder._warm_up, latents(), PARAMS)
