"""Who calls. Routes take a `Caller` as a dependency and hand it on; nobody else looks at headers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from serve_app.accounts.keys import Keys, Scope
from serve_app.config import AuthConfig, GatewayConfig, is_loopback
from serve_app.gateway.http.errors import ApiError, too_much
from serve_app.gateway.http.origins import Origins
from serve_app.gateway.http.rate import Buckets
from serve_app.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request.

    `owner` is what its jobs are stored under, empty where nobody has to say who they are; one with the scope `admin`
    sees everybody's.
    """

    owner: str = ""
    scopes: frozenset[Scope] = frozenset({"create", "read", "admin"})

    @property
    def sees(self) -> str | None:
        """Whose jobs it may see and change: an owner, or None for everybody's."""
        return None if "admin" in self.scopes else self.owner


class Guard:
    """Lets callers in.

    Args:
        gateway: its options. Each of its replicas allows its share of a key's requests a minute, so that the limit
            holds as well as the load is balanced, without a write to the database for every request.
    """

    def __init__(self, options: AuthConfig, keys: Keys, gateway: GatewayConfig) -> None:
        self._options = options
        self._keys = keys
        self._buckets = Buckets(gateway.num_replicas)
        self._origins = Origins(gateway)
        if options.mode == "none":
            where = "any machine that reaches it" if options.open else "loopback addresses only"
            logger.warning("no keys: nobody has to say who they are", extra={"auth": "none", "answers": where})

    async def caller(self, request: Request) -> Caller:
        """Who sent a request.

        Raises:
            ApiError: 401, 403 or 429.
        """
        if self._options.mode == "none":
            self._stay_home(request)
            self._origins.check(request.method, request.headers)
            return Caller()
        kind, _, text = request.headers.get("authorization", "").partition(" ")
        key = await self._keys.find(text.strip()) if kind.lower() == "bearer" else None
        if key is None:
            message = "The API key is unknown or was revoked." if text else "An API key is needed: Bearer wan_..."
            raise ApiError(401, "invalid_api_key", message, www_authenticate="Bearer")
        if key.requests_per_minute is not None:
            wait_s = self._buckets.take(key.id, key.requests_per_minute)
            if wait_s:
                message = f"This key made {key.requests_per_minute} requests within a minute, its limit."
                raise too_much("requests_per_minute", message, wait_s)
        return Caller(key.id, frozenset(key.scopes))  # type: ignore[arg-type]  # only scopes are stored

    def _stay_home(self, request: Request) -> None:
        """Refuse what came in by another address than loopback, which a file that `serve run` took unchecked may allow.

        The server's side of the connection decides: it is None for a Unix socket, and never a header.
        """
        server = request.scope.get("server")
        if not self._options.open and server is not None and not is_loopback(server[0]):
            message = "auth.mode is 'none', so only this machine may call. Set it to 'keys', or auth.open to true."
            raise ApiError(403, "not_open", message)


async def caller(request: Request) -> Caller:
    """FastAPI dependency: who sent this request."""
    guard: Guard = request.app.state.guard
    return await guard.caller(request)


def _having(scope: Scope) -> Callable[..., Awaitable[Caller]]:
    async def check(who: Annotated[Caller, Depends(caller)]) -> Caller:
        if scope not in who.scopes:
            raise ApiError(403, "missing_scope", f"The API key lacks the scope '{scope}'.")
        return who

    return check


def bearer(options: AuthConfig) -> list[Any]:
    """Dependencies that say in OpenAPI how a key is sent, where one is; `caller` is who looks at it."""
    return (
        [Depends(HTTPBearer(auto_error=False, description="An API key: `wan_...`"))] if options.mode == "keys" else []
    )


AnyCaller = Annotated[Caller, Depends(caller)]
Reader = Annotated[Caller, Depends(_having("read"))]
"""A caller that may look at videos."""
Creator = Annotated[Caller, Depends(_having("create"))]
"""A caller that may create, change and delete videos."""
