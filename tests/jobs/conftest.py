from tests.jobs.brokers import queue_options
from tests.jobs.databases import empty_sqlite, empty_url, postgres_url, store, store_url
from tests.jobs.disks import small_disk
from tests.jobs.links import link_to
from tests.jobs.running import start, storage

__all__ = [
    "empty_sqlite",
    "empty_url",
    "link_to",
    "postgres_url",
    "queue_options",
    "small_disk",
    "start",
    "storage",
    "store",
    "store_url",
]
