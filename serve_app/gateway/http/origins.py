"""Host names that a server without keys answers to, and web pages that may call it.

A browser on this machine or in this network runs pages of other sites, so without keys an address does not show who
calls. Such a page could send requests (cross-site request forgery), or point its own host name to our address and read
the answers (DNS rebinding). With keys neither works: the page would have to know one.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import GatewayConfig
from serve_app.gateway.http.errors import ApiError

# Response headers that a page of another origin may read, beside the few that browsers always show.
_EXPOSED = (
    *("accept-ranges", "allow", "content-disposition", "content-length", "content-range", "etag", "last-modified"),
    *("openai-poll-after-ms", "retry-after", "www-authenticate", "x-request-id", "x-should-retry"),
)
_SAFE = ("GET", "HEAD", "OPTIONS")
_USUAL_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?:\[([^\[\]@/?#\s]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{0,5})?")


class Origins:
    """The rules for the headers `Host`, `Origin` and `Sec-Fetch-Site` of a request.

    Args:
        options: section `gateway`.
    """

    def __init__(self, options: GatewayConfig) -> None:
        url = urlsplit(options.public_url)
        here = socket.gethostname().lower()
        self._names = {"localhost", here, here.partition(".")[0], (url.hostname or "localhost").removesuffix(".")}
        self._names |= {name for name in options.hosts if not name.startswith("*.")}
        self._suffixes = (".localhost", *(name[1:] for name in options.hosts if name.startswith("*.")))
        self._public = _place(options.public_url) if options.public_url else None
        self._pages = set(options.origins)

    def check_allowed(self, method: str, headers: Headers) -> None:
        """Check that a request uses a host name of ours, and was not sent by a web page of another site.

        Raises:
            ApiError: 403; the message names the option that allows it.
        """
        hosts = headers.getlist("host")
        # A browser always sends `Host`; programs that speak HTTP/1.0 may leave it out.
        if len(hosts) > 1 or not all(map(self._is_ours, hosts)):
            shown = repr(", ".join(hosts))[:80]
            message = f"{shown} is not a name of this server. Set gateway.hosts or gateway.public_url to add it."
            raise ApiError(403, "unknown_host", message)
        if method not in _SAFE and not self._may_change(headers, hosts[0] if hosts else ""):
            raise foreign(headers.get("origin"))

    def _is_ours(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = (match[1] or match[2]).lower().removesuffix(".")
        try:
            # An address cannot be pointed elsewhere, as a name can. Probes and clients often use one.
            ipaddress.ip_address(name)
        except ValueError:
            return match[2] is not None and (name in self._names or name.endswith(self._suffixes))
        return True

    def _may_change(self, headers: Headers, host: str) -> bool:
        origins = headers.getlist("origin")
        if len(origins) > 1:
            return False
        if origins and (origins[0] in self._pages or _place(origins[0]) == self._public is not None):
            return True
        # Browsers send this header over HTTPS and to this machine, and no page can change it.
        if any(site not in ("same-origin", "none") for site in headers.getlist("sec-fetch-site")):
            return False
        return not origins or _same_host(origins[0], host)


class Cors(CORSMiddleware):
    """ASGI middleware that lets pages of `gateway.origins` call and read all answers, including errors.

    Args:
        app: application below.
        options: section `gateway`.
    """

    def __init__(self, app: ASGIApp, options: GatewayConfig) -> None:
        super().__init__(
            app,
            allow_origins=options.origins,
            allow_methods=["*"],  # a route answers 405 to methods that it lacks
            allow_headers=["*"],  # clients such as the openai SDK send many of their own
            # If any page may call, the browser must not add the user's cookies.
            allow_credentials="*" not in options.origins,
            allow_private_network=True,
            expose_headers=_EXPOSED,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the answer to a preflight request: whether a page may send a request."""
        origin = request_headers["origin"]
        if not self.is_allowed_origin(origin):
            refusal = foreign(origin).response()
            refusal.headers.add_vary_header("Origin")
            return refusal
        return super().preflight_response(request_headers)

    async def simple_response(self, scope: Scope, receive: Receive, send: Send, request_headers: Headers) -> None:
        """Pass a request on, and add to its answer which pages may read it."""
        if self.is_allowed_origin(request_headers.get("origin", "null")):
            await super().simple_response(scope, receive, send, request_headers)
            return

        async def varying(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).add_vary_header("Origin")
            await send(message)

        await self.app(scope, receive, varying)


def foreign(origin: str | None) -> ApiError:
    """Return a 403 for a web page that is neither the gateway's nor in `gateway.origins`."""
    page = "of another site" if origin is None else f"of origin {origin[:80]!r}"
    message = f"A web page {page} may not call this server. Add it to gateway.origins"
    return ApiError(403, "foreign_origin", f"{message}, or set gateway.public_url if it is this server behind a proxy.")


def _place(url: str) -> tuple[str, str, int | None] | None:
    """Return scheme, host and port of a URL; None if it has no host."""
    try:
        parts = urlsplit(url)
        port = parts.port or _USUAL_PORTS.get(parts.scheme)
    except ValueError:
        return None
    return (parts.scheme, parts.hostname.removesuffix("."), port) if parts.hostname else None


def _same_host(origin: str, host: str) -> bool:
    # Schemes are not compared: only a proxy in front of us knows whether it was called by HTTPS.
    place = _place(origin)
    return place is not None and place == _place(f"{place[0]}://{host}")
