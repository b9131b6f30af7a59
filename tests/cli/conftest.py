"""The application on a real socket, for what the commands say to it."""

from tests.gateway.conftest import auth, client, empty_sqlite, held, server, storage_options

__all__ = ["auth", "client", "empty_sqlite", "held", "server", "storage_options"]
