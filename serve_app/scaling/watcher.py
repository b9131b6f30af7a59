"""A thread that reads the backlog and the free resources again and again, for policies that must not wait."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary, finalize

from serve_app.db.database import Database
from serve_app.errors import one_line
from serve_app.jobs.backlog import Backlog, read_backlog
from serve_app.logs import get_logger

logger = get_logger(__name__)

FreeHosts = Callable[[], Sequence[Mapping[str, float]]]
"""Returns the free resources of each host, by Ray's names."""

# Polls after which figures that were not read again are stale.
_STALE_POLLS = 3


@dataclass
class Figures:
    """The latest figures of a thread. It knows nothing of who looks at it, so that it does not keep them alive."""

    backlog: Backlog | None = None
    hosts: Sequence[Mapping[str, float]] | None = None
    read_at: float = float("-inf")
    failing: bool = False
    stop: threading.Event = field(default_factory=threading.Event)


class Watcher:
    """The figures of one job store.

    Args:
        url: its SQLAlchemy URL.
        poll_s: seconds between two looks.
        free_hosts: looks at the cluster; None for whoever need not know.
    """

    def __init__(self, url: str, poll_s: float, free_hosts: FreeHosts | None = None) -> None:
        self._poll_s = poll_s
        self._figures = figures = Figures()
        thread = threading.Thread(target=_watch, args=(url, poll_s, free_hosts, figures), name="backlog", daemon=True)
        thread.start()
        finalize(self, figures.stop.set)

    @property
    def backlog(self) -> Backlog | None:
        """The backlog; None before it was first read, and when it was not read for three polls."""
        fresh = time.monotonic() - self._figures.read_at <= _STALE_POLLS * self._poll_s
        return self._figures.backlog if fresh else None

    def fitting(self, bundles: Sequence[Mapping[str, float]], one_host: bool) -> int | None:
        """Return how many more replicas with these bundles fit into what is free; None if that is not known.

        Args:
            bundles: resources of each process of a replica.
            one_host: whether all of them have to be on one host.
        """
        hosts = self._figures.hosts
        return None if hosts is None else fitting(hosts, bundles, one_host)


def fitting(hosts: Sequence[Mapping[str, float]], bundles: Sequence[Mapping[str, float]], one_host: bool) -> int:
    """Return how many replicas with these bundles fit into the free resources of hosts."""
    free = [dict(host) for host in hosts]
    units = [_sum(bundles)] if one_host else [dict(bundle) for bundle in bundles]
    if not any(amount for unit in units for amount in unit.values()):
        return 1 << 30  # whoever asks for nothing always fits
    count = 0
    while all(_take(free, unit) for unit in units):
        count += 1
    return count


def _sum(bundles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for bundle in bundles for name in bundle}


def _take(free: list[dict[str, float]], unit: Mapping[str, float]) -> bool:
    for host in free:
        if all(host.get(name, 0.0) + 1e-6 >= amount for name, amount in unit.items()):
            for name, amount in unit.items():
                host[name] = host.get(name, 0.0) - amount
            return True
    return False


_WATCHERS: WeakValueDictionary[tuple[str, float], Watcher] = WeakValueDictionary()
_LOCK = threading.Lock()


def watcher(url: str, poll_s: float, free_hosts: FreeHosts | None = None) -> Watcher:
    """Return the watcher of a store in this process; the policies of several deployments share it."""
    with _LOCK:
        found = _WATCHERS.get((url, poll_s))
        if found is None:
            found = _WATCHERS[url, poll_s] = Watcher(url, poll_s, free_hosts)
        return found


def _watch(url: str, poll_s: float, free_hosts: FreeHosts | None, figures: Figures) -> None:
    """Read until told to stop. Whatever fails is logged once, until it works again."""
    while not figures.stop.is_set():
        try:
            asyncio.run(_read_on(url, poll_s, free_hosts, figures))
        except Exception as error:
            if not figures.failing:
                logger.warning("backlog not read", extra={"error": one_line(error)})
            figures.failing = True
        figures.stop.wait(poll_s)


async def _read_on(url: str, poll_s: float, free_hosts: FreeHosts | None, figures: Figures) -> None:
    database = Database(url)
    await database.connect()
    try:
        while not figures.stop.is_set():
            async with database.read() as session:
                backlog = await read_backlog(session, await database.clock(session))
            hosts = None if free_hosts is None else free_hosts()
            figures.backlog, figures.hosts, figures.read_at = backlog, hosts, time.monotonic()
            if figures.failing:
                logger.info("backlog read again")
                figures.failing = False
            await asyncio.sleep(poll_s)
    finally:
        await database.close()
