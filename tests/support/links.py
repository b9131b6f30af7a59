"""A network that fails on demand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest


class Link:
    """A link to a server on this host. Cutting it closes connections and refuses new ones until it is joined again."""

    def __init__(self, far_port: int) -> None:
        self._far_port = far_port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.stalled = asyncio.Event()
        self.stalled.set()

    async def join(self) -> None:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    def stall(self) -> None:
        """Let nothing pass any more, and tell nobody."""
        self.stalled.clear()

    def flow(self) -> None:
        self.stalled.set()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._far_port)
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            self._writers -= {writer, far_writer}
            for one in (writer, far_writer):
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self.stalled.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@pytest.fixture
async def link_to() -> AsyncIterator[Callable[[int], Awaitable[Link]]]:
    """Return a maker of links to ports of this host."""
    links: list[Link] = []

    async def make(port: int) -> Link:
        links.append(Link(port))
        await links[-1].join()
        return links[-1]

    yield make
    for link in links:
        link.flow()
        await link.cut()


LinkTo = Callable[[int], Awaitable[Link]]
