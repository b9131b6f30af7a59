"""A wire that loses things: passes bytes between a client and a server, and drops what it is told to drop."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class Relay:
    """A relay on loopback in front of a port there, used as an asynchronous context manager.

    Attributes:
        lose_answer_to: a request that holds these bytes reaches the server, and its connection is cut instead of the
            answer. Once; then it is None again.
    """

    def __init__(self, port: int) -> None:
        self.lose_answer_to: bytes | None = None
        self.endpoint = ""
        self._port = port

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        losing = False

        async def there() -> None:
            nonlocal losing
            while data := await reader.read(1 << 16):
                if self.lose_answer_to is not None and self.lose_answer_to in data:
                    losing, self.lose_answer_to = True, None
                far_writer.write(data)
                await far_writer.drain()

        async def back() -> None:
            while data := await far_reader.read(1 << 16):
                if losing:
                    return
                writer.write(data)
                await writer.drain()

        tasks = [asyncio.create_task(there()), asyncio.create_task(back())]
        with suppress(asyncio.CancelledError):  # the test is over
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for end in (writer, far_writer):
            end.close()
