"""Authentication. Routes take a `Caller` as a dependency and pass it on; nothing else reads the header of the key."""

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
    """The sender of a request.

    Attributes:
        owner: id of its API key, under which its jobs are stored. Empty if the server asks for no keys.
        scopes: what the key allows. With `admin` it sees the videos of all keys.
    """

    owner: str = ""
    scopes: frozenset[Scope] = frozenset({"create", "read", "admin"})

    @property
    def sees(self) -> str | None:
        """The owner whose jobs it may see and change; None is all owners."""
        return None if "admin" in self.scopes else self.owner


class Guard:
    """The check of each request's key, scope of addresses and rate.

    Args:
        options: section `auth`.
        keys: API keys.
        gateway: section `gateway`. Each replica allows its share of a key's requests per minute. So the limit holds as
            exactly as the load is balanced, and no request needs a write to the database.
    """

    def __init__(self, options: AuthConfig, keys: Keys, gateway: GatewayConfig) -> None:
        self._options = options
        self._keys = keys
        self._buckets = Buckets(gateway.num_replicas)
        self._origins = Origins(gateway)
        if options.mode == "none":
            where = "any machine that reaches it" if options.open else "loopback addresses only"
            logger.warning("no keys: any caller is let in", extra={"auth": "none", "answers": where})

    async def caller(self, request: Request) -> Caller:
        """Return the sender of a request.

        Raises:
            ApiError: 401, the key is missing or unknown; 403, the call comes from elsewhere; 429, too many
                requests.
        """
        if self._options.mode == "none":
            self._check_local(request)
            self._origins.check_allowed(request.method, request.headers)
            return Caller()
        kind, _, text = request.headers.get("authorization", "").partition(" ")
        key = await self._keys.find(text.strip()) if kind.lower() == "bearer" else None
        if key is None:
            message = "The API key is unknown or was revoked." if text else "An API key is needed: Bearer wan_..."
            raise ApiError(401, "invalid_api_key", message, www_authenticate="Bearer")
        if key.requests_per_minute is not None:
            wait_s = self._buckets.take_token(key.id, key.requests_per_minute)
            if wait_s:
                message = f"This key has reached its limit of {key.requests_per_minute} requests per minute."
                raise too_much("requests_per_minute", message, wait_s)
        return Caller(key.id, frozenset(key.scopes))  # type: ignore[arg-type]  # only scopes are stored

    def _check_local(self, request: Request) -> None:
        """Check that a request came in by a loopback address.

        `wan-serve up` refuses a file that would listen elsewhere without keys, but `serve run` does not. The server's
        side of the connection decides, never a header. It is None for a Unix socket.

        Raises:
            ApiError: 403.
        """
        server = request.scope.get("server")
        if not self._options.open and server is not None and not is_loopback(server[0]):
            message = (
                "auth.mode is 'none', so only this machine may call. Set auth.mode to 'keys', or auth.open to true."
            )
            raise ApiError(403, "not_open", message)


async def caller(request: Request) -> Caller:
    """Return the sender of a request; a FastAPI dependency."""
    guard: Guard = request.app.state.guard
    return await guard.caller(request)


def _having(scope: Scope) -> Callable[..., Awaitable[Caller]]:
    async def check(who: Annotated[Caller, Depends(caller)]) -> Caller:
        if scope not in who.scopes:
            raise ApiError(403, "missing_scope", f"The API key lacks the scope '{scope}'.")
        return who

    return check


def bearer(options: AuthConfig) -> list[Any]:
    """Return dependencies that show in OpenAPI how a key is sent. They check nothing: `caller` does."""
    return (
        [Depends(HTTPBearer(auto_error=False, description="An API key: `wan_...`"))] if options.mode == "keys" else []
    )


AnyCaller = Annotated[Caller, Depends(caller)]
Reader = Annotated[Caller, Depends(_having("read"))]
"""A caller that may look at videos."""
Creator = Annotated[Caller, Depends(_having("create"))]
"""A caller that may create, change and delete videos."""
