"""Fixtures of the command line's tests: the application on a real socket."""

from tests.gateway.conftest import auth, client, empty_sqlite, held, server, storage_options

__all__ = ["auth", "client", "empty_sqlite", "held", "server", "storage_options"]
