"""A real browser for tests: Chromium by playwright. It downloads none, but uses the one that is installed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
import pytest

from serve_app.job_spec import JobSpec
from serve_app.storage import download_name
from serve_app.wan.video import thumbnail, write_mp4
from tests.gateway.conftest import Server, listening
from tests.support.fakes import FakePipeline

if TYPE_CHECKING:
    from playwright.async_api import Browser, ConsoleMessage, Page, ViewportSize

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP *.example 127.0.0.1",  # names that anybody may have pointed to this machine
)
PHONE: ViewportSize = {"width": 390, "height": 844}
SIZE = (64, 48)


@dataclass
class Seen:
    """Complaints and requests of a page.

    Attributes:
        expected: parts of messages on the console that the test provokes.
    """

    complaints: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        """Write down what the page says and asks for, from now on."""
        page.on("console", self._read)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        page.on("request", lambda request: self.urls.append(request.url))

    def _read(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def check(self, url: str) -> None:
        """Check that nothing went wrong that was not provoked, and nobody but the gateway was asked."""
        surprises = [said for said in self.complaints if not any(part in said for part in self.expected)]
        assert not surprises, surprises
        hosts = {urlsplit(asked).netloc for asked in self.urls if not asked.startswith(("data:", "blob:"))}
        assert hosts == {urlsplit(url).netloc}, hosts


class FilmPipeline(FakePipeline):
    """A pipeline that stores a video and a picture that a browser can show, 64x48."""

    async def _store(self, job: JobSpec) -> dict[str, str]:
        frames = np.zeros((9, SIZE[1], SIZE[0], 3), np.uint8)
        frames[:, :, :, 0] = np.arange(0, 225, 25, dtype=np.uint8)[:, None, None]
        path = Path(self.storage.folder).parent / f"{job.id}.mp4"
        write_mp4(frames, path, 16, {})
        outputs = {}
        for name, content in (("thumbnail.jpg", thumbnail(frames)), ("video.mp4", path)):
            key = outputs[name.partition(".")[0]] = f"{job.prefix}/{name}"
            await self.storage.put(key, content, download_name(job.id, key))
        return outputs


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """Start Chromium with an empty profile, or skip the test where there is none, with CI=true too."""
    named = os.environ.get("WAN_TEST_CHROMIUM")
    program = named or next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip(
            f"no Chromium: none of {', '.join(_NAMES)} is installed and WAN_TEST_CHROMIUM is not set "
            "(optional, with CI=true too)"
        )
    playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed (optional)")
    async with playwright.async_playwright() as started:
        browser = await started.chromium.launch(executable_path=program, args=list(_FLAGS))
        yield browser
        await browser.close()


@pytest.fixture
def films(server: Server) -> FilmPipeline:
    """Put a pipeline in place whose files a browser can show."""
    pipeline = FilmPipeline(server.storage, step_s=0.02)
    server.pipeline = server.dispatcher._runner = pipeline
    return pipeline


@pytest.fixture
async def url(server: Server, films: FilmPipeline) -> AsyncIterator[str]:
    async with listening(server.app) as url:
        yield url


@pytest.fixture
async def seen(url: str) -> AsyncIterator[Seen]:
    seen = Seen()
    yield seen
    seen.check(url)


@pytest.fixture
async def page(browser: Browser, url: str, seen: Seen) -> AsyncIterator[Page]:
    """Yield the page, opened by somebody who reads English."""
    context = await browser.new_context(locale="en-US")
    page = await context.new_page()
    seen.watch(page)
    await page.goto(url)
    yield page
    await context.close()


async def make(page: Page, prompt: str, **fields: int) -> None:
    await page.get_by_label("Describe the video").fill(prompt)
    for label, value in fields.items():
        await page.get_by_label(label).fill(str(value))
    await page.get_by_role("button", name="Make video").click()


async def status(page: Page, text: str) -> None:
    await page.locator("#state", has_text=re.compile(f"^{text}$")).wait_for()


async def video_is_shown(page: Page) -> None:
    """Wait until the video is decoded, has the size of the file, and moves."""
    await page.wait_for_function("document.querySelector('video').readyState >= 2")
    assert await page.evaluate("[player.videoWidth, player.videoHeight]") == list(SIZE)
    await page.wait_for_function("player.currentTime > 0.1")


async def picture_is_shown(page: Page, row: int = 0) -> None:
    await page.wait_for_function(f"document.querySelectorAll('#list img')[{row}]?.naturalWidth > 0")
