from __future__ import annotations

import pytest

from serve_app.launch.address import base_url


@pytest.mark.parametrize(
    ("host", "route", "url"),
    [
        ("127.0.0.1", "/", "http://127.0.0.1:81"),
        ("0.0.0.0", "/", "http://127.0.0.1:81"),
        ("::", "/", "http://[::1]:81"),
        ("0:0:0:0:0:0:0:0", "/", "http://[::1]:81"),
        ("::1", "/api", "http://[::1]:81/api"),
        ("fe80::1", "/", "http://[fe80::1]:81"),
        ("localhost", "/api/v2", "http://localhost:81/api/v2"),
        ("video.example.com", "/", "http://video.example.com:81"),
    ],
)
def test_base_url(host: str, route: str, url: str) -> None:
    assert base_url({"host": host, "port": 81, "root_path": "/behind/a/proxy"}, route) == url


def test_the_default_port() -> None:
    assert base_url({"host": "::1"}, "/") == "http://[::1]:8000"
