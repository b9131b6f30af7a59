"""Webhooks and mails about videos that have ended."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, IPvAnyNetwork, PositiveFloat, PositiveInt, model_validator

from serve_app.config.section import NonNegativeFloat, Section

# One bare address: no character that could end a header, separate a second recipient or need quoting.
_MAIL_ADDRESS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")


def is_mail_address(text: str) -> bool:
    """Return whether a text is one plain e-mail address, `name@domain` in ASCII."""
    return len(text) <= 254 and _MAIL_ADDRESS.fullmatch(text) is not None


class WebhooksConfig(Section):
    """Events about ended videos, sent over HTTP, and the schedule of tries, which holds for mails as well."""

    endpoints: PositiveInt = 20
    """Number of endpoints that each API key may have."""
    allow_http: bool = False
    """Allows that the URL of an endpoint is `http`, which neither encrypts nor protects events."""
    allow_networks: tuple[IPvAnyNetwork, ...] = ()
    """Private networks whose addresses may be called, e.g. `[10.20.0.0/16]`. Anybody who may create endpoints can then
    send requests into them."""
    ca_file: str = ""
    """PEM file of certificate authorities that are trusted besides the usual ones."""
    timeout_s: float = Field(20, gt=0, le=60)
    """Seconds for a receiver to answer, or for a mail server to accept a mail."""
    retries_s: tuple[NonNegativeFloat, ...] = Field(
        (0, 5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400), min_length=1, max_length=32
    )
    """Seconds before each try, the first one included, up to a tenth more or less. After the last try the delivery has
    failed."""
    concurrency: PositiveInt = 16
    """Deliveries that one dispatcher makes at once."""
    retention_s: PositiveFloat = 7 * 86_400
    """Seconds for which events and the log of their deliveries are kept, and can be replayed."""

    @model_validator(mode="after")
    def _kept_while_tried(self) -> WebhooksConfig:
        longest_s = 1.1 * sum(self.retries_s)
        if self.retention_s <= longest_s:
            raise ValueError(
                f"retention_s is {self.retention_s:g}, expected more than {longest_s:g} (all of retries_s)"
            )
        return self


class MailConfig(Section):
    """The SMTP server for mails about ended videos, which requests ask for by `notify_email`."""

    host: str
    """Name or address of the SMTP server."""
    port: int = Field(587, ge=1, le=65_535)
    """Port of the SMTP server."""
    security: Literal["none", "starttls", "tls"] = "starttls"
    """`starttls`: required; no mail is sent if the server does not offer it. `tls`: TLS from the start, usually at port
    465."""
    user: str = ""
    """User of the login; the password is `$WAN_SERVE_MAIL_PASSWORD` of the dispatcher. Empty is no login."""
    sender: str
    """Sender address of the mails."""
    ca_file: str = ""
    """PEM file of certificate authorities that are trusted besides the usual ones."""

    @model_validator(mode="after")
    def _sender_is_an_address(self) -> MailConfig:
        if not is_mail_address(self.sender):
            raise ValueError(f"sender is {self.sender!r}, expected an address, name@domain")
        if self.user and self.security == "none":
            raise ValueError(
                "security is 'none' with a user, expected 'starttls' or 'tls': the password would not be encrypted"
            )
        return self
