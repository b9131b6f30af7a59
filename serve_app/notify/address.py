"""Addresses that may be called for a user: public ones, and those that the operator allows.

The networks are written out because `ipaddress.is_global` depends on Python's version, knows no multicast, and does not
see embedded addresses (::ffff:127.0.0.1 is global to Python 3.11).
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Network = IPv4Network | IPv6Network

# IPv4 networks that are not globally reachable by IANA's special-purpose registry, with multicast and reserved space.
_PRIVATE_V4 = [
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
]
# Only global unicast is public in IPv6. Addresses that embed IPv4 ones (mapped, compatible, NAT64) lie outside of it.
_PUBLIC_V6 = IPv6Network("2000::/3")
# Teredo, ORCHID and benchmarking; documentation; 6to4; documentation again.
_PRIVATE_V6 = [IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]


def is_allowed(text: str, networks: Iterable[Network]) -> bool:
    """Return whether an address, as a resolver spells it, is public or lies in one of `networks`.

    Raises:
        ValueError: it is no address.
    """
    address = ip_address(text)
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return False  # such an address is valid on one link only
    if any(address in network for network in networks):
        return True
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _PRIVATE_V4)
    return address in _PUBLIC_V6 and not any(address in network for network in _PRIVATE_V6)
