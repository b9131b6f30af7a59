"""A mail that says that a video has ended, and the SMTP client that sends it.

The text holds nothing that the requester wrote: a request may name any address, and nobody should be able to send
words of their own there.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime

import aiosmtplib

from serve_app.config import MailConfig
from serve_app.db.notifications import Delivery, Event
from serve_app.db.tables import CANCELLED, Job
from serve_app.errors import ConfigError, one_line
from serve_app.notify.outbound import tls_context
from serve_app.notify.outcome import Outcome

PASSWORD = "WAN_SERVE_MAIL_PASSWORD"  # the name of an environment variable
_ANSWER_CHARS = 1024
_QUIT_S = 1

_TEXTS = {
    ("en", "video.completed"): ("Your video is ready", "Your video {id} is ready."),
    ("en", "video.failed"): ("Your video failed", "Your video {id} failed: {error}"),
    ("en", CANCELLED): ("Your video was cancelled", "Your video {id} was cancelled."),
    ("zh", "video.completed"): ("您的视频已生成", "您的视频 {id} 已生成。"),
    ("zh", "video.failed"): ("您的视频生成失败", "您的视频 {id} 生成失败：{error}"),
    ("zh", CANCELLED): ("您的视频已取消", "您的视频 {id} 已取消。"),
}


def compose(mail: MailConfig, public_url: str, delivery: Delivery, event: Event, job: Job) -> EmailMessage:
    """Return the mail: the same at every try, with its Message-ID; in Chinese if the prompt has a Chinese character."""
    language = "zh" if any("\u4e00" <= char <= "\u9fff" for char in job.params["prompt"]) else "en"
    subject, text = _TEXTS[language, CANCELLED if job.shown_status == CANCELLED else event.type]
    message = EmailMessage()
    message["From"] = mail.sender
    message["To"] = delivery.recipient
    message["Subject"] = subject
    message["Date"] = format_datetime(datetime.fromtimestamp(int(event.created_at), UTC))
    message["Message-ID"] = f"<{delivery.id}@{mail.sender.rpartition('@')[2]}>"
    message["Auto-Submitted"] = "auto-generated"  # keeps vacation responders quiet (RFC 3834)
    lines = [text.format(id=job.id, error=job.error_code)]
    if public_url and event.type == "video.completed":
        lines.append(f"{public_url.rstrip('/')}/v1/videos/{job.id}/content")
    message.set_content("\n\n".join(lines) + "\n")
    return message


class Mailer:
    """Hands mails to an SMTP server.

    Args:
        options: the SMTP server and the sender.
        public_url: the URL of the gateway, for a link to the video; empty for none.
        timeout_s: seconds for all of a mail, from the connection to the server's confirmation.

    Raises:
        ConfigError: a user has no password in the environment, or `ca_file` cannot be read.
    """

    def __init__(self, options: MailConfig, public_url: str, timeout_s: float) -> None:
        self._options = options
        self._public_url = public_url
        self._timeout_s = timeout_s
        self._password = os.environ.get(PASSWORD) if options.user else None
        if options.user and not self._password:
            raise ConfigError(f"mail.user has value {options.user!r}, expected its password in ${PASSWORD}")
        self._tls = None if options.security == "none" else tls_context(options.ca_file, "mail.ca_file")

    async def send(self, delivery: Delivery, event: Event, job: Job) -> Outcome:
        """Send the mail, once."""
        options = self._options
        message = compose(options, self._public_url, delivery, event, job)
        client = aiosmtplib.SMTP(
            hostname=options.host,
            port=options.port,
            username=options.user or None,
            password=self._password,
            use_tls=options.security == "tls",
            start_tls=options.security == "starttls",
            tls_context=self._tls,
            timeout=None,  # the library's timeout is per command
        )
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                await client.connect()
                _, said = await client.send_message(message, sender=options.sender, recipients=[delivery.recipient])
            seconds = time.monotonic() - began
            # The server has the mail, so a failing goodbye does not matter.
            with suppress(aiosmtplib.SMTPException, OSError):
                await client.quit(timeout=_QUIT_S)
        except TimeoutError:
            reason = f"the mail server did not take it within {self._timeout_s:g} s"
            return Outcome(False, time.monotonic() - began, error=reason)
        except (aiosmtplib.SMTPException, OSError) as error:
            return _failed(error, time.monotonic() - began)
        finally:
            client.close()  # a context manager would wait for the goodbye of a server that hangs
        return Outcome(True, seconds, 250, said[:_ANSWER_CHARS])


def _failed(error: Exception, seconds: float) -> Outcome:
    """Return a failed try: final if the server does not know the recipient, since other failures may be mended."""
    refused = error.recipients[0] if isinstance(error, aiosmtplib.SMTPRecipientsRefused) else error
    code = refused.code if isinstance(refused, aiosmtplib.SMTPResponseException) else None
    final = isinstance(refused, aiosmtplib.SMTPRecipientRefused) and refused.code >= 500
    return Outcome(False, seconds, code, error=one_line(refused), final=final)
