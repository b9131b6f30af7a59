from tests.jobs.brokers import link, queue_options
from tests.jobs.databases import empty_url, postgres_url, store, store_url
from tests.jobs.running import start, storage

__all__ = ["empty_url", "link", "postgres_url", "queue_options", "start", "storage", "store", "store_url"]
