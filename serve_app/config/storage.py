"""Where videos and saved samples go."""

from __future__ import annotations

import re

from pydantic import Field, PositiveFloat, model_validator

from serve_app.config.section import NonNegativeFloat, Section

# A prefix is made of names as keys are; see `serve_app.storage`.
_S3_URL = re.compile(r"s3://[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9](/[A-Za-z0-9_][A-Za-z0-9._-]*)*/?")
_ENDPOINT = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?/?")


class StorageConfig(Section):
    """Where videos and saved samples go. Access keys of S3 come from the environment (`AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, a web identity, a container's role) or from the instance.
    """

    url: str = ""
    """A folder, as a path or a `file:///` URL, or `s3://bucket/prefix`; empty is `<home>/videos`."""
    endpoint: str = ""
    """URL of the S3 server, `http://` only where nobody else listens; empty is AWS."""
    public_endpoint: str = ""
    """URL under which those who download reach the S3 server, where it is not `endpoint`."""
    region: str = ""
    """Of the bucket; empty is `$AWS_REGION`, else us-east-1."""
    conditional_put: bool = True
    """Whether the S3 server knows `If-None-Match: *`, which keeps an object from being replaced even by a writer that
    comes at the same moment; without it a look beforehand has to do."""
    proxy: bool = False
    """Send videos through the gateway, instead of redirecting to a presigned URL of the S3 server."""
    presign_s: int = Field(900, ge=1, le=7 * 24 * 3600)
    """How long a presigned URL is valid."""
    timeout_s: PositiveFloat = 30
    """A request to the S3 server, which moves 8 MiB at most, fails after this long."""
    retry_s: NonNegativeFloat = 60
    """How long a request that failed is repeated before the call fails. A call ends at the latest this and `timeout_s`
    after the last request that got through."""
    min_free_mib: NonNegativeFloat = 512
    """Less free space than this on the disk of the folder, or of an SQLite database, and no more jobs are accepted."""

    @property
    def bucket(self) -> str:
        """The bucket that `url` names; empty for a folder."""
        return self._address[0]

    @property
    def prefix(self) -> str:
        """What all keys in the bucket begin with."""
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
