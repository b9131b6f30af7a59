"""The HTTP gateway, and who may use it."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, PositiveInt

from serve_app.config.section import NonNegativeFloat, Section

# A host name as browsers send it: lower case, international ones in punycode, a port only if it is not the usual one.
_HOST = r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*"
_HOST_NAME = re.compile(rf"(\*\.)?{_HOST}")
_ORIGIN = re.compile(rf"([a-z][a-z0-9+.-]*)://({_HOST}|\[[0-9a-f:.]+\])(:[0-9]{{1,5}})?")
_USUAL_PORTS = {"http": ":80", "https": ":443"}


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _host_name(value: str) -> str:
    name = value.lower().removesuffix(".")
    if not _HOST_NAME.fullmatch(name):
        raise ValueError("expected a name without scheme and port, e.g. 'video.example.com' or '*.example.com'")
    return name


def _origin(value: str) -> str:
    origin = value.lower()
    match = _ORIGIN.fullmatch(origin)
    if origin != "*" and match is None:
        raise ValueError("expected an origin without a path, e.g. 'https://app.example.com', or '*'")
    return origin.removesuffix(_USUAL_PORTS.get(match[1], "\0")) if match else origin


def _public_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        fits = not value or (parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError("expected the URL that users call, e.g. 'https://video.example.com'")
    return value


class GatewayConfig(Section):
    """The HTTP gateway."""

    num_replicas: PositiveInt = 1
    """Gateway processes, any of which answers for any video."""
    num_cpus: NonNegativeFloat = 0.1
    """CPUs that Ray reserves for one process."""
    max_ongoing_requests: PositiveInt = 256
    """Requests that a replica takes at once; further ones wait for it."""
    public_url: Annotated[str, AfterValidator(_public_url)] = ""
    """URL under which users reach the gateway, e.g. `https://video.example.com`. Mails then link to the video, and
    without keys its host name is accepted."""
    hosts: Annotated[tuple[Annotated[str, AfterValidator(_host_name)], ...], BeforeValidator(_several)] = ()
    """Further host names that are accepted without keys; `*.example.com` is all names below it. IP addresses,
    `localhost` and this machine's name are always accepted."""
    origins: Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(_several)] = ()
    """Origins of web pages that may call, e.g. `https://app.example.com`. `*` is all, and needs keys. The gateway's own
    page may always call."""


class AuthConfig(Section):
    """Access over HTTP. Handle calls come from inside of the cluster and are trusted."""

    mode: Literal["none", "keys"] = "none"
    """`none`: anybody who reaches the port may call. `keys`: a call needs an API key that `wan-serve keys` made."""
    open: bool = False
    """With `mode: none`, answer calls from other machines too, and not only those to a loopback address."""


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from the same machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
