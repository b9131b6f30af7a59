"""The bodies of the API of webhook endpoints. Names and meanings are OpenAI's where OpenAI has them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from serve_app.db.notifications import Delivery, DeliveryStatus, Endpoint, Event, EventType

_NO_TEXT = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


def _text(value: str) -> str:
    # JSON can spell these characters, but neither UTF-8 nor PostgreSQL can hold them.
    if _NO_TEXT.search(value):
        raise ValueError("holds a control character or half of a surrogate pair, expected text")
    return value


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_text)]
Url = Annotated[
    str,
    Field(
        max_length=2048,
        description="Receiver of the events: `https://` and a public host, without user, fragment or privileged port.",
    ),
    AfterValidator(_text),
]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=10)]


class Body(BaseModel):
    """A request body; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class CreateEndpoint(Body):
    """A new endpoint: a URL that gets events of videos."""

    url: Url
    name: Name
    event_types: EventTypes


class UpdateEndpoint(Body):
    """Changes of an endpoint. Fields that are not given stay as they are."""

    url: Url | None = None
    name: Name | None = None
    event_types: EventTypes | None = None
    enabled: bool | None = Field(
        None, description="False: no more events are sent. True: events from now on are sent again."
    )


class RotateSecret(Body):
    """Options of a new signing secret."""

    keep_old_secret_active_for_24_hours: bool = False


class TestEndpoint(Body):
    """A sample event to send."""

    event_type: EventType


class Replay(Body):
    """Events to send again: one (`event_id`) or all undelivered ones (`since`). Give exactly one."""

    event_id: str | None = Field(None, description="Id of an event. It is sent again even if it was delivered before.")
    since: float | None = Field(
        None, ge=0, le=1e11, description="Unix time. All events since then that were not delivered are sent again."
    )


class WebhookEndpoint(BaseModel):
    """A webhook endpoint. The first block is OpenAI's resource, the second is ours."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str

    enabled: bool
    disabled_reason: str | None = None

    @classmethod
    def of(cls, endpoint: Endpoint) -> WebhookEndpoint:
        """Return the resource of an endpoint."""
        return cls(**_fields(endpoint))


class WebhookEndpointWithSecret(WebhookEndpoint):
    """An endpoint with its signing secret, which is shown at no other time."""

    signing_secret: str

    @classmethod
    def of(cls, endpoint: Endpoint) -> WebhookEndpointWithSecret:
        """Return the resource of an endpoint whose secret is new."""
        return cls(**_fields(endpoint), signing_secret=endpoint.secret)


def _fields(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "created_at": int(endpoint.created_at),
        "updated_at": int(endpoint.updated_at),
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "signing_secret_hint": f"whsec_...{endpoint.secret[-4:]}",
        "enabled": endpoint.disabled_reason is None,
        "disabled_reason": endpoint.disabled_reason,
    }


class Page(BaseModel):
    """A page of a list. For the next page, send its `last_id` as `after`."""

    object: Literal["list"] = "list"
    first_id: str | None
    last_id: str | None
    has_more: bool


class WebhookEndpointList(Page):
    """A page of endpoints, the newest first."""

    data: list[WebhookEndpoint]


class WebhookEndpointDeleted(BaseModel):
    """The answer to a delete."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: Literal[True] = True


class WebhookEndpointTest(BaseModel):
    """The receiver's answer to a sample event."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class WebhookReplay(BaseModel):
    """The number of events that are sent again."""

    object: Literal["webhook_endpoint.replay"] = "webhook_endpoint.replay"
    webhook_endpoint_id: str
    events: int
    has_more: bool = Field(description="Whether the same call would send more events.")


class WebhookEventTypes(BaseModel):
    """The types of events."""

    object: Literal["list"] = "list"
    data: list[str]


class EventData(BaseModel):
    """The video that an event is about."""

    id: str


class WebhookEvent(BaseModel):
    """The body that is sent to an endpoint, with headers `webhook-id`, `webhook-timestamp` and `webhook-signature`."""

    id: str
    object: Literal["event"] = "event"
    created_at: int
    type: EventType
    data: EventData


class Try(BaseModel):
    """One attempt to send an event."""

    at: float
    seconds: float
    status_code: int | None
    answer: str = Field(description="The first bytes of the receiver's answer.")
    error: str | None


class WebhookDelivery(BaseModel):
    """An event on its way to an endpoint."""

    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    event: WebhookEvent
    status: DeliveryStatus
    created_at: int
    next_try_at: int | None = Field(description="Time of the next try; null if it is not pending.")
    tries: list[Try] = Field(description="The latest tries, the oldest first.")

    @classmethod
    def of(cls, delivery: Delivery, event: Event) -> WebhookDelivery:
        """Return the resource of a delivery."""
        return cls.model_validate(
            {
                "id": delivery.id,
                "event": {
                    "id": event.id,
                    "created_at": int(event.created_at),
                    "type": event.type,
                    "data": {"id": event.video_id},
                },
                "status": delivery.status,
                "created_at": int(delivery.created_at),
                "next_try_at": int(delivery.due_at) if delivery.status == "pending" else None,
                "tries": delivery.log,
            }
        )


class WebhookDeliveryList(Page):
    """A page of deliveries, the newest first."""

    data: list[WebhookDelivery]
