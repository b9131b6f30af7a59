"""Fixtures of tests that have a job store: the databases, the broker, a storage, dispatchers and a movable clock."""

from tests.support.brokers import queue_options
from tests.support.clock import clock
from tests.support.databases import empty_sqlite, empty_url, postgres_url, store, store_url
from tests.support.disks import small_disk
from tests.support.links import link_to
from tests.support.running import start, storage

__all__ = [
    "clock",
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
