from tests.gateway.conftest import auth, empty_sqlite, server, storage_options

__all__ = ["auth", "empty_sqlite", "server", "storage_options"]
