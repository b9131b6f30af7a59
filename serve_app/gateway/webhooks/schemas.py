"""What the API of webhook endpoints sends and takes. Names and meanings of OpenAI's, where it has them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from serve_app.db.notifications import Delivery, DeliveryStatus, Endpoint, Event, EventType

_NO_TEXT = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


def _text(value: str) -> str:
    # JSON can spell both, but neither UTF-8 nor PostgreSQL can hold them.
    if _NO_TEXT.search(value):
        raise ValueError("holds a control character or half of a surrogate pair, expected text")
    return value


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_text)]
Url = Annotated[
    str,
    Field(max_length=2048, description="`https://` and a public host, without user, fragment or privileged port."),
    AfterValidator(_text),
]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=10)]


class Body(BaseModel):
    """What a request carries."""

    model_config = ConfigDict(extra="forbid")


class CreateEndpoint(Body):
    """A URL that is to be told of videos that have ended."""

    url: Url
    name: Name
    event_types: EventTypes


class UpdateEndpoint(Body):
    """What is to change; what is not given stays."""

    url: Url | None = None
    name: Name | None = None
    event_types: EventTypes | None = None
    enabled: bool | None = Field(None, description="False: nothing is sent any more. True: again, from now on.")


class RotateSecret(Body):
    """A new signing secret."""

    keep_old_secret_active_for_24_hours: bool = False


class TestEndpoint(Body):
    """A sample event."""

    event_type: EventType


class Replay(Body):
    """What is to be sent again: one of both."""

    event_id: str | None = Field(None, description="This event, even if it arrived before.")
    since: float | None = Field(
        None, ge=0, le=1e11, description="Every event of this Unix time and later that did not arrive."
    )


class WebhookEndpoint(BaseModel):
    """An endpoint. The first block is OpenAI's resource, the second is ours."""

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
        """The resource of an endpoint."""
        return cls(**_fields(endpoint))


class WebhookEndpointWithSecret(WebhookEndpoint):
    """An endpoint with its signing secret, which is shown at no other time."""

    signing_secret: str

    @classmethod
    def of(cls, endpoint: Endpoint) -> WebhookEndpointWithSecret:
        """The resource of an endpoint that was just made, or whose secret was."""
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
    """Part of a list; the next one starts `after` the `last_id`."""

    object: Literal["list"] = "list"
    first_id: str | None
    last_id: str | None
    has_more: bool


class WebhookEndpointList(Page):
    """A page of endpoints, the newest first."""

    data: list[WebhookEndpoint]


class WebhookEndpointDeleted(BaseModel):
    """An endpoint is gone."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: Literal[True] = True


class WebhookEndpointTest(BaseModel):
    """What the receiver answered to a sample event."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class WebhookReplay(BaseModel):
    """How many events are sent again."""

    object: Literal["webhook_endpoint.replay"] = "webhook_endpoint.replay"
    webhook_endpoint_id: str
    events: int
    has_more: bool = Field(description="Whether the same call would find more.")


class WebhookEventTypes(BaseModel):
    """What endpoints can be told of."""

    object: Literal["list"] = "list"
    data: list[str]


class EventData(BaseModel):
    """Whom an event is about."""

    id: str


class WebhookEvent(BaseModel):
    """What is sent to an endpoint, with the headers `webhook-id`, `webhook-timestamp` and `webhook-signature`."""

    id: str
    object: Literal["event"] = "event"
    created_at: int
    type: EventType
    data: EventData


class Try(BaseModel):
    """One time that it was sent."""

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
    next_try_at: int | None = Field(description="While it is pending.")
    tries: list[Try] = Field(description="The latest ones, the oldest first.")

    @classmethod
    def of(cls, delivery: Delivery, event: Event) -> WebhookDelivery:
        """The resource of a delivery."""
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
