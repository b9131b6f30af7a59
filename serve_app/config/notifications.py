"""Who is told that a video has ended."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, IPvAnyNetwork, PositiveFloat, PositiveInt, model_validator

from serve_app.config.section import NonNegativeFloat, Section

# One bare address: what could end a header, name a second recipient or need quoting is not in it.
_MAIL_ADDRESS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")


def is_mail_address(text: str) -> bool:
    """Whether it is one plain e-mail address, `name@domain` in ASCII."""
    return len(text) <= 254 and _MAIL_ADDRESS.fullmatch(text) is not None


class WebhooksConfig(Section):
    """Who is told over HTTP that a video has ended, and how often it is tried. Mails are tried on the same schedule."""

    endpoints: PositiveInt = 20
    """How many each key may have."""
    allow_http: bool = False
    """Whether an endpoint's URL may be `http`, which neither hides nor protects what is sent."""
    allow_networks: tuple[IPvAnyNetwork, ...] = ()
    """Networks that are not public and may be called all the same, e.g. `[10.20.0.0/16]`. Everybody who may create
    endpoints can then send requests into them."""
    ca_file: str = ""
    """PEM file of certificate authorities that are trusted besides the usual ones."""
    timeout_s: float = Field(20, gt=0, le=60)
    """Time for a receiver to answer, or a mail server to take a mail."""
    retries_s: tuple[NonNegativeFloat, ...] = Field(
        (0, 5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400), min_length=1, max_length=32
    )
    """Wait before each try, the first one included, up to a tenth more or less. After the last one it is given up."""
    concurrency: PositiveInt = 16
    """Deliveries that one dispatcher has under way at once."""
    retention_s: PositiveFloat = 7 * 86_400
    """How long events and the log of their deliveries are kept, and can be replayed."""

    @model_validator(mode="after")
    def _kept_while_tried(self) -> WebhooksConfig:
        longest_s = 1.1 * sum(self.retries_s)
        if self.retention_s <= longest_s:
            raise ValueError(
                f"retention_s is {self.retention_s:g}, expected more than {longest_s:g} (all of retries_s)"
            )
        return self


class MailConfig(Section):
    """The SMTP server that takes mails to whoever asked for one when a video has ended."""

    host: str
    port: int = Field(587, ge=1, le=65_535)
    security: Literal["none", "starttls", "tls"] = "starttls"
    """`starttls`: refused where the server does not offer it. `tls`: from the first byte on, usually at port 465."""
    user: str = ""
    """Whom to log in as; the password is `$WAN_SERVE_MAIL_PASSWORD` of the dispatcher. Empty is no login."""
    sender: str
    """Address that the mails come from."""
    ca_file: str = ""
    """PEM file of certificate authorities that are trusted besides the usual ones."""

    @model_validator(mode="after")
    def _sender_is_an_address(self) -> MailConfig:
        if not is_mail_address(self.sender):
            raise ValueError(f"sender is {self.sender!r}, expected an address, name@domain")
        if self.user and self.security == "none":
            raise ValueError("security is 'none' with a user, expected 'starttls' or 'tls': the password would be open")
        return self
