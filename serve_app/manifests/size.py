"""Choices that a configuration does not make: names, the image, and the size of the cluster's nodes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from serve_app.errors import ConfigError

# KubeRay's limit of a RayService's name: it appends a suffix for each cluster and group.
_NAME_CHARS = 47
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_IMAGE = re.compile(r"[a-z0-9][\w./-]*(:[0-9]+/[\w./-]+)?(:[\w.-]+)?(@sha256:[0-9a-f]{64})?")


@dataclass(frozen=True)
class Size:
    """Choices for one set of manifests.

    Attributes:
        name: name of the RayService; other objects are named after it.
        namespace: namespace of all objects.
        image: image of all Pods.
        gpus_per_node: GPUs of one GPU node, all of which one Pod takes.
        cpus_per_node: CPUs of a GPU Pod; 0 is as many as the deployments on it reserve, and at least 4 for each GPU.
        memory_per_node: memory of a GPU Pod in GiB; 0 is 16, and for each GPU 16, or 80 where weights wait in it.
        redis: `host:port` of the Redis in which Ray's control process keeps its state, for the component `redis`.

    Raises:
        ConfigError: a value cannot work.
    """

    name: str = "wan"
    namespace: str = "wan"
    image: str = "serve-app:latest"
    gpus_per_node: int = 8
    cpus_per_node: int = 0
    memory_per_node: int = 0
    redis: str = "redis:6379"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or len(self.name) > _NAME_CHARS:
            raise ConfigError(
                f"--name has value {self.name!r}, expected at most {_NAME_CHARS} lower-case letters, digits and '-', "
                "the first a letter"
            )
        if not _NAME.fullmatch(self.namespace) or len(self.namespace) > 63:
            raise ConfigError(f"--namespace has value {self.namespace!r}, expected the name of a Kubernetes namespace")
        if not _IMAGE.fullmatch(self.image):
            raise ConfigError(f"--image has value {self.image!r}, expected registry/name:tag")
        host, colon, port = self.redis.rpartition(":")
        if not (host and colon and port.isdigit()):
            raise ConfigError(f"--redis has value {self.redis!r}, expected host:port")
