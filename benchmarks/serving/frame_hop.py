"""Ways for frames to get from the decoder to the finisher: what each costs, and how long after the decode they arrive.

    python -m benchmarks.serving.frame_hop [--size 1280x720] [--frames 81] [--decode-s 4] [--repeats 3]

Frames come evenly over the seconds that a decode takes. Two processes on this machine: one has the frames, the other
one reads them, and does nothing else with them. `first` and `last` are the seconds from the moment at which the first
and the last frame are decoded until the reader has it. CPU seconds are those of the two processes; for Serve, what
Ray's own processes use comes on top.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import ray
from ray import serve

from benchmarks.machine import describe
from serve_app.finish.plan import VideoFormat
from serve_app.stages.frame_stream import FrameReceiver, send_frames
from serve_app.storage import Storage

Wait = Callable[[int], None]
_FFV1 = ("ffv1", "bgr0", {"slices": "16", "slicecrc": "0"})
_H264 = ("libx264rgb", "rgb24", {"preset": "ultrafast", "qp": "0"})
_CHUNK = 4  # frames that a VAE makes at a time


def picture(options: argparse.Namespace) -> np.ndarray:
    """Return frames with moving structure and a little noise, `[frames, height, width, 3]`."""
    width, height = map(int, options.size.split("x"))
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 1.5, (height, width, 1))
    frames = np.empty((options.frames, height, width, 3), np.uint8)
    for index, frame in enumerate(frames):
        waves = [np.sin((columns + 3 * index) / 40 + shift) + np.cos((rows - index) / 30 + shift) for shift in range(3)]
        frame[:] = np.clip(128 + 50 * np.stack(waves, -1) + np.roll(noise, index * 7, 1), 0, 255)
    return frames


def pace(began: float, options: argparse.Namespace) -> Wait:
    """Return a function that waits until a frame is decoded."""

    def wait(index: int) -> None:
        time.sleep(max(0.0, began + options.decode_s * (index + 1) / options.frames - time.monotonic()))

    return wait


def read_all(frames: Iterator[np.ndarray]) -> tuple[float, float]:
    """Read all frames; return the moments at which the first and the last were there."""
    moments = []
    for frame in frames:
        frame[::64, ::64].sum()
        moments.append(time.monotonic())
    return moments[0], moments[-1]


# --- by TCP, as serve_app does ---


def receive_stream(pipe: Any, format: VideoFormat, folder: Path) -> Iterator[np.ndarray]:
    receiver = FrameReceiver("127.0.0.1", format, folder)
    pipe.send(receiver.address)
    yield from receiver.frames()
    receiver.close()


def send_stream(pipe: Any, frames: np.ndarray, wait: Wait, folder: Path) -> None:
    send_frames(pipe.recv(), frames, wait)


# --- by a file that is read when it is whole ---


def receive_raw(pipe: Any, format: VideoFormat, folder: Path) -> Iterator[np.ndarray]:
    pipe.send(None)
    pipe.recv()
    shape = (format.height, format.width, 3)
    with (folder / "frames.rgb").open("rb", buffering=0) as file:
        for _ in range(format.num_frames):
            frame = np.empty(shape, np.uint8)
            file.readinto(memoryview(frame.data).cast("B"))
            yield frame


def send_raw(pipe: Any, frames: np.ndarray, wait: Wait, folder: Path) -> None:
    pipe.recv()
    with (folder / "frames.rgb").open("wb", buffering=0) as file:
        for index, frame in enumerate(frames):
            wait(index)
            file.write(memoryview(frame.data).cast("B"))
    pipe.send(None)


def send_coded(pipe: Any, frames: np.ndarray, wait: Wait, folder: Path, codec: Any, stored: bool = False) -> None:
    pipe.recv()
    name, pixels, options = codec
    path = folder / "frames.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(name, rate=16, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.codec_context.thread_count = 16
        for index, frame in enumerate(frames):
            wait(index)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24").reformat(format=pixels)))
        container.mux(stream.encode())
    if stored:
        asyncio.run(Storage(str(folder / "storage")).put("frames.mkv", path))
        path.unlink()
    pipe.send(None)


def receive_coded(pipe: Any, format: VideoFormat, folder: Path, stored: bool = False) -> Iterator[np.ndarray]:
    pipe.send(None)
    pipe.recv()
    path = folder / "frames.mkv"
    if stored:

        async def fetch() -> None:
            with path.open("wb") as file:
                async for chunk in Storage(str(folder / "storage")).stream("frames.mkv"):
                    file.write(chunk)

        asyncio.run(fetch())
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


WAYS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]] = {
    "frame stream (TCP)": (send_stream, receive_stream, (), ()),
    "raw file": (send_raw, receive_raw, (), ()),
    "FFV1 file": (send_coded, receive_coded, (_FFV1,), ()),
    "lossless H.264 file": (send_coded, receive_coded, (_H264,), ()),
    "lossless H.264 through the storage": (send_coded, receive_coded, (_H264, True), (True,)),
}
"""Functions that send and receive, with further arguments of each, by way."""


def reader(pipe: Any, way: str, format: VideoFormat, folder: Path) -> None:
    """Read in a process of its own, and report the moments and the CPU seconds."""
    _, receive, _, more = WAYS[way]
    cpu = time.process_time()
    first, last = read_all(receive(pipe, format, folder, *more))
    pipe.send((first, last, time.process_time() - cpu))


def measure(way: str, frames: np.ndarray, options: argparse.Namespace) -> tuple[float, ...]:
    """Return `first`, `last`, both CPU seconds and the bytes on disk of one run."""
    send, _, more, _ = WAYS[way]
    format = VideoFormat(frames.shape[2], frames.shape[1], 16, len(frames))
    pipe, theirs = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(target=reader, args=(theirs, way, format, Path(folder)))
        process.start()
        while not pipe.poll(0.01):
            pass
        began, cpu = time.monotonic(), time.process_time()
        send(pipe, frames, pace(began, options), Path(folder), *more)
        ours = time.process_time() - cpu
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        first, last, cpu_there = pipe.recv()
        process.join()
    return (*_delays(began, first, last, options, len(frames)), ours, cpu_there, size or frames.nbytes)


def _delays(began: float, first: float, last: float, options: argparse.Namespace, count: int) -> tuple[float, float]:
    return first - began - options.decode_s / count, last - began - options.decode_s


# --- by the answers of a Serve handle, which go through Ray's object store ---


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Source:
    """Stands for the decoder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._frames = picture(options)

    async def frames(self, began: float) -> Any:
        cpu, wait = time.process_time(), pace(began, self._options)
        for start in range(0, len(self._frames), _CHUNK):
            chunk = self._frames[start : start + _CHUNK]
            await asyncio.to_thread(wait, start + len(chunk) - 1)
            yield chunk
        yield time.process_time() - cpu


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Sink:
    """Stands for the finisher."""

    def __init__(self, source: Any) -> None:
        self._source = source.options(stream=True)

    async def read(self, began: float) -> tuple[float, float, float, float]:
        cpu, moments, there = time.process_time(), [], 0.0
        async for chunk in self._source.frames.remote(began):
            if isinstance(chunk, float):
                there = chunk
                continue
            for frame in chunk:
                frame[::64, ::64].sum()
                moments.append(time.monotonic())
        return moments[0], moments[-1], there, time.process_time() - cpu


def measure_serve(handle: Any, frames: np.ndarray, options: argparse.Namespace) -> tuple[float, ...]:
    """Do as `measure`, with two replicas."""
    began = time.monotonic() + 0.2
    first, last, ours, cpu_there = handle.read.remote(began).result()
    return (*_delays(began, first, last, options, len(frames)), ours, cpu_there, frames.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--decode-s", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    frames = picture(options)
    runs = {way: [measure(way, frames, options) for _ in range(options.repeats)] for way in WAYS}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    source: Any = Source
    sink: Any = Sink
    handle = serve.run(sink.bind(source.bind(options)), route_prefix=None)
    measure_serve(handle, frames, options)  # the first call finds its way
    runs["answers of a Serve handle"] = [measure_serve(handle, frames, options) for _ in range(options.repeats)]
    serve.shutdown()
    ray.shutdown()
    print(f"\n{describe()}; {options.frames} frames of {options.size} over {options.decode_s:g} s\n")
    print("| way | first s | last s | CPU s, sender | CPU s, reader | MB |\n|---|---|---|---|---|---|")
    for way, several in runs.items():
        first, last, ours, theirs, size = (statistics.median(values) for values in zip(*several, strict=True))
        print(f"| {way} | {first:.3f} | {last:.3f} | {ours:.2f} | {theirs:.2f} | {size / 1e6:.0f} |")


if __name__ == "__main__":
    main()
