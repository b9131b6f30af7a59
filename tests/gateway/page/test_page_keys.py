"""The web page in a real browser, of a server that asks for an API key."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from serve_app.config import AuthConfig
from tests.gateway.conftest import Server
from tests.support.browser import (
    FilmPipeline,
    Seen,
    browser,
    films,
    make,
    page,
    picture_is_shown,
    seen,
    status,
    url,
    video_is_shown,
)
from tests.support.fakes import until

if TYPE_CHECKING:
    from playwright.async_api import Page

__all__ = ["browser", "films", "page", "seen", "url"]

pytestmark = pytest.mark.slow  # minutes of a browser


@pytest.fixture
def auth() -> AuthConfig:
    return AuthConfig(mode="keys")


async def use(page: Page, key: str) -> None:
    await page.get_by_label("API key").fill(key)
    await page.get_by_role("button", name="Use this key").click()


async def test_the_key_is_asked_for(page: Page, seen: Seen, server: Server) -> None:
    seen.expected.append("status of 401")
    key_id, headers = await server.key()
    key = headers["authorization"].removeprefix("Bearer ")
    await page.get_by_label("API key").wait_for()
    assert not await page.locator("#form").is_visible() and await page.locator("#why").text_content() == ""
    for wrong in ("wan_wrong", key + "0", "none"):
        await use(page, wrong)
        await page.locator("#why", has_text="The API key is unknown or was revoked.").wait_for()
        assert await page.get_by_label("API key").input_value() == ""
    await use(page, "钥匙")
    assert await page.evaluate("login.checkValidity()") is False
    await use(page, f" {key} ")
    await make(page, "with a key")
    await status(page, "Done")
    await video_is_shown(page)
    await picture_is_shown(page)
    assert (await page.evaluate("player.src")).startswith("blob:")
    await page.reload()
    await status(page, "Done")
    await video_is_shown(page)
    assert not await page.locator("#login").is_visible()
    assert not any(key in asked or "wan_" in asked for asked in seen.urls)
    assert key not in await page.content() and key not in page.url
    assert await page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    await server.store.keys.revoke(key_id)
    await page.get_by_role("button", name="Make video").click()
    await page.locator("#why", has_text="The API key is unknown or was revoked.").wait_for()
    assert await page.locator("#list li").count() == 0 and not await page.locator("#player").is_visible()


async def test_forget(page: Page, seen: Seen, server: Server) -> None:
    seen.expected.append("status of 401")
    _, headers = await server.key()
    await server.create(headers)
    await use(page, headers["authorization"].removeprefix("Bearer "))
    await page.locator("#list li").wait_for()
    await page.get_by_role("button", name="Forget the key").click()
    await page.get_by_label("API key").wait_for()
    assert await page.locator("#list li").count() == 0
    assert await page.evaluate("sessionStorage.getItem('key')") is None
    _, other = await server.key()
    await use(page, other["authorization"].removeprefix("Bearer "))
    await make(page, "of another")
    await status(page, "Done")
    assert await page.locator("#list li").count() == 1


async def test_a_key_that_may_only_look(page: Page, seen: Seen, server: Server) -> None:
    seen.expected.extend(["status of 401", "status of 403"])
    _, headers = await server.key("read")
    await use(page, headers["authorization"].removeprefix("Bearer "))
    await make(page, "not allowed")
    await page.locator("#error", has_text="The API key lacks the scope 'create'.").wait_for()


async def test_a_key_with_few_requests_a_minute(page: Page, seen: Seen, server: Server, films: FilmPipeline) -> None:
    seen.expected.extend(["status of 401", "status of 429"])
    key_id, headers = await server.key(requests_per_minute=12)
    films.gate = asyncio.Event()
    await use(page, headers["authorization"].removeprefix("Bearer "))
    await make(page, "slowly")
    await status(page, "Running")

    async def refused() -> bool:  # also how the page looks at its video
        return bool((await server.http.get("/v1/models", headers=headers)).status_code == 429)

    await until(refused)
    await page.get_by_role("button", name="Make video").click()
    await page.locator("#error", has_text="This key has reached its limit of 12 requests per minute.").wait_for()
    assert await page.locator("#state").text_content() == "Running"
    await server.store.keys.limit(key_id, {"requests_per_minute": None})
    films.gate.set()
    await status(page, "Done")
