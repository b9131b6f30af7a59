"""The storage of videos and saved samples."""

from __future__ import annotations

import re

from pydantic import Field, PositiveFloat, model_validator

from serve_app.config.section import NonNegativeFloat, Section

# A prefix consists of names, as keys do; see `serve_app.storage`.
_S3_URL = re.compile(r"s3://[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9](/[A-Za-z0-9_][A-Za-z0-9._-]*)*/?")
_ENDPOINT = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?/?")


class StorageConfig(Section):
    """The storage of videos and saved samples.

    Access keys of S3 come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, a
    web identity, a container's role) or from the instance.
    """

    url: str = ""
    """A folder, as a path or a `file:///` URL, or `s3://bucket/prefix`; empty is `<home>/videos`."""
    endpoint: str = ""
    """URL of the S3 server; empty is AWS. Use `http://` only in a network where nobody else listens."""
    public_endpoint: str = ""
    """URL under which clients reach the S3 server for downloads, if it differs from `endpoint`."""
    region: str = ""
    """Region of the bucket; empty is `$AWS_REGION`, else us-east-1."""
    conditional_put: bool = True
    """True if the S3 server obeys `If-None-Match: *`, by which no writer replaces an object, even at the same moment.
    If not, writers check beforehand."""
    proxy: bool = False
    """Send videos through the gateway, instead of redirecting to a presigned URL of the S3 server."""
    presign_s: int = Field(900, ge=1, le=7 * 24 * 3600)
    """Seconds for which a presigned URL is valid."""
    timeout_s: PositiveFloat = 30
    """Seconds after which a request to the S3 server fails; one moves 8 MiB at most."""
    retry_s: NonNegativeFloat = 60
    """Seconds for which a failed request is repeated before the call fails. A call ends at the latest `retry_s` plus
    `timeout_s` after its last successful request."""
    min_free_mib: NonNegativeFloat = 512
    """Free space on the disk of the folder, and of an SQLite database, below which no more jobs are accepted."""

    @property
    def bucket(self) -> str:
        """The bucket that `url` names; empty for a folder."""
        return self._address[0]

    @property
    def prefix(self) -> str:
        """The beginning of all keys in the bucket."""
        return self._address[1]

    @property
    def _address(self) -> tuple[str, str]:
        if not self.url.startswith("s3://"):
            return "", ""
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        return bucket, prefix.rstrip("/")

    @model_validator(mode="after")
    def _possible(self) -> StorageConfig:
        if self.url.startswith("s3://"):
            if not _S3_URL.fullmatch(self.url):
                raise ValueError(f"url has value {self.url!r}, expected s3://bucket or s3://bucket/prefix")
            for name in ("endpoint", "public_endpoint"):
                value = getattr(self, name)
                if value and not _ENDPOINT.fullmatch(value):
                    raise ValueError(f"{name} has value {value!r}, expected https://host:port or http://host:port")
            return self
        if self.url.startswith("file://") and not self.url.startswith("file:///"):
            raise ValueError(f"url has value {self.url!r}, expected file:///folder, with an absolute path")
        if "://" in self.url.removeprefix("file://"):
            raise ValueError(f"url has value {self.url!r}, expected a folder or s3://bucket/prefix")
        for name in ("endpoint", "public_endpoint", "region"):
            if value := getattr(self, name):
                raise ValueError(f"{name} has value {value!r}, expected none, because url is not s3://bucket/prefix")
        return self
