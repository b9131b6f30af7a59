"""Finished files in real players: ffprobe, and Chromium, which has to show the right colours."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from serve_app.finish.finisher import finish_video
from serve_app.finish.plan import Finish, VideoFormat
from tests.support.browser import browser

if TYPE_CHECKING:
    from playwright.async_api import Browser

__all__ = ["browser"]
COLOURS = [(220, 30, 35), (30, 165, 60), (35, 75, 230), (244, 244, 244), (14, 14, 14), (250, 225, 30)]
SIDE = 32
FILES: dict[str, dict[str, Any]] = {
    "h264": {"codec": "h264", "preview": "webp"},
    "h265": {"codec": "h265", "preview": "gif"},
    "av1": {"codec": "av1"},
    "webm": {"codec": "av1", "container": "webm"},
}
READ_COLOURS = """async ([url, count, side, picture]) => {
    const shown = picture ? new Image() : document.createElement("video");
    const ready = new Promise((done, failed) => {
        shown.addEventListener(picture ? "load" : "loadeddata", done);
        shown.addEventListener("error", () => failed(new Error(shown.error ? shown.error.message : "not a picture")));
    });
    shown.muted = true;
    shown.src = url;
    await ready;
    if (!picture) { await shown.play(); await new Promise(done => shown.addEventListener("ended", done)); }
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [count * side, side];
    const context = canvas.getContext("2d");
    context.drawImage(shown, 0, 0);
    return Array.from({length: count}, (_, index) =>
        Array.from(context.getImageData(index * side + side / 2, side / 2, 1, 1).data.slice(0, 3)));
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make one video of each kind, of patches of colour."""
    root = tmp_path_factory.mktemp("players")
    frame = np.concatenate([np.full((SIDE, SIDE, 3), colour, np.uint8) for colour in COLOURS], axis=1)
    source = VideoFormat(SIDE * len(COLOURS), SIDE, 16, 8)
    for name, encode in FILES.items():
        (root / name).mkdir()
        finish = Finish.model_validate({"interpolate": {"fps": 32}, "encode": encode})
        finish_video(iter([frame] * 8), source, finish, root / name, metadata={"model": "m"})
    (root / "index.html").write_text("<!doctype html><title>players</title>")
    return root


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="no ffprobe (optional, with CI=true too)")
@pytest.mark.parametrize("name", FILES)
def test_ffprobe(folder: Path, name: str) -> None:
    file = next((folder / name).glob("video.*"))
    command = ["ffprobe", "-v", "warning", "-count_frames", "-show_streams", "-show_format", "-of", "json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found = json.loads(done.stdout)
    stream, tags = found["streams"][0], {key.lower(): text for key, text in found["format"]["tags"].items()}
    colours = {stream[f"color_{key}"] for key in ("space", "transfer", "primaries")}
    assert (colours, stream["color_range"], stream["pix_fmt"]) == ({"bt709"}, "tv", "yuv420p")
    assert (stream["nb_read_frames"], stream["avg_frame_rate"]) == ("15", "32/1")
    if name != "webm":
        assert stream["codec_tag_string"] == {"h264": "avc1", "h265": "hvc1", "av1": "av01"}[name]
    assert tags["description"].startswith("AI-generated video, made by m")


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["h264/video.mp4", "av1/video.mp4", "webm/video.webm", "h264/preview.webp", "h265/preview.gif"]
)
async def test_chromium_plays_it_and_shows_the_right_colours(browser: Browser, url: str, file: str) -> None:
    page = await browser.new_page()
    await page.goto(f"{url}/index.html")
    picture = not file.split(".")[-1].startswith(("mp4", "webm"))
    shown = await page.evaluate(READ_COLOURS, [f"{url}/{file}", len(COLOURS), SIDE, picture])
    # The matrix of BT.601 would be 20 off, and a wrong range 18; Chromium's own conversion is up to 11 off.
    assert np.abs(np.array(shown) - COLOURS).max() <= 12, shown
