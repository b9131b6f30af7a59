"""The routes of `/v1/webhook_endpoints`: those of OpenAI's API, and a delivery log and replay.

An endpoint belongs to the API key that created it, and gets events of that key's videos only. For other keys it does
not exist, except for those with the scope `admin`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from serve_app.config import Config
from serve_app.db.database import Database
from serve_app.db.notifications import EVENT_TYPES, Endpoint, new_event
from serve_app.errors import InvalidRequest
from serve_app.gateway.http.auth import Caller, Creator, Reader, bearer
from serve_app.gateway.http.envelope import ErrorEnvelope
from serve_app.gateway.http.errors import RESPONSES, ApiError
from serve_app.gateway.http.routing import Routes
from serve_app.gateway.webhooks.schemas import (
    CreateEndpoint,
    Replay,
    RotateSecret,
    TestEndpoint,
    UpdateEndpoint,
    WebhookDelivery,
    WebhookDeliveryList,
    WebhookEndpoint,
    WebhookEndpointDeleted,
    WebhookEndpointList,
    WebhookEndpointTest,
    WebhookEndpointWithSecret,
    WebhookEventTypes,
    WebhookReplay,
)
from serve_app.logs import get_logger
from serve_app.notify import webhook
from serve_app.notify.endpoints import Endpoints, TooManyEndpoints
from serve_app.notify.notifier import outbound
from serve_app.notify.outbound import ReceiverRefused

logger = get_logger(__name__)

# The video id in a sample event; no video has it.
SAMPLE_VIDEO = "video_sample"

Limit = Annotated[int, Query(ge=1, le=100)]
_DISABLED: dict[int | str, dict[str, Any]] = {409: {"model": ErrorEnvelope, "description": "The endpoint is disabled."}}


def router(config: Config, database: Database) -> APIRouter:
    """Return the routes of webhook endpoints.

    Raises:
        ConfigError: an option in `webhooks` cannot work.
    """
    routes = Routes(tags=["webhooks"], responses=RESPONSES, dependencies=bearer(config.auth))
    endpoints = Endpoints(database)
    sender = outbound(config)

    def check_url(url: str) -> None:
        try:
            sender.parse_allowed(url)
        except ReceiverRefused as error:
            raise InvalidRequest("url", f"'url' {error}.") from None

    async def found(endpoint_id: str, who: Caller) -> Endpoint:
        endpoint = await endpoints.get(endpoint_id, who.sees)
        if endpoint is None:
            raise _no_endpoint(endpoint_id)
        return endpoint

    async def enabled(endpoint_id: str, who: Caller) -> Endpoint:
        endpoint = await found(endpoint_id, who)
        if endpoint.disabled_reason is not None:
            message = f"The webhook endpoint is disabled: {endpoint.disabled_reason}"
            raise ApiError(409, "endpoint_disabled", message, "webhook_endpoint_id")
        return endpoint

    @routes.get("/v1/webhook_event_types")
    async def event_types(who: Reader) -> WebhookEventTypes:
        """List the types of events."""
        return WebhookEventTypes(data=[*EVENT_TYPES])

    @routes.post("/v1/webhook_endpoints")
    async def create(body: CreateEndpoint, who: Creator) -> WebhookEndpointWithSecret:
        """Create an endpoint: a URL that gets an event when a video of this key ends.

        The answer holds the signing secret, which is shown at no other time.
        """
        check_url(body.url)
        most = config.webhooks.endpoints
        kinds = sorted(set(body.event_types))
        try:
            endpoint = await endpoints.create(who.owner, body.name, body.url, kinds, most)
        except TooManyEndpoints as error:
            raise ApiError(400, "too_many_endpoints", str(error)) from None
        logger.info("endpoint created", extra={"endpoint": endpoint.id})
        return WebhookEndpointWithSecret.of(endpoint)

    @routes.get("/v1/webhook_endpoints")
    async def list_endpoints(who: Reader, after: str | None = None, limit: Limit = 20) -> WebhookEndpointList:
        """List endpoints, the newest first, page by page."""
        try:
            rows, has_more = await endpoints.list(who.sees, after, limit)
        except LookupError:
            raise _bad_after(after, "endpoint") from None
        data = [WebhookEndpoint.of(endpoint) for endpoint in rows]
        return WebhookEndpointList(data=data, **_page(data), has_more=has_more)

    @routes.get("/v1/webhook_endpoints/{webhook_endpoint_id}")
    async def retrieve(webhook_endpoint_id: str, who: Reader) -> WebhookEndpoint:
        """Return an endpoint, without its secret."""
        return WebhookEndpoint.of(await found(webhook_endpoint_id, who))

    @routes.post("/v1/webhook_endpoints/{webhook_endpoint_id}")
    async def update(webhook_endpoint_id: str, body: UpdateEndpoint, who: Creator) -> WebhookEndpoint:
        """Change an endpoint, or enable it again after its receiver answered 410."""
        changes = body.model_dump(exclude_none=True)
        if body.url is not None:
            check_url(body.url)
        if body.event_types is not None:
            changes["event_types"] = sorted(set(body.event_types))
        if changes.pop("enabled", None) is not None:
            changes["disabled_reason"] = None if body.enabled else "Disabled by its owner."
        endpoint = await endpoints.update(webhook_endpoint_id, who.sees, changes)
        if endpoint is None:
            raise _no_endpoint(webhook_endpoint_id)
        return WebhookEndpoint.of(endpoint)

    @routes.delete("/v1/webhook_endpoints/{webhook_endpoint_id}")
    async def delete(webhook_endpoint_id: str, who: Creator) -> WebhookEndpointDeleted:
        """Delete an endpoint. Events that were not delivered to it are dropped."""
        if not await endpoints.delete(webhook_endpoint_id, who.sees):
            raise _no_endpoint(webhook_endpoint_id)
        logger.info("endpoint deleted", extra={"endpoint": webhook_endpoint_id})
        return WebhookEndpointDeleted(id=webhook_endpoint_id)

    @routes.post("/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret")
    async def rotate_secret(
        webhook_endpoint_id: str, who: Creator, body: RotateSecret | None = None
    ) -> WebhookEndpointWithSecret:
        """Replace the signing secret. On request the old one stays valid for 24 hours; otherwise it is void at once."""
        keep_old = body is not None and body.keep_old_secret_active_for_24_hours
        endpoint = await endpoints.rotate(webhook_endpoint_id, who.sees, keep_old=keep_old)
        if endpoint is None:
            raise _no_endpoint(webhook_endpoint_id)
        logger.info("endpoint secret rotated", extra={"endpoint": endpoint.id})
        return WebhookEndpointWithSecret.of(endpoint)

    @routes.post("/v1/webhook_endpoints/{webhook_endpoint_id}/test", responses=_DISABLED)
    async def test(webhook_endpoint_id: str, body: TestEndpoint, who: Creator) -> WebhookEndpointTest:
        """Send a sample event once, wait for the answer, and return its status. The delivery log shows it as well."""
        endpoint = await enabled(webhook_endpoint_id, who)
        event = new_event(endpoint.owner, body.event_type, SAMPLE_VIDEO, distributed=True)
        outcome = await webhook.send(sender, endpoint, event)
        await endpoints.log(endpoint, event, outcome)
        if outcome.status_code is None:
            raise ApiError(400, "endpoint_unreachable", f"The endpoint did not answer: {outcome.error}.", "url")
        return WebhookEndpointTest(
            webhook_endpoint_id=endpoint.id, event_type=event.type, status_code=outcome.status_code
        )

    @routes.post("/v1/webhook_endpoints/{webhook_endpoint_id}/replay", responses=_DISABLED)
    async def replay(webhook_endpoint_id: str, body: Replay, who: Creator) -> WebhookReplay:
        """Send events again, with their ids: one (`event_id`), or all undelivered ones since a time (`since`)."""
        if (body.event_id is None) == (body.since is None):
            raise InvalidRequest(
                "event_id", "'event_id' and 'since' are both given or both missing, expected exactly one of them."
            )
        endpoint = await enabled(webhook_endpoint_id, who)
        replayed = await endpoints.replay(endpoint, event_id=body.event_id or "", since=body.since or 0)
        if replayed is None:
            shown = (body.event_id or "")[:80]
            raise ApiError(404, "not_found", f"There is no event {shown!r}, or it is no longer kept.", "event_id")
        return WebhookReplay(webhook_endpoint_id=endpoint.id, events=replayed[0], has_more=replayed[1])

    @routes.get("/v1/webhook_endpoints/{webhook_endpoint_id}/deliveries")
    async def deliveries(
        webhook_endpoint_id: str, who: Reader, after: str | None = None, limit: Limit = 20
    ) -> WebhookDeliveryList:
        """List the deliveries to an endpoint, the newest first, each with its latest tries."""
        endpoint = await found(webhook_endpoint_id, who)
        try:
            rows, has_more = await endpoints.deliveries(endpoint.id, after, limit)
        except LookupError:
            raise _bad_after(after, "delivery") from None
        data = [WebhookDelivery.of(*row) for row in rows]
        return WebhookDeliveryList(data=data, **_page(data), has_more=has_more)

    return routes


def _page(data: list[Any]) -> dict[str, str | None]:
    return {"first_id": data[0].id if data else None, "last_id": data[-1].id if data else None}


def _no_endpoint(endpoint_id: str) -> ApiError:
    return ApiError(404, "not_found", f"There is no webhook endpoint {endpoint_id[:80]!r}.", "webhook_endpoint_id")


def _bad_after(after: str | None, what: str) -> InvalidRequest:
    return InvalidRequest("after", f"'after' has value {repr(after)[:80]}, expected the id of a webhook {what}.")
