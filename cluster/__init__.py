"""Several hosts on one machine, to develop and test what only happens between hosts.

A host is a network namespace with an address of its own and a Ray node in it. `cluster.dev` is the command and the
import for tests. Hosts share what Linux namespaces of networks share: files, /dev/shm, process ids, processors and
memory. Knows nothing of serve_app and is no part of the installed package.
"""
