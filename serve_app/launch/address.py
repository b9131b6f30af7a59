"""The addresses of a server, as its own machine sees them."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

_ALL_INTERFACES = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def base_url(http: dict[str, Any], route_prefix: str) -> str:
    """Return the URL that the gateway's paths are appended to, without a slash at its end.

    A `root_path` is not in it: a proxy in front removes that before it passes a request on.

    Args:
        http: the file's `http_options`, with the host.
        route_prefix: that of the gateway's application.
    """
    host = str(http["host"])
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name
        shown = host
    else:
        near = _ALL_INTERFACES.get(address.compressed, host)
        shown = f"[{near}]" if address.version == 6 else near
    return f"http://{shown}:{http.get('port', 8000)}{route_prefix.rstrip('/')}"


def free_port() -> int:
    """Return a TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
