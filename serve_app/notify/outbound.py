"""HTTP requests from inside our network to URLs that users chose, only to addresses that may be called.

A name is looked up once, here, and the connection goes to the address that was checked. Host and SNI stay those of the
URL. Redirects are not followed, and no proxy is taken from the environment. Knows nothing of webhooks.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

import httpcore
import httpx

from serve_app.errors import ConfigError, one_line
from serve_app.notify.address import Network, is_allowed

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""A function that returns the addresses of a host name and port, or raises OSError if there are none."""

# Bytes of an answer that are read before the connection is closed.
ANSWER_BYTES = 1024
_URL_CHARS = 2048
_USER = re.compile(r"[^/?#]*//[^/?#]*@")
_HOST = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
# The last part of a host that some resolvers' inet_aton takes for an IPv4 address: 0x7f.1, 0177.0.0.1, 2130706433.
_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)")


class ReceiverRefused(Exception):
    """A URL that must not be called. The message says what was found and what was expected."""


class Unreachable(Exception):
    """A request without an answer: the name is unknown, the connection failed, or the time was up."""


@dataclass(frozen=True)
class Answer:
    """An answer: status code, seconds until it came, and the first `ANSWER_BYTES` of its body as text."""

    status: int
    seconds: float
    text: str


async def system_resolver(host: str, port: int) -> list[str]:
    """Resolve a host by the operating system, `/etc/hosts` included."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[4][0]) for address in found))


class Outbound:
    """A client that sends POST requests.

    Args:
        allow_http: allow requests without TLS.
        networks: networks that may be called although they are not public.
        timeout_s: seconds for all of a request, from the look-up of the name to the end of the answer.
        ca_file: PEM file of certificate authorities that are trusted besides the usual ones.
        resolve: looks host names up.

    Raises:
        ConfigError: `ca_file` cannot be read.
    """

    def __init__(
        self,
        *,
        allow_http: bool = False,
        networks: Iterable[Network] = (),
        timeout_s: float = 20,
        ca_file: str = "",
        resolve: Resolve = system_resolver,
    ) -> None:
        self._allow_http = allow_http
        self._networks = tuple(networks)
        self._timeout_s = timeout_s
        self._tls = tls_context(ca_file, "webhooks.ca_file")
        self._backend = _Checked(self._networks, resolve)

    def parse_allowed(self, url: str) -> httpx.URL:
        """Parse a URL and check everything that can be judged without the network.

        Raises:
            ReceiverRefused: the URL must not be called.
        """
        if len(url) > _URL_CHARS:
            raise ReceiverRefused(f"has {len(url)} characters, expected at most {_URL_CHARS}")
        # Browsers read a backslash as a slash and others as a letter; such a URL would be ambiguous.
        if "\\" in url or any(char.isspace() or not char.isprintable() for char in url):
            raise ReceiverRefused("holds a backslash, a space or a control character, expected a plain URL")
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ReceiverRefused(f"is no URL: {one_line(error)}") from None
        schemes = ("https", "http") if self._allow_http else ("https",)
        if parsed.scheme not in schemes:
            raise ReceiverRefused(f"has scheme {parsed.scheme[:20]!r}, expected {' or '.join(schemes)}")
        if parsed.userinfo or _USER.match(url):  # the parsed URL does not show an empty user
            raise ReceiverRefused("holds a user or a password, expected none")
        if "#" in url:
            raise ReceiverRefused("holds a fragment, expected none")
        if parsed.port is not None and parsed.port < 1024 and (parsed.scheme, parsed.port) != ("http", 80):
            # Services on ports below 1024 might misread a request as their own protocol. 443 parses as None.
            raise ReceiverRefused(f"has port {parsed.port}, expected {parsed.scheme}'s own or 1024 to 65535")
        if parsed.port is not None and parsed.port > 65535:
            raise ReceiverRefused(f"has port {parsed.port}, expected at most 65535")
        self._check_host(parsed.raw_host.decode("ascii"))
        return parsed

    def _check_host(self, host: str) -> None:
        try:
            if not is_allowed(host, self._networks):
                raise ReceiverRefused(f"has address {host}, expected a public one")
            return
        except ValueError:
            pass  # it is a name
        if not _HOST.fullmatch(host) or len(host) > 254:
            raise ReceiverRefused(f"has host {host[:80]!r}, expected a name or an address")
        if _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
            raise ReceiverRefused(f"has host {host[:80]!r}, expected an address as four decimal numbers")

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send a POST request.

        Raises:
            ReceiverRefused: the URL must not be called. Nothing was sent.
            Unreachable: there was no answer. The request may or may not have arrived.
        """
        parsed = self.parse_allowed(url)
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._post(parsed, body, headers, began)
        except TimeoutError:
            raise Unreachable(f"no answer within {self._timeout_s:g} s") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise Unreachable(one_line(error)) from None

    async def _post(self, url: httpx.URL, body: bytes, headers: Mapping[str, str], began: float) -> Answer:
        # The URL is passed in parts, so that no other parser reads the text differently from the check.
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        sent = {"Host": url.netloc.decode("ascii"), **headers}  # httpcore's own Host lacks the brackets of IPv6
        async with (
            httpcore.AsyncConnectionPool(ssl_context=self._tls, network_backend=self._backend) as pool,
            pool.stream("POST", target, headers=[*sent.items()], content=body) as response,
        ):
            text = b""
            async for chunk in response.aiter_stream():
                text += chunk
                if len(text) >= ANSWER_BYTES:
                    break
            # PostgreSQL cannot store NUL in text.
            shown = text[:ANSWER_BYTES].decode("utf-8", "replace").replace("\0", "\ufffd")
            return Answer(response.status, time.monotonic() - began, shown)


class _Checked(httpcore.AnyIOBackend):
    """A backend that connects only to addresses that may be called."""

    def __init__(self, networks: tuple[Network, ...], resolve: Resolve) -> None:
        self._networks = networks
        self._resolve = resolve

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore's interface)
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise Unreachable(f"host {host!r} has no address: {one_line(error)}") from None
        for address in addresses:
            # One forbidden address refuses them all, because a later look-up might return that one.
            if not is_allowed(address, self._networks):
                raise ReceiverRefused(f"has host {host!r} with address {address}, expected public ones only")
        failure: Exception = Unreachable(f"host {host!r} has no address")
        for address in addresses:
            try:
                return await super().connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


def tls_context(ca_file: str, option: str) -> ssl.SSLContext:
    """Return a context that verifies certificates by the usual authorities and those in a PEM file, if one is given.

    Raises:
        ConfigError: the file cannot be read. The message names `option`.
    """
    context = httpx.create_ssl_context(trust_env=False)
    if ca_file:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:  # ssl.SSLError is one
            reason = error.strerror or one_line(error)
            raise ConfigError(f"{option} has value {ca_file!r}, expected certificates in PEM: {reason}") from None
    return context
