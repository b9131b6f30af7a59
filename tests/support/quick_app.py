"""Many applications in one process, made cheaply: what has no state is shared by all of them.

FastAPI makes a pydantic adapter for every answer of every route, most of them of one and the same model, and the sender
of webhooks reads the file of certificate authorities. Together these were over half of the time of an application.
"""

from __future__ import annotations

import functools
from typing import Any, get_args

from fastapi._compat import v2
from pydantic import TypeAdapter

from serve_app.notify import outbound

_adapters: dict[tuple[int, str, str], tuple[Any, TypeAdapter[Any]]] = {}


def _adapter(type_: Any, **options: Any) -> TypeAdapter[Any]:
    """Return the adapter of a type with its annotations, made once."""
    key = (id(get_args(type_)[0]), repr(type_), repr(options))
    if key not in _adapters:
        _adapters[key] = type_, TypeAdapter(type_, **options)  # with the type, so that its id is not used again
    return _adapters[key][1]


def share() -> None:
    """Have applications that are made from now on share their adapters and TLS contexts."""
    v2.TypeAdapter = _adapter  # type: ignore[assignment]
    if not hasattr(outbound.tls_context, "cache_info"):
        outbound.tls_context = functools.cache(outbound.tls_context)
