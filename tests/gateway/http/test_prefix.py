"""The gateway below a route prefix, which Serve and a proxy in front of it pass in the scope's `root_path`."""

from __future__ import annotations

import httpx
import pytest

from tests.gateway.conftest import Server


@pytest.mark.parametrize("prefix", ["/api", "/behind/a/proxy/api"])
async def test_the_page_and_what_it_links_to(server: Server, prefix: str) -> None:
    transport = httpx.ASGITransport(server.app, root_path=prefix)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        answer = await http.get(f"{prefix}?x=1")
        assert (answer.status_code, answer.headers["location"]) == (307, f"{prefix}/?x=1")
        page = await http.get(prefix, follow_redirects=True)
        assert page.status_code == 200 and page.url.path == f"{prefix}/"
        # Links are relative, so they stay below any prefix.
        assert '"/v1' not in page.text and "`/v1" not in page.text
        for path in ("v1/videos", "v1/models", "healthz", "readyz"):
            assert (await http.get(page.url.join(path))).status_code == 200
        assert (await http.get(f"{prefix}x")).status_code == 404


async def test_a_prefix_that_looks_like_a_host(server: Server) -> None:
    transport = httpx.ASGITransport(server.app, root_path="//evil.test")
    async with httpx.AsyncClient(transport=transport) as http:
        answer = await http.get("http://127.0.0.1//evil.test")
        assert answer.headers["location"] == "/evil.test/"
