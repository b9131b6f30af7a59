"""An event as a signed HTTP request, by the Standard Webhooks specification (standardwebhooks.com)."""

from __future__ import annotations

import base64
import json
import secrets
import time
from datetime import UTC, datetime

from standardwebhooks import Webhook

from serve_app import __version__
from serve_app.db.notifications import Endpoint, Event
from serve_app.notify.outbound import Outbound, ReceiverRefused, Unreachable
from serve_app.notify.outcome import Outcome

_GONE = 410


def new_secret() -> str:
    """Return a new secret: `whsec_` and 32 random bytes in base64, padded because the `openai` package needs it."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def payload(event: Event) -> str:
    """Return the body, the same at every try."""
    return json.dumps(
        {
            "id": event.id,
            "object": "event",
            "created_at": int(event.created_at),
            "type": event.type,
            "data": {"id": event.video_id},
        },
        separators=(",", ":"),
    )


def signed_headers(endpoint: Endpoint, event_id: str, body: str, now: float) -> dict[str, str]:
    """Return the headers for `body`, sent at `now` by this host's clock, with one signature for each valid secret.

    The id stays the same at every try and replay, so that a receiver recognizes repeated events; the time is new.
    """
    sent_at = datetime.fromtimestamp(int(now), UTC)
    valid = [endpoint.secret, *(old["secret"] for old in endpoint.old_secrets if now < old["until"])]
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(int(now)),
        "webhook-signature": " ".join(Webhook(secret).sign(event_id, sent_at, body) for secret in valid),
    }


async def send(outbound: Outbound, endpoint: Endpoint, event: Event) -> Outcome:
    """Send an event to an endpoint, once. Only an answer of 2xx counts as delivered; a redirect does not."""
    body = payload(event)
    headers = {
        "content-type": "application/json",
        "user-agent": f"serve_app/{__version__}",
        **signed_headers(endpoint, event.id, body, time.time()),
    }
    began = time.monotonic()
    try:
        answer = await outbound.post(endpoint.url, body.encode(), headers)
    except ReceiverRefused as error:
        return Outcome(False, time.monotonic() - began, error=f"refused: the URL {error}")
    except Unreachable as error:
        return Outcome(False, time.monotonic() - began, error=str(error))
    delivered = 200 <= answer.status < 300
    gone = answer.status == _GONE
    return Outcome(
        delivered,
        answer.seconds,
        answer.status,
        answer.text,
        error="" if delivered else f"answered {answer.status}, expected 2xx",
        final=gone,
        disable="The receiver answered 410 Gone." if gone else "",
    )
