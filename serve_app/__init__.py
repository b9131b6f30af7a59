"""Wan2.2 text-to-video as a service on a Ray cluster.

`connect` returns a client for other Ray jobs. Everything else is reached by HTTP or the YAML files in configs/.
"""

from typing import TYPE_CHECKING, Any

from serve_app.request import VideoRequest

if TYPE_CHECKING:
    from serve_app.client import connect

__version__ = "0.2.0"
__all__ = ["VideoRequest", "__version__", "connect"]


def __getattr__(name: str) -> Any:
    # Importing Ray takes over a second: only a caller of `connect` pays for it.
    if name == "connect":
        from serve_app.client import connect

        return connect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
