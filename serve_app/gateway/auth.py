"""Who calls. Routes take a `Caller` as a dependency and hand it on; nobody else looks at headers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request

Scope = Literal["create", "read", "admin"]


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request.

    `owner` is what its jobs are stored under, empty where nobody has to say who they are; one with the scope `admin`
    sees everybody's.
    """

    owner: str = ""
    scopes: frozenset[Scope] = frozenset({"create", "read", "admin"})


async def caller(request: Request) -> Caller:
    """FastAPI dependency: who sent this request."""
    return Caller()
