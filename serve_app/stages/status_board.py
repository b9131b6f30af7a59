"""The status board: what each replica says of itself every few seconds, for `wan-serve status`.

It is Ray's own key-value store, which every process of the cluster reaches. Nothing waits for it, and only people
depend on it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakMethod

from ray import serve
from ray.serve.exceptions import RayServeException

from serve_app.compat.ray import notes, put_note, remove_note
from serve_app.errors import one_line
from serve_app.logs import get_logger

logger = get_logger(__name__)

PERIOD_S = 2.0
"""Seconds between two notes of a replica."""
_OLD_S = 3600.0

Describe = Callable[[], Mapping[str, Any]]


class StatusBoard:
    """Puts the status of this replica on the board, from a thread of its own, for as long as the replica lives.

    Args:
        describe: a method that returns the status as plain values; called in that thread.
        period_s: seconds between two notes.
    """

    def __init__(self, describe: Describe, period_s: float = PERIOD_S) -> None:
        self._describe = WeakMethod(describe)
        self._period_s = period_s
        self._failed = False
        try:
            own: Any = serve.get_replica_context().replica_id
        except RayServeException:  # nobody serves here, as in tests and notebooks
            return
        self._key = key_of(own.deployment_id.app_name, own.deployment_id.name, own.unique_id)
        threading.Thread(target=self._run, name="status", daemon=True).start()

    def _run(self) -> None:
        while (describe := self._describe()) is not None:
            try:
                put_note(self._key, json.dumps({"at": time.time(), **describe()}).encode())
                self._failed = False
            except Exception as error:  # whatever is wrong with the status, the replica works
                if not self._failed:
                    logger.info("status not told", extra={"error": one_line(error)})
                self._failed = True
            del describe
            time.sleep(self._period_s)


def key_of(application: str, deployment: str, replica: str) -> str:
    """Return the key of a replica's note."""
    return f"{application}/{deployment}/{replica}"


def read_board() -> dict[str, dict[str, Any]]:
    """Return the latest note of each replica, by `key_of`. Notes that nobody renewed for an hour are removed."""
    found = {}
    for key, value in notes().items():
        note = json.loads(value)
        if time.time() - note["at"] > _OLD_S:
            remove_note(key)
        else:
            found[key] = note
    return found
