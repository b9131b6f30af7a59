"""Mails through a real SMTP server on loopback."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword

from serve_app.config import MailConfig, validate
from serve_app.db.notifications import Delivery, Event
from serve_app.db.tables import Job
from serve_app.errors import ConfigError
from serve_app.jobs.store import JobStore
from serve_app.notify.endpoints import Endpoints
from serve_app.notify.mail import PASSWORD, Mailer, compose
from serve_app.notify.outbox import Outbox
from tests.support.fakes import PARAMS, until
from tests.support.receiver import receiving
from tests.support.sending import Notify, completed, deliveries, ended, failed, listen


class Mailbox:
    """A mailbox of what the server took; each DATA gets one of `answers` while there are any."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []
        self.answers: list[str] = []
        self.hang_s = 0.0

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        if address.startswith("nobody@"):
            return "550 5.1.1 no such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Envelope) -> str:
        await asyncio.sleep(self.hang_s)
        self.envelopes.append(envelope)
        return self.answers.pop(0) if self.answers else "250 2.0.0 taken"

    def mails(self) -> list[EmailMessage]:
        return [message_from_bytes(envelope.content, policy=policy.default) for envelope in self.envelopes]


Serve = Callable[..., Awaitable[tuple[Mailbox, dict[str, Any]]]]


@pytest.fixture
async def smtp() -> AsyncIterator[Serve]:
    """Start servers, each with its mailbox and the `mail` section that reaches it."""
    running: list[asyncio.Server] = []

    async def serve(port: int = 0, tls: ssl.SSLContext | None = None, **options: Any) -> tuple[Mailbox, dict[str, Any]]:
        mailbox = Mailbox()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: SMTP(mailbox, hostname="mail.test", loop=loop, **options), "127.0.0.1", port, ssl=tls
        )
        running.append(server)
        port = server.sockets[0].getsockname()[1]
        return mailbox, {"host": "127.0.0.1", "port": port, "security": "none", "sender": "wan@video.test"}

    yield serve
    for server in running:
        server.close()


async def test_whoever_asked_gets_a_mail(store: JobStore, notify: Notify, smtp: Serve) -> None:
    mailbox, mail = await smtp()
    notify(mail=mail)
    good = await completed(store, notify_email="ada@example.test")
    await ended(store)
    await failed(store, notify_email="li@example.test", prompt="一只猫")
    rows = await ended(store, 2)
    await completed(store)  # asked for none
    assert [(row.status, row.log[0]["status_code"]) for row in rows] == [("delivered", 250)] * 2
    english, chinese = mailbox.mails()
    assert (english["From"], english["To"]) == ("wan@video.test", "ada@example.test")
    assert english["Subject"] == "Your video is ready" and good in english.get_content()
    assert english["Message-ID"] == f"<{rows[0].id}@video.test>" and english["Auto-Submitted"] == "auto-generated"
    assert chinese["To"] == "li@example.test" and chinese["Subject"] == "您的视频已取消"
    assert "已取消。" in chinese.get_content() and "失败" not in chinese.get_content()
    assert mailbox.envelopes[0].rcpt_tos == ["ada@example.test"]
    assert mailbox.envelopes[0].mail_from == "wan@video.test"


async def test_the_same_machinery_tries_again(store: JobStore, notify: Notify, smtp: Serve) -> None:
    mailbox, mail = await smtp()
    mailbox.answers = ["451 4.3.0 try later"]
    notify(mail=mail)
    await completed(store, notify_email="ada@example.test")
    (row,) = await ended(store)
    assert (row.status, [entry["status_code"] for entry in row.log]) == ("delivered", [451, 250])
    assert "try later" in row.log[0]["error"]
    first, second = mailbox.mails()
    assert first.as_bytes() == second.as_bytes()  # one mail, whatever came between


async def test_a_recipient_that_does_not_exist_is_given_up(store: JobStore, notify: Notify, smtp: Serve) -> None:
    mailbox, mail = await smtp()
    notify(mail=mail)
    await completed(store, notify_email="nobody@example.test")
    (row,) = await ended(store)
    assert mailbox.envelopes == []
    assert (row.status, row.tries, row.log[0]["status_code"]) == ("failed", 1, 550)


async def test_a_server_that_hangs_or_is_away(store: JobStore, notify: Notify, smtp: Serve) -> None:
    mailbox, mail = await smtp()
    mailbox.hang_s = 30
    notify(mail=mail, timeout_s=0.3, retries_s=[0])
    await completed(store, notify_email="ada@example.test")
    (row,) = await ended(store)
    assert (row.status, row.log[0]["error"]) == ("failed", "the mail server did not take it within 0.3 s")


async def test_a_server_that_comes_up_later(store: JobStore, notify: Notify, smtp: Serve, unused_port: int) -> None:
    mail = {"host": "127.0.0.1", "port": unused_port, "security": "none", "sender": "wan@video.test"}
    notify(mail=mail, retries_s=[0, *[0.05] * 30])
    await completed(store, notify_email="ada@example.test")

    async def tried() -> bool:
        rows = await deliveries(store)
        return bool(rows) and len(rows[0].log) >= 2

    await until(tried)
    mailbox, _ = await smtp(unused_port)
    (row,) = await ended(store)
    assert row.status == "delivered" and len(mailbox.envelopes) == 1


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_mail_and_webhook_do_not_stand_in_each_others_way(
    store: JobStore, endpoints: Endpoints, notify: Notify, smtp: Serve
) -> None:
    mailbox, mail = await smtp()
    async with receiving() as receiver:
        await listen(endpoints, receiver)
        notify(mail=mail)
        await completed(store, notify_email="ada@example.test")
        assert {row.status for row in await ended(store, 2)} == {"delivered"}
        assert (len(receiver.requests), len(mailbox.envelopes)) == (1, 1)


async def test_a_deleted_video_sends_no_mail(store: JobStore, notify: Notify, smtp: Serve) -> None:
    mailbox, mail = await smtp()
    video_id = await completed(store, notify_email="ada@example.test")
    await Outbox(store.database, [0]).distribute()
    await store.delete(video_id)
    notify(mail=mail)
    (row,) = await ended(store)
    assert (row.status, row.log[0]["error"]) == ("failed", "not sent: the video was deleted")
    assert mailbox.envelopes == []


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_encrypted_with_a_password(
    store: JobStore,
    notify: Notify,
    smtp: Serve,
    security: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authority = trustme.CA()
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    def authenticate(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        good = isinstance(data, LoginPassword) and (data.login, data.password) == (b"wan", b"secret")
        return AuthResult(success=good)

    options: dict[str, Any] = {"authenticator": authenticate, "auth_required": True}
    if security == "starttls":
        options |= {"tls_context": context, "require_starttls": True}
    else:
        options |= {"tls": context, "auth_require_tls": False}
    mailbox, mail = await smtp(**options)
    mail |= {"security": security, "user": "wan", "ca_file": str(ca_file)}
    monkeypatch.setenv(PASSWORD, "secret")
    notifier = notify(mail=mail)
    await completed(store, notify_email="ada@example.test")
    (row,) = await ended(store)
    assert row.status == "delivered", row.log
    await notifier.stop()
    # Nothing is said to a server that cannot prove who it is.
    notify(mail={**mail, "ca_file": ""})
    await completed(store, notify_email="ada@example.test")
    _, row = await ended(store, 2)
    assert (row.status, len(mailbox.envelopes)) == ("failed", 1)
    assert "certificate verify failed" in row.log[0]["error"].lower(), row.log


async def test_no_starttls_no_mail(store: JobStore, notify: Notify, smtp: Serve) -> None:
    mailbox, mail = await smtp()
    notify(mail={**mail, "security": "starttls"})
    await completed(store, notify_email="ada@example.test")
    (row,) = await ended(store)
    assert row.status == "failed" and mailbox.envelopes == [], row.log


def test_a_user_without_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD, raising=False)
    with pytest.raises(ConfigError, match=r"mail\.user has value 'wan', expected its password"):
        Mailer(MailConfig(host="x", sender="a@b.test", user="wan"), "", 5)


def mail_of(recipient: str = "ada@example.test", prompt: str = "a cat", public_url: str = "") -> EmailMessage:
    job = Job(id="video_1", params=PARAMS.model_copy(update={"prompt": prompt}).model_dump(), error_code="cancelled")
    delivery = Delivery(id="dlv_1", recipient=recipient)
    event = Event(id="evt_1", type="video.completed", created_at=1.0)
    return compose(MailConfig(host="x", sender="wan@video.test"), public_url, delivery, event, job)


def test_the_text() -> None:
    assert "http" not in mail_of().get_content()
    text = mail_of(public_url="https://video.test/").get_content()
    assert "https://video.test/v1/videos/video_1/content" in text.splitlines()
    for prompt in ("BUY NOW\r\nBcc: everybody@example.test", "买 NOW"):
        mail = mail_of(prompt=prompt)
        assert "NOW" not in mail.as_string() and "Bcc" not in mail  # nobody sends words of their own with our mails


@pytest.mark.parametrize("recipient", ["a@b.test\r\nBcc: c@d.test", "a@b.test\nX: y"])
def test_even_a_recipient_that_slipped_through_injects_nothing(recipient: str) -> None:
    with pytest.raises(ValueError, match="may not contain linefeed"):
        mail_of(recipient)


@pytest.mark.parametrize(
    "mail",
    [
        {"host": "x"},
        {"host": "x", "sender": "nobody"},
        {"host": "x", "sender": "a@b\n.test"},
        {"host": "x", "sender": "A <a@b.test>"},
        {"host": "x", "sender": "a@b.test", "user": "u", "security": "none"},
        {"host": "x", "sender": "a@b.test", "password": "secret"},
        {"host": "x", "sender": "a@b.test", "port": 0},
        {"host": "x", "sender": "a@b.test", "security": "ssl"},
    ],
)
def test_options_that_cannot_work(mail: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="mail"):
        validate({"mail": mail})
