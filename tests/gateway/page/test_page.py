"""The web page in a real browser, against the application on a real socket."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.conftest import Server, listening
from tests.support.browser import (
    PHONE,
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

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

__all__ = ["browser", "films", "page", "seen", "url"]

pytestmark = pytest.mark.slow  # minutes of a browser
MARKUP = """<b>粗体</b> & "引号" 'x' <img src=x onerror="window.hacked=1"><script>window.hacked=1</script>"""


async def test_a_video_from_a_prompt(page: Page, server: Server, films: FilmPipeline) -> None:
    films.gate = asyncio.Event()
    await make(page, "a red circle", Steps=8, Seed=7)
    await status(page, "Running")
    await page.locator("#detail", has_text="denoising 3/8").wait_for()
    assert 0 < await page.evaluate("bar.value") < 100
    assert await page.title() == f"{await page.evaluate('bar.value')} % · Text to video"
    films.gate.set()
    await status(page, "Done")
    await video_is_shown(page)
    await picture_is_shown(page)
    assert "seed 7" in (await page.locator("#facts").text_content() or "").lower()
    assert not await page.get_by_role("button", name="Cancel").is_visible()
    job = (await server.store.list())[0][0]
    assert (job.params["seed"], job.params["num_inference_steps"], job.params["width"]) == (7, 8, 128)
    async with page.expect_download() as started:
        await page.get_by_role("link", name="Download").click()
    download = await started.value
    assert download.suggested_filename == f"{job.id}.mp4"
    assert (await asyncio.to_thread(Path(await download.path()).read_bytes))[4:8] == b"ftyp"


async def test_what_the_model_draws_is_said_beside_the_prompt_and_what_it_does_not_beside_the_video(page: Page) -> None:
    await page.locator("#note", has_text="circles, squares, triangles and stars").wait_for()
    await make(page, "a cat")
    await page.locator("#warnings", has_text="none of the shapes").wait_for()
    await status(page, "Done")
    await page.locator("#warnings", has_text="The prompt is short.").wait_for()


async def test_markup_in_a_prompt_is_text(page: Page) -> None:
    await make(page, MARKUP)
    await status(page, "Done")
    row = page.locator("#list .prompt")
    assert await row.text_content() == MARKUP and await row.get_attribute("title") == MARKUP
    assert MARKUP in (await page.locator("#facts").text_content() or "")
    assert await page.locator("#list b, #facts b, #list script").count() == 0
    await page.reload()
    await picture_is_shown(page)
    assert await row.text_content() == MARKUP
    assert await page.evaluate("window.hacked") is None


@pytest.mark.parametrize("address", ["#video_x'\"><img src=x onerror=window.hacked=1>", "#video_../models", "#<b>"])
async def test_an_address_that_names_no_video(page: Page, seen: Seen, url: str, address: str) -> None:
    await page.goto(f"{url}/{address}")
    await page.reload()
    await make(page, "after")
    await status(page, "Done")
    assert await page.evaluate("window.hacked") is None


async def test_a_video_that_is_not_there(page: Page, seen: Seen, url: str) -> None:
    seen.expected.append("status of 404")
    await page.goto(f"{url}/#video_0123")
    await page.get_by_role("alert").filter(has_text="There is no video 'video_0123'.").wait_for()
    assert not await page.locator("#current").is_visible()


async def test_bad_input_shows_what_the_api_says(page: Page, seen: Seen, server: Server) -> None:
    seen.expected.append("status of 400")
    alert = page.locator("#error")
    await make(page, "a cat", Width=1024, Height=1024)
    await alert.filter(has_text="'size' 1024x1024 is 1048576 pixels, expected at most 147456").wait_for()
    await make(page, "   ", Width=64, Height=64)
    await alert.filter(has_text="'prompt' is empty, expected a description of the video.").wait_for()
    prompt = page.get_by_label("Describe the video")
    assert await prompt.get_attribute("aria-invalid") == "true"
    assert await prompt.evaluate("node => node === document.activeElement")
    assert (await server.store.list())[0] == []
    await make(page, "a cat")
    await status(page, "Done")
    assert await alert.text_content() == "" and await prompt.get_attribute("aria-invalid") is None


async def test_a_full_queue(page: Page, seen: Seen, server: Server, films: FilmPipeline) -> None:
    seen.expected.append("status of 429")
    films.gate = asyncio.Event()
    for _ in range(server.config.dispatcher.running_jobs + server.config.limits.queued_jobs):
        await server.create()
    await make(page, "one too many")
    await page.locator("#error", has_text="wait").wait_for()
    assert len((await server.store.list(limit=100))[0]) == 38
    films.gate.set()


async def test_the_queue_and_cancel(page: Page, server: Server, films: FilmPipeline) -> None:
    films.gate = asyncio.Event()
    for _ in range(server.config.dispatcher.running_jobs):
        await server.create()
    await make(page, "first in the queue")
    await status(page, "Waiting")
    await page.locator("#detail", has_text="place in queue 1").wait_for()
    cancel = page.get_by_role("button", name="Cancel")
    await cancel.click()
    await status(page, "Cancelled")
    assert not await cancel.is_visible() and (await page.title()).startswith("Cancelled")
    await page.locator("#list li", has_text="first in the queue").locator("small", has_text="Cancelled").wait_for()
    await server.store.pause()
    await make(page, "second in the queue")
    await status(page, "Paused by the operator")
    await page.locator("#detail", has_text="place in queue 1").wait_for()
    assert "left" not in (await page.locator("#detail").text_content() or "")
    await page.locator("#list li", has_text="second in the queue").locator("small", has_text="Paused").wait_for()
    await server.store.resume()
    await status(page, "Waiting")
    films.gate.set()
    # The other videos were created elsewhere; the page shows their ends nevertheless.
    await page.locator("#list small", has_text="Done").nth(7).wait_for()


async def test_delete(page: Page, server: Server) -> None:
    await make(page, "mine")
    await status(page, "Done")
    delete = page.get_by_role("button", name="Delete: mine")
    asked = []

    async def answer(dialog: Any) -> None:
        asked.append(dialog.message)
        await (dialog.accept() if len(asked) > 1 else dialog.dismiss())

    page.on("dialog", answer)
    await delete.click()
    assert (await server.store.list())[0] != []
    await delete.click()
    await page.locator("#list li").wait_for(state="detached")
    assert asked == ["Delete this video for good?\n\nmine"] * 2
    assert (await server.store.list())[0] == []
    assert not await page.locator("#current").is_visible() and await page.evaluate("location.hash") == ""


async def test_a_failure_is_explained(page: Page, films: FilmPipeline) -> None:
    from serve_app.errors import JobFailed

    films.errors = [JobFailed("too_large", "It cannot fit.")]
    await make(page, "huge")
    await status(page, "Failed")
    assert await page.locator("#detail").text_content() == "It cannot fit."


async def test_a_reload_keeps_what_is_made_and_what_was_typed(page: Page, films: FilmPipeline) -> None:
    films.gate = asyncio.Event()
    await make(page, "the first", Steps=8)
    await status(page, "Running")
    await page.get_by_label("Describe the video").fill("a draft")
    await page.reload()
    await status(page, "Running")
    assert await page.get_by_label("Describe the video").input_value() == "a draft"
    assert await page.get_by_label("Steps").input_value() == "8"
    films.gate.set()
    await status(page, "Done")
    await page.reload()
    await status(page, "Done")
    await video_is_shown(page)
    await make(page, "the second")
    await page.locator("#facts", has_text="the second").wait_for()
    await status(page, "Done")
    await page.go_back()
    await page.locator("#facts", has_text="the first").wait_for()
    await video_is_shown(page)
    await page.get_by_role("button", name="Use these settings").click()
    assert await page.get_by_label("Describe the video").input_value() == "the first"


async def test_the_keyboard_is_enough(page: Page) -> None:
    await page.keyboard.type("by keyboard")  # the prompt has the focus
    await page.keyboard.press("Control+Enter")
    await status(page, "Done")
    await picture_is_shown(page)
    await make(page, "another")
    await page.locator("#facts", has_text="another").wait_for()
    link = page.get_by_role("link", name="by keyboard")
    for _ in range(30):
        if await link.evaluate("node => node === document.activeElement"):
            break
        await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await page.locator("#facts", has_text="by keyboard").wait_for()
    assert await link.get_attribute("aria-current") == "true"


async def test_everything_has_a_name(page: Page) -> None:
    await make(page, "a cat")
    await status(page, "Done")
    await picture_is_shown(page)
    unnamed = await page.evaluate(
        """[...document.querySelectorAll("button, input, textarea, a, progress, video")]
           .filter((node) => !(node.ariaLabel || node.textContent.trim() || node.labels?.[0]?.textContent.trim()))
           .map((node) => node.outerHTML)"""
    )
    assert unnamed == []
    assert await page.evaluate("document.documentElement.lang") == "en"


async def test_in_chinese(browser: Browser, url: str, seen: Seen) -> None:
    context = await browser.new_context(locale="zh-CN")
    page = await context.new_page()
    seen.watch(page)
    await page.goto(url)
    await page.get_by_label("描述视频内容").fill("一只猫")
    await page.get_by_role("button", name="生成视频").click()
    await status(page, "完成")
    assert await page.evaluate("[document.documentElement.lang, document.title]") == ["zh", "完成 · 文字生成视频"]
    await context.close()


async def test_on_a_phone(browser: Browser, url: str, seen: Seen, server: Server) -> None:
    await server.completed(prompt="W" * 400)
    await server.completed(prompt="一" * 400)
    context = await browser.new_context(locale="en-US", viewport=PHONE, has_touch=True, is_mobile=True)
    page = await context.new_page()
    seen.watch(page)
    await page.goto(url)
    await picture_is_shown(page, 1)

    async def fits() -> None:
        wide = await page.evaluate(
            """[...document.querySelectorAll("body *")]
               .filter((node) => node.getBoundingClientRect().right > innerWidth + 1 && !node.closest(".prompt"))
               .map((node) => node.outerHTML.slice(0, 99))"""
        )
        assert wide == [] and await page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        small = await page.evaluate(
            """[...document.querySelectorAll("button, a")].map((node) => node.getBoundingClientRect())
               .filter((box) => box.width && (box.width < 24 || box.height < 24)).length"""
        )
        assert small == 0  # WCAG 2.2, 2.5.8
        assert (
            await page.evaluate("getComputedStyle(document.querySelector('textarea')).fontSize") == "16px"
        )  # below, phones zoom in

    await page.locator("#list a").last.tap()
    await status(page, "Done")
    await video_is_shown(page)
    await fits()
    await page.get_by_role("button", name="Use these settings").tap()
    await fits()
    await context.close()


async def test_a_gateway_that_goes_and_comes_back(browser: Browser, server: Server, films: FilmPipeline) -> None:
    seen = Seen()
    seen.expected.extend(["ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE"])
    films.gate = asyncio.Event()
    context = await browser.new_context(locale="en-US")
    page = await context.new_page()
    async with listening(server.app) as url:
        port = int(url.rpartition(":")[2])
        seen.watch(page)
        await page.goto(url)
        await make(page, "patient")
        await status(page, "Running")
    away = page.locator("#away", has_text="does not answer")
    await away.wait_for()
    await make(page, "sent into the void")
    await page.locator("#error", has_text="does not answer").wait_for()
    films.gate.set()
    await asyncio.sleep(1)
    async with listening(server.app, port):
        await status(page, "Done")
        await away.wait_for(state="detached")
        await video_is_shown(page)
        await page.get_by_role("button", name="Make video").click()
        await page.locator("#facts", has_text="sent into the void").wait_for()
        await status(page, "Done")
        assert await page.locator("#error").text_content() == ""
        assert len((await server.store.list())[0]) == 2
        seen.check(url)
        await context.close()


async def test_a_create_whose_answer_was_lost_makes_one_video(page: Page, seen: Seen, server: Server) -> None:
    seen.expected.append("net::ERR_FAILED")

    async def lose(route: Any) -> None:
        await route.fetch()
        await route.abort()

    await page.route("**/v1/videos", lambda route: lose(route) if route.request.method == "POST" else route.continue_())
    await make(page, "once")
    await page.locator("#error", has_text="does not answer").wait_for()
    await page.unroute("**/v1/videos")
    await page.get_by_role("button", name="Make video").click()
    await status(page, "Done")
    assert len((await server.store.list())[0]) == 1
    await page.get_by_role("button", name="Make video").click()  # meant: another seed
    await page.locator("#list li").nth(1).wait_for()
    assert len((await server.store.list())[0]) == 2
