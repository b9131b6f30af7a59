from __future__ import annotations

from ipaddress import ip_network

import pytest

from serve_app.notify.address import is_allowed

PUBLIC = ["1.1.1.1", "93.184.216.34", "192.0.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1"]
PRIVATE = [
    *("0.0.0.0", "0.1.2.3", "10.255.255.255", "100.64.0.1", "100.127.255.255", "127.0.0.1", "127.255.255.255"),
    *("169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.1.1"),
    *("198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1"),
    *("255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1"),
    *("64:ff9b::808:808", "64:ff9b:1::1", "100::1", "2001::1", "2001:0:7f00:1::", "2001:10::1", "2001:db8::1"),
    *("2002:7f00:1::1", "2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fd12:3456::1", "fe80::1", "fe80::1%lo"),
    *("fec0::1", "ff02::1", "ff0e::1", "2606:4700::1111%eth0"),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address: str) -> None:
    assert is_allowed(address, [])


@pytest.mark.parametrize("address", PRIVATE)
def test_not_public(address: str) -> None:
    assert not is_allowed(address, [])


def test_what_the_operator_allows() -> None:
    networks = [ip_network("10.1.0.0/16"), ip_network("fd00:1::/32")]
    assert is_allowed("10.1.2.3", networks) and is_allowed("fd00:1::5", networks) and is_allowed("1.1.1.1", networks)
    for other in ("10.2.0.1", "fd00:2::1", "127.0.0.1", "::ffff:10.1.2.3"):
        assert not is_allowed(other, networks)


@pytest.mark.parametrize("text", ["", "example.com", "0x7f.1", "0177.0.0.1", "2130706433", "127.1"])
def test_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="does not appear"):
        is_allowed(text, [])
