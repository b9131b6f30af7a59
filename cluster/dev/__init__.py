"""Several hosts on one machine, to develop and test what only happens between hosts.

A host is a network namespace with an address of its own and a Ray node in it. `python -m cluster.dev` is the command,
`Cluster` the import for tests. Hosts share what Linux namespaces of networks share: files, /dev/shm, process ids,
processors and memory.
"""

from cluster.dev.cluster import Cluster
from cluster.dev.errors import ClusterError
from cluster.dev.host import Host

__all__ = ["Cluster", "ClusterError", "Host"]
