"""Tells a replica that Serve is about to stop it, so that it can drain.

Serve itself says nothing: it waits for the requests in flight, for minutes here, before it calls the destructor. But
first it removes the replica from the list by which routers send requests, and that list can be listened to. This module
uses names that are private to Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.exceptions import RayError

from serve_app.compat.ray import replicas_key, serve_controller
from serve_app.errors import one_line
from serve_app.logs import get_logger

logger = get_logger(__name__)

# Pause after the controller could not be asked; it restarts by itself.
_RETRY_S = 1.0


async def watch_routing(on_change: Callable[[bool], None]) -> None:
    """Follow, for ever, whether requests are still routed to this replica.

    Args:
        on_change: called with False when Serve removes the replica from the list, and with True if it puts it back: the
            list is incomplete for a moment after the controller restarted.
    """
    own: Any = serve.get_replica_context().replica_id
    key = replicas_key(own.deployment_id)
    snapshot = -1
    listed: bool | None = None
    while True:
        try:
            controller = serve_controller()
            updates = await controller.listen_for_change.remote({key: snapshot})
        except (RayError, ValueError) as error:  # ValueError: there is no such actor at this moment
            logger.info("controller away", extra={"error": one_line(error)})
            snapshot = -1
            await asyncio.sleep(_RETRY_S)
            continue
        if not isinstance(updates, dict) or key not in updates:  # nothing changed for a while
            continue
        snapshot = updates[key].snapshot_id
        now = any(replica.replica_id == own for replica in updates[key].object_snapshot.running_replicas)
        if listed is not None and now != listed:
            on_change(now)
        if now or listed is not None:  # a replica that was never listed has not been announced yet
            listed = now
