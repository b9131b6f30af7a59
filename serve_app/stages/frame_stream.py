"""The frame stream: frames of a video that is being decoded, on their way to the process that finishes it.

The finisher listens, and the decoder connects and sends raw pixels as they come. The receiving side writes them to a
temporary file as fast as they arrive, so that a slow finisher holds neither the decoder nor memory. How this compares
with other ways is measured by `python -m benchmarks.serving.frame_hop`.

Knows nothing of Ray. Frames are not encrypted: they stay within the cluster's network, as Ray's own objects do.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from serve_app.errors import ServeAppError
from serve_app.finish.plan import VideoFormat

# Seconds without a byte taken after which a send has failed: the receiver takes everything as it comes.
_SEND_S = 30.0
_CONNECT_S = 10.0
_TOKEN_BYTES = 32


class FramesLost(ServeAppError):
    """The frames ended before the last one."""


@dataclass(frozen=True)
class FrameAddress:
    """An address that takes the frames of one video, once.

    Attributes:
        host: IP address.
        port: TCP port.
        token: proves that the sender was given this address by the receiver.
    """

    host: str
    port: int
    token: bytes = field(default_factory=lambda: secrets.token_bytes(_TOKEN_BYTES), repr=False)


def send_frames(address: FrameAddress, frames: np.ndarray, wait: Callable[[int], None]) -> None:
    """Send frames as they come.

    Args:
        address: the receiver's.
        frames: `[frames, height, width, 3]`, uint8.
        wait: called with the index of each frame before it is sent, to wait until it is there. An error that it raises
            ends the stream.

    Raises:
        OSError: the receiver cannot be reached or has gone.
    """
    with socket.create_connection((address.host, address.port), _CONNECT_S) as connection:
        connection.settimeout(_SEND_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(address.token)
        for index, frame in enumerate(frames):
            wait(index)
            connection.sendall(memoryview(np.ascontiguousarray(frame).data).cast("B"))


class FrameReceiver:
    """Receives the frames of one video into a temporary file, which is gone with the process.

    Args:
        host: IP address to listen on.
        format: size and number of the frames.
        folder: place of the temporary file.

    Raises:
        OSError: the address cannot be listened on, or the folder not be written to.
    """

    def __init__(self, host: str, format: VideoFormat, folder: Path) -> None:
        self._format = format
        self._changed = threading.Condition()
        self._whole = 0
        self._error: Exception | None = None
        self._stopped = False
        self._connection: socket.socket | None = None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family)
        self.address = FrameAddress(host, self._server.getsockname()[1])
        path = folder / "frames.rgb"
        self._spool = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        path.unlink()
        self._thread = threading.Thread(target=self._receive, name="frames", daemon=True)
        self._thread.start()

    def frames(self) -> Iterator[np.ndarray]:
        """Yield each frame, `[height, width, 3]`, uint8, once it is there.

        Raises:
            FramesLost: the sender has gone before the last frame, or `close` was called.
            OSError: the temporary file cannot be written or read, as on a full disk.
        """
        shape = (self._format.height, self._format.width, 3)
        size = self._format.height * self._format.width * 3
        for index in range(self._format.num_frames):
            with self._changed:
                self._changed.wait_for(lambda: self._whole > index or self._error is not None)  # noqa: B023
                if self._whole <= index:
                    assert self._error is not None
                    raise self._error
            frame = np.empty(shape, np.uint8)
            if os.preadv(self._spool, [memoryview(frame.data).cast("B")], index * size) != size:
                raise OSError("the temporary file of frames is cut short")
            yield frame

    def stop(self) -> None:
        """Hang up. A reader that waits for a frame gets `FramesLost`."""
        self._fail(FramesLost("finishing has ended"))
        with self._changed:
            self._stopped = True
            for one in (self._server, self._connection):
                if one is not None:
                    with suppress(OSError):  # closed already; or a listening socket, which wakes all the same
                        one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up and free the temporary file. Call it when nobody reads any more."""
        self.stop()
        self._thread.join()
        os.close(self._spool)

    def _receive(self) -> None:
        try:
            with self._server:
                connection = self._accept()
            with connection:
                self._spool_frames(connection)
        except FramesLost as error:
            self._fail(error)
        except OSError as error:
            self._fail(error)

    def _accept(self) -> socket.socket:
        """Return the connection of the one who knows the token. Others are hung up on."""
        while True:
            connection, _ = self._server.accept()
            with self._changed:
                if self._stopped:
                    connection.close()
                    raise FramesLost("finishing has ended")
                self._connection = connection
            connection.settimeout(_CONNECT_S)
            said = bytearray(_TOKEN_BYTES)
            try:
                known = _fill(connection, memoryview(said)) and hmac.compare_digest(bytes(said), self.address.token)
            except OSError:
                known = False
            if known:
                connection.settimeout(None)  # a chunk may take minutes to decode
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                return connection
            connection.close()

    def _spool_frames(self, connection: socket.socket) -> None:
        format = self._format
        frame = memoryview(bytearray(format.height * format.width * 3))
        for index in range(format.num_frames):
            if not _fill(connection, frame):
                raise FramesLost(f"the decoder sent {index} of {format.num_frames} frames")
            written = 0
            while written < len(frame):
                written += os.pwrite(self._spool, frame[written:], index * len(frame) + written)
            with self._changed:
                self._whole = index + 1
                self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
                self._changed.notify_all()


def _fill(connection: socket.socket, buffer: memoryview) -> bool:
    """Receive as many bytes as the buffer takes; return False if they end before."""
    filled = 0
    while filled < len(buffer):
        count = connection.recv_into(buffer[filled:])
        if not count:
            return False
        filled += count
    return True
