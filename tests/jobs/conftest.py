from tests.jobs.databases import postgres_url, store, store_url
from tests.jobs.running import start, storage

__all__ = ["postgres_url", "start", "storage", "store", "store_url"]
