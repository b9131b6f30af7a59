"""A server of videos that answers as it is told, on a real socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VIDEO_ID = "video_" + "0" * 38
BYTES = bytes(range(256)) * 64


def resource(status: str, **more: Any) -> dict[str, Any]:
    """Return a video as the API shows it, in the fields that clients read."""
    fields = {"id": VIDEO_ID, "status": status, "progress": 0, "created_at": 1, "prompt": "a cat", "error": None}
    return {**fields, "size": "64x64", "seconds": "1", "seed": 7, "warnings": [], "timings": {}, **more}


@dataclass
class Reply:
    """An answer.

    Attributes:
        cut: send so many bytes of the body and close the connection; -1 closes it without an answer.
    """

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


def refusal(status: int, message: str, **headers: str) -> Reply:
    """Return an answer in the envelope of errors."""
    body = {"error": {"message": message, "type": "x", "param": None, "code": "x"}}
    return Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class Script:
    """The answers by method and path, each given once but the last, and the requests that came.

    Attributes:
        hold: requests for these are not answered until `release` is set.
    """

    url: str
    replies: dict[str, list[Reply]]
    asked: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    hold: str = ""
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def count(self, what: str) -> int:
        """Return how often a route was asked for."""
        return sum(asked == what for asked, _, _ in self.asked)


@contextmanager
def scripted(replies: dict[str, list[Reply]], port: int = 0, hold: str = "") -> Iterator[Script]:
    """Serve `replies`, e.g. `{"POST /v1/videos": [Reply(...)]}`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        do_POST = do_DELETE = do_GET

        def _answer(self) -> None:
            what = f"{self.command} {self.path.partition('?')[0]}"
            content = self.rfile.read(int(self.headers.get("content-length", 0)))
            script.asked.append((what, {name.lower(): value for name, value in self.headers.items()}, content))
            if what == script.hold:
                script.held.set()
                script.release.wait(60)
            queue = script.replies[what]
            reply = queue.pop(0) if len(queue) > 1 else queue[0]
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            if reply.cut == -1:
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in {"content-length": str(len(body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: reply.cut])
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients leave, as they are told to
    script = Script(f"http://127.0.0.1:{server.server_port}", replies, hold=hold)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield script
    finally:
        script.release.set()
        server.shutdown()
        server.server_close()
