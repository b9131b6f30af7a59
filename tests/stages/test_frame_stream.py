"""Frames on their way from a decoder to a finisher: they arrive as they were, and an end on either side is noticed."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from serve_app.finish.plan import VideoFormat
from serve_app.stages.frame_stream import FrameAddress, FrameReceiver, FramesLost, send_frames

FORMAT = VideoFormat(width=34, height=18, fps=16, num_frames=7)
FRAMES = np.random.default_rng(0).integers(0, 256, (7, 18, 34, 3), dtype=np.uint8)


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[FrameReceiver]:
    made = FrameReceiver("127.0.0.1", FORMAT, tmp_path)
    yield made
    made.close()


def started(function: object, *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_frames_arrive_as_they_come(receiver: FrameReceiver, tmp_path: Path) -> None:
    there = threading.Semaphore(0)
    sending = started(send_frames, receiver.address, FRAMES, lambda index: there.acquire())
    reading = receiver.frames()
    for frame in FRAMES:
        there.release()  # the reader gets this one before the next exists
        assert np.array_equal(next(reading), frame)
    assert next(reading, None) is None
    sending.join()
    assert not list(tmp_path.iterdir()), "the temporary file has no name, and ends with the process"


def test_the_sender_does_not_wait_for_the_reader(receiver: FrameReceiver) -> None:
    send_frames(receiver.address, FRAMES, lambda index: None)
    assert np.array_equal(np.stack([*receiver.frames()]), FRAMES)


def test_frames_of_a_view_are_sent_in_order(receiver: FrameReceiver) -> None:
    send_frames(receiver.address, FRAMES[:, ::-1, ::-1], lambda index: None)
    assert np.array_equal(np.stack([*receiver.frames()]), FRAMES[:, ::-1, ::-1])


def test_a_decode_that_breaks_off_is_told_after_the_frames_that_came(receiver: FrameReceiver) -> None:
    def wait(index: int) -> None:
        if index == 3:
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        send_frames(receiver.address, FRAMES, wait)
    got = []
    with pytest.raises(FramesLost, match="the decoder sent 3 of 7 frames"):
        for frame in receiver.frames():
            got.append(frame)
    assert np.array_equal(np.stack(got), FRAMES[:3])


def test_a_reader_that_waits_is_woken(receiver: FrameReceiver) -> None:
    threading.Timer(0.05, receiver.stop).start()
    with pytest.raises(FramesLost, match="finishing has ended"):
        next(receiver.frames())


def test_a_sender_notices_that_nobody_takes_its_frames(receiver: FrameReceiver) -> None:
    begun, go_on = threading.Event(), threading.Event()
    failed: list[Exception] = []

    def wait(index: int) -> None:
        begun.set()
        assert go_on.wait(30)

    def send() -> None:
        try:
            # More than the system's buffers take.
            send_frames(receiver.address, np.zeros((20, 1000, 1000, 3), np.uint8), wait)
        except OSError as error:
            failed.append(error)

    sending = started(send)
    begun.wait(30)
    receiver.stop()
    go_on.set()
    sending.join(60)
    assert failed


def test_who_does_not_know_the_token_is_not_heard(receiver: FrameReceiver) -> None:
    address = receiver.address
    stranger = FrameAddress(address.host, address.port)
    with pytest.raises(OSError):
        for _ in range(100):
            send_frames(stranger, np.zeros((20, 1000, 1000, 3), np.uint8), lambda index: None)
    with socket.create_connection((address.host, address.port)):
        pass  # says nothing
    send_frames(address, FRAMES, lambda index: None)
    assert np.array_equal(np.stack([*receiver.frames()]), FRAMES)
    assert address.token.hex() not in repr(address)


def test_a_disk_that_is_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = FrameReceiver("127.0.0.1", FORMAT, tmp_path)

    def full(*given: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with suppress(OSError):  # the receiver may have hung up already
        send_frames(receiver.address, FRAMES, lambda index: None)
    with pytest.raises(OSError, match="No space left"):
        next(receiver.frames())
    receiver.close()
