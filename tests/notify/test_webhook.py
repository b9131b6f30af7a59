from __future__ import annotations

import base64
import json
import time

import openai
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from serve_app.db.notifications import Endpoint, new_event
from serve_app.notify.webhook import new_secret, payload, signed_headers


@pytest.fixture
def now() -> float:
    """The time of the test, because receivers refuse notifications older than five minutes."""
    return time.time()


def endpoint(*old: tuple[str, float]) -> Endpoint:
    secrets = [{"secret": secret, "until": until} for secret, until in old]
    return Endpoint(id="we_x", secret=new_secret(), old_secrets=secrets)


def accepted(secret: str, body: str, headers: dict[str, str]) -> bool:
    """By both libraries that our users verify with."""
    client = openai.OpenAI(api_key="none", webhook_secret=secret)
    try:
        event = client.webhooks.unwrap(body, headers)
    except openai.InvalidWebhookSignatureError:
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body, headers)
        return False
    assert Webhook(secret).verify(body, headers) == json.loads(body)
    assert event.model_dump(exclude_none=True) == json.loads(body)
    return True


@pytest.mark.parametrize("kind", ["video.completed", "video.failed"])
def test_the_sdk_accepts_it(kind: str, now: float) -> None:
    event = new_event("", kind, "video_1")  # type: ignore[arg-type]
    mine, body = endpoint(), payload(event)
    headers = signed_headers(mine, event.id, body, now)
    assert accepted(mine.secret, body, headers)
    assert json.loads(body) == {
        "id": event.id,
        "object": "event",
        "created_at": int(event.created_at),
        "type": kind,
        "data": {"id": "video_1"},
    }
    assert event.id.startswith("evt_") and headers["webhook-id"] == event.id


def test_what_was_tampered_with_is_refused(now: float) -> None:
    event = new_event("", "video.completed", "video_1")
    mine, body = endpoint(), payload(event)
    headers = signed_headers(mine, event.id, body, now)
    assert not accepted(new_secret(), body, headers)
    assert not accepted(mine.secret, body.replace("completed", "failed"), headers)
    assert not accepted(mine.secret, body, {**headers, "webhook-id": "evt_other"})
    assert not accepted(mine.secret, body, {**headers, "webhook-timestamp": str(int(now) + 1)})
    assert not accepted(mine.secret, body, signed_headers(mine, event.id, body, now - 400))


def test_old_secrets_sign_as_long_as_they_are_valid(now: float) -> None:
    old, expired = new_secret(), new_secret()
    mine = endpoint((old, now + 60), (expired, now - 1))
    event = new_event("", "video.completed", "video_1")
    body = payload(event)
    headers = signed_headers(mine, event.id, body, now)
    assert len(headers["webhook-signature"].split(" ")) == 2
    assert accepted(mine.secret, body, headers) and accepted(old, body, headers)
    assert not accepted(expired, body, headers)


def test_secrets() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32 for secret in secrets)
