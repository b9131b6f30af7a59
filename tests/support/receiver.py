"""A receiver of webhooks: a real server on loopback that does what it is told with each request."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

HANG = -1
HOLD = -2


@dataclass(frozen=True)
class Received:
    """A request that came. Header names are in lower case."""

    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """Requests that came, and the answers to the next ones: a status each, then always `status`.

    HANG says nothing until `release` is set, and then hangs up; HOLD then answers `status`.
    """

    host: str = "127.0.0.1"
    port: int = 0
    answers: list[int] = field(default_factory=list)
    status: int = 204
    body: bytes = b"thank you"
    headers: str = ""
    requests: list[Received] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    most_open: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/hook"

    def ids(self) -> list[str]:
        return [request.headers["webhook-id"] for request in self.requests]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.requests.append(Received(head[0].split()[1], headers, body))
            status = self.answers.pop(0) if self.answers else self.status
            if status in (HANG, HOLD):
                await self._released_or_left(reader)
                if status == HANG:
                    return
                status = self.status
            extra = f"{self.headers}\r\n" if self.headers else ""
            content = b"" if status == 204 else self.body
            length = "" if status == 204 else f"Content-Length: {len(content)}\r\n"
            writer.write(f"HTTP/1.1 {status} X\r\n{extra}{length}\r\n".encode() + content)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _released_or_left(self, reader: asyncio.StreamReader) -> None:
        waiting = [asyncio.create_task(self.release.wait()), asyncio.create_task(reader.read())]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()


@asynccontextmanager
async def receiving(
    host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None, into: Receiver | None = None
) -> AsyncIterator[Receiver]:
    """Yield a receiver that listens inside the block. `into` continues one that listened before, at the same port."""
    receiver = into or Receiver(host=host, port=port)
    server = await asyncio.start_server(receiver.serve, host, receiver.port, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        await server.wait_closed()
