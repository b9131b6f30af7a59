"""Pages of other sites in a real browser: they can do nothing, unless an option names them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from serve_app.config import validate
from serve_app.gateway.app import create_app
from tests.gateway.conftest import Server, listening
from tests.support.browser import browser

if TYPE_CHECKING:
    from playwright.async_api import Browser

__all__ = ["browser"]

pytestmark = pytest.mark.slow  # a browser

ATTACK = """async (url) => {
  const send = (path, options) => fetch(url + path, options).then(answer => answer.type, () => "blocked");
  const body = '{"prompt": "a star"}', said = [];
  for (const mode of ["no-cors", "cors"]) {
    said.push(await send("/v1/videos", {method: "POST", mode, body}));
    said.push(await send("/v1/videos", {method: "POST", mode, body: new Blob([body])}));
    said.push(await send("/v1/videos", {method: "POST", mode, body: new URLSearchParams({prompt: "a star"})}));
    const form = new FormData(); form.append("prompt", "a star");
    said.push(await send("/v1/videos", {method: "POST", mode, body: form}));
  }
  said.push(await send("/v1/videos", {method: "POST", body, headers: {"content-type": "application/json"}}));
  said.push(await send("/v1/videos"));
  const frame = Object.assign(document.createElement("iframe"), {name: "out", sandbox: "allow-forms"});
  const page = document.createElement("form");
  Object.assign(page, {method: "POST", action: url + "/v1/videos", target: "out"});
  page.append(Object.assign(document.createElement("input"), {name: "prompt", value: "a star"}));
  document.body.append(frame, page);
  await new Promise(loaded => { frame.onload = loaded; page.submit(); });
  return said;
}"""
USE = """async (url) => {
  const headers = {"content-type": "application/json", "idempotency-key": "one"};
  const body = JSON.stringify({prompt: "a star"});
  const made = await fetch(url + "/v1/videos", {method: "POST", headers, body});
  const {id} = await made.json();
  const follow = withCredentials => new Promise((done, failed) => {
    const events = new EventSource(`${url}/v1/videos/${id}/events`, {withCredentials});
    events.addEventListener("completed", event => { events.close(); done(JSON.parse(event.data).status); });
    events.onerror = () => { events.close(); failed("no events"); };
  });
  const ends = [await follow(false), await follow(true)];
  const part = await fetch(`${url}/v1/videos/${id}/content`, {headers: {range: "bytes=0-9"}, credentials: "include"});
  const missing = await fetch(`${url}/v1/videos/none`);
  const gone = await fetch(`${url}/v1/videos/${id}`, {method: "DELETE"});
  return {ends, part: part.headers.get("content-range"), id: made.headers.get("x-request-id"),
          missing: (await missing.json()).error.code, retry: missing.headers.get("x-should-retry"), gone: gone.status};
}"""


@pytest.fixture
async def elsewhere() -> AsyncIterator[int]:
    """Port of the server of another site."""
    site = FastAPI()

    @site.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse("<!doctype html><link rel=icon href='data:,'><body>another site</body>")

    async with listening(site) as url:
        yield int(url.rpartition(":")[2])


async def test_pages_of_other_sites(server: Server, browser: Browser, elsewhere: int) -> None:
    friend = f"http://friend.example:{elsewhere}"
    args = server.config.model_dump(exclude={"gateway", "model"})
    config = validate(args | {"gateway": {"origins": [friend]}})

    async def wake() -> None:
        server.dispatcher.wake()

    async def ready() -> None:
        return None

    async with listening(create_app(config, server.store, server.storage, wake, ready)) as url:
        page = await browser.new_page()
        for origin in (f"http://evil.example:{elsewhere}", f"http://127.0.0.1:{elsewhere}"):
            await page.goto(origin)
            said = await page.evaluate(ATTACK, url)
            assert said == ["opaque"] * 4 + ["blocked"] * 6
        # The name now leads to the server, so to the browser both have the same origin.
        await page.goto(url.replace("127.0.0.1", "evil.example"))
        read = "path => fetch(path).then(answer => answer.json())"
        assert (await page.evaluate(read, "/v1/videos"))["error"]["code"] == "unknown_host"
        assert (await server.store.list())[0] == []
        await page.goto(friend)
        used: dict[str, Any] = await page.evaluate(USE, url)
        assert used.pop("id").startswith("req_") and used.pop("part").startswith("bytes 0-9/")
        assert used == {"ends": ["completed"] * 2, "missing": "not_found", "retry": "false", "gone": 200}
        await page.close()


async def test_the_description_needs_no_network(server: Server, browser: Browser) -> None:
    async with listening(server.app) as url:
        page = await browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(f"{url}/docs")
        await page.locator("#operations-videos-create_v1_videos_post").wait_for()
        assert asked and all(one.startswith((url, "data:")) for one in asked), asked
        await page.close()
