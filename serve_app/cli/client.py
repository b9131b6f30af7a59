"""The HTTP client of the command line. Each method is one call, repeated where the server asks for that."""

from __future__ import annotations

import math
import secrets
import shlex
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer

from serve_app.errors import ServeAppError
from serve_app.whole_file import whole_file

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option(help="Where the server listens.")]
ApiKey = Annotated[str | None, typer.Option("--key", envvar="WAN_SERVE_KEY", help="API key, if the server wants one.")]

# A server that does not answer, or answers that it cannot now, is asked again for this long.
_RETRY_FOR_S = 60.0
# A longer `Retry-After` is not waited for; the gateway and the openai SDK draw the line here as well.
_LONGEST_RETRY_AFTER_S = 120.0
_ENDED = ("completed", "failed")


class ServerRefused(ServeAppError):
    """The server answered that it will not, or cannot now. The message is the server's own."""


class ServerAway(ServeAppError):
    """The server does not answer."""


class Api:
    """A client of one server's videos. As a context manager it closes its connections at the end.

    Args:
        url: the server's address, with or without `/v1`.
        key: an API key, if the server wants one.
        say: called with a line when a call is repeated later because the server asked for that.
    """

    def __init__(self, url: str, key: str | None = None, say: Callable[[str], None] = lambda line: None) -> None:
        if key is not None and not key.isascii():
            raise ServeAppError("--key has letters that no key has, expected wan_...")
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        base = url.rstrip("/").removesuffix("/v1")
        try:
            self._http = httpx.Client(base_url=base, timeout=30, headers=headers, follow_redirects=True)
        except httpx.InvalidURL as error:
            raise ServeAppError(f"--url has value {url!r}, expected http://host:port: {error}") from None
        self.url = url
        self._say = say
        self._said = ""
        self._limited = False

    def __enter__(self) -> Api:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def create(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Queue a video and return its resource. It carries an idempotency key: a retry returns the same video."""
        return self._queue("/v1/videos", fields)

    def remix(self, video_id: str, prompt: str) -> dict[str, Any]:
        """Queue a video like another one, with another prompt, and return its resource."""
        return self._queue(f"{_path(video_id)}/remix", {"prompt": prompt})

    def get(self, video_id: str) -> dict[str, Any]:
        """Return the resource of a video."""
        return self._json("GET", _path(video_id))

    def list(self, after: str | None, limit: int, order: str) -> dict[str, Any]:
        """Return a page of resources."""
        given = {"after": after, "limit": limit, "order": order}
        return self._json("GET", "/v1/videos", params={name: value for name, value in given.items() if value})

    def cancel(self, video_id: str) -> dict[str, Any]:
        """Stop a video and return its resource."""
        return self._json("POST", f"{_path(video_id)}/cancel")

    def delete(self, video_id: str) -> None:
        """Remove a video."""
        self._json("DELETE", _path(video_id))

    def follow(self, video: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the resource of a video after each look at it, up to its end.

        Waits for a server that restarts meanwhile, and asks less often after a 429.

        Raises:
            ServerAway: the server did not answer for a minute.
            ServerRefused: there is no such video, or not for this key.
        """
        yield video
        path, pause_s = _path(video["id"]), 0.2
        while video["status"] not in _ENDED:
            time.sleep(pause_s)
            response = self._ask("GET", path, waits=True, limited=True)
            video = self._checked(response)
            asked_s = poll_after_s(response)
            # Twice a second for whoever looks at it, unless the server has said that this is too often.
            pause_s = asked_s if self._limited else min(asked_s, 0.5)
            yield video

    def download(self, video_id: str, out: Path, variant: str = "video") -> None:
        """Write a file of a completed video. The file appears when it is complete; see `whole_file`.

        Raises:
            ServeAppError: the file could not be fetched whole, or not be written.
        """
        path, params = f"{_path(video_id)}/content", {"variant": variant}
        try:
            with whole_file(out) as file:
                # Opened by a repeated call first, so that a server that is just starting is waited for.
                response = self._ask("GET", path, waits=True, stream=True, params=params)
                try:
                    if response.status_code >= 400:
                        response.read()
                        self._checked(response)
                    for chunk in response.iter_bytes():
                        file.write(chunk)
                    announced = response.headers.get("content-length")
                    if announced is not None and int(announced) != response.num_bytes_downloaded:
                        raise ServeAppError(f"{response.num_bytes_downloaded} of {announced} bytes arrived")
                finally:
                    response.close()
        except httpx.HTTPError as error:
            raise ServeAppError(f"the download broke off: {error}") from error
        except OSError as error:
            raise ServeAppError(f"'{out}' cannot be written: {error.strerror or error}") from error

    def command(self, verb: str, video_id: str, *more: str) -> str:
        """Return the command line of `wan-serve videos VERB` for a video of this server."""
        where = () if self.url == DEFAULT_URL else ("--url", self.url)
        return shlex.join(("wan-serve", "videos", verb, video_id, *more, *where))

    def _queue(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"idempotency-key": secrets.token_hex(16)}
        return self._json("POST", path, json=body, headers=headers)

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        return self._checked(self._ask(method, path, **options))

    def _ask(
        self,
        method: str,
        path: str,
        *,
        waits: bool = False,
        limited: bool = False,
        stream: bool = False,
        **options: Any,
    ) -> httpx.Response:
        """Send a request, again while the server asks for that, and return the last answer.

        Args:
            method: the HTTP method.
            path: the path of the URL.
            waits: wait for a server that cannot be reached. Otherwise only an answer is a reason to ask again.
            limited: ask again however often the answer is 429: the server is there, and names the time.
            stream: leave the body to be read by the caller.
            **options: passed to `httpx.Client.build_request`.

        Raises:
            ServerAway: the server cannot be reached.
        """
        request = self._http.build_request(method, path, **options)
        began = time.monotonic()
        while True:
            try:
                response = self._http.send(request, stream=stream)
            except httpx.TransportError as error:
                if not waits or time.monotonic() - began > _RETRY_FOR_S:
                    raise ServerAway(f"--url has value {self.url!r}, expected a running server: {error}") from error
                self._note(f"the server does not answer, trying for {_RETRY_FOR_S:.0f} s: {error}")
                time.sleep(0.5)
                continue
            except httpx.HTTPError as error:
                raise ServeAppError(f"--url has value {self.url!r}, expected a server of videos: {error}") from error
            status = response.status_code
            self._limited |= status == 429
            passing = status in (429, 503) or (status >= 500 and waits)
            endless = limited and status == 429
            if not passing or (not endless and time.monotonic() - began > _RETRY_FOR_S):
                return response
            pause_s = retry_after_s(response)
            hopeless = response.headers.get("x-should-retry") == "false" and not waits
            if pause_s > _LONGEST_RETRY_AFTER_S or hopeless:
                return response
            if stream:
                response.read()
            self._note(f"{_message(response)} Asking again in {pause_s:.0f} s.")
            time.sleep(pause_s)

    def _note(self, line: str) -> None:
        if line != self._said:  # once, however often it happens
            self._said = line
            self._say(line)

    def _checked(self, response: httpx.Response) -> dict[str, Any]:
        try:
            body = response.json()
            if not isinstance(body, dict) or (response.status_code >= 400 and not isinstance(body["error"], dict)):
                raise ValueError
        except (ValueError, KeyError):
            if response.status_code >= 500:  # a proxy speaks for a server that is gone
                raise ServerAway(f"the server answered {response.status_code}") from None
            raise ServeAppError(f"--url has value '{response.url}', which is no server of videos") from None
        if response.status_code >= 400:
            raise ServerRefused(_message(response))
        return body


def poll_after_s(response: httpx.Response) -> float:
    """Return the seconds after which the server wants to be asked again."""
    try:
        return max(float(response.headers.get("openai-poll-after-ms", 1000)), 100) / 1000
    except ValueError:
        return 1.0


def retry_after_s(response: httpx.Response) -> float:
    """Return the seconds that `Retry-After` asks for, as a number or as a date; 1 if there is none."""
    said = response.headers.get("retry-after", "").strip()
    try:
        wait_s = float(said)
    except ValueError:
        try:
            wait_s = (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 1.0
    return 1.0 if math.isnan(wait_s) else max(wait_s, 0.1)


def shown_status(video: dict[str, Any]) -> str:
    """Return the status for people: a cancelled video is `failed` for programs only, and a paused one `queued`."""
    if video["status"] == "failed" and (video.get("error") or {}).get("code") == "cancelled":
        return "cancelled"
    return "paused" if video["status"] == "queued" and video.get("paused") else str(video["status"])


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError, httpx.ResponseNotRead):
        return f"The server answered {response.status_code}."


def _path(video_id: str) -> str:
    if not video_id.startswith("video_"):
        raise ServeAppError(f"ID has value {video_id[:80]!r}, expected that of a video, video_...")
    return f"/v1/videos/{quote(video_id, safe='')}"
