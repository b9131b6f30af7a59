"""The HTTP ingress, and who may use it."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import PositiveInt

from serve_app.config.section import NonNegativeFloat, Section


class Gateway(Section):
    """The HTTP ingress."""

    num_replicas: PositiveInt = 1
    num_cpus: NonNegativeFloat = 0.1
    max_ongoing_requests: PositiveInt = 256
    public_url: str = ""
    """Where users reach the gateway, e.g. `https://video.example.com`: mails then link to the video."""


class Auth(Section):
    """Who may call over HTTP. Handle calls come from inside of the cluster and are trusted."""

    mode: Literal["none", "keys"] = "none"
    """`none`: whoever reaches the port. `keys`: whoever has one that `wan-serve keys` made."""
    open: bool = False
    """With `mode: none`, answer calls from other machines too. Otherwise only those to a loopback address are."""


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from the same machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
