from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve_app.finish.equipment import Equipment
from serve_app.finish.failure import FinishFailed, FinishStopped
from serve_app.finish.finisher import FinishedVideo, finish_video
from serve_app.finish.plan import Finish, VideoFormat
from tests.support.films import decoded, pan, psnr, texture

SOURCE = VideoFormat(128, 96, 16, 9)


def run(folder: Path, frames: list[np.ndarray], fields: dict[str, Any], **more: Any) -> FinishedVideo:
    height, width = frames[0].shape[:2]
    source = VideoFormat(width, height, 16, len(frames))
    return finish_video(iter(frames), source, Finish.model_validate(fields), folder, metadata={"model": "m"}, **more)


@pytest.mark.parametrize("first", ["interpolate", "upscale"])
def test_all_steps(tmp_path: Path, first: str) -> None:
    fields: dict[str, Any] = {"interpolate": {"fps": 32}, "upscale": 2}
    fields = {first: fields.pop(first), **fields}
    fields |= {"encode": {"preview": "webp", "stills": "jpeg"}, "label": {"mark": "AI"}}
    seen: list[tuple[str, float]] = []
    made = run(tmp_path, pan(9), fields, progress=lambda step, share: seen.append((step, share)))
    assert made.format == VideoFormat(256, 192, 32, 17)
    assert made.content_type == "video/mp4" and made.warnings == ()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["preview.webp", "stills.zip", "video.mp4"]
    assert set(made.seconds) == {"interpolate", "upscale", "encode", "label"} and all(made.seconds.values())
    for step in made.seconds:
        shares = [share for one, share in seen if one == step]
        assert shares[-1] == 1.0
    shown = list(decoded(made.path))
    small = [np.asarray(one[::2, ::2]) for one in shown]
    assert all(psnr(one, truth, 16) > 25 for one, truth in zip(small[::2], pan(9), strict=True))


def test_no_steps_write_the_video_as_it_is(tmp_path: Path) -> None:
    made = run(tmp_path, pan(3), {})
    assert made.format == VideoFormat(128, 96, 16, 3) and len(list(decoded(made.path))) == 3


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(pan(1), id="one frame"),
        pytest.param([texture(seed, 48, 64)[32:-32, 32:-32].copy() for seed in range(5)], id="a cut every frame"),
        pytest.param(pan(3, height=47, width=65), id="odd sides"),
        pytest.param(pan(2, height=3, width=3), id="3x3"),
        pytest.param([np.zeros((48, 64, 3), np.uint8)] * 3, id="all black"),
    ],
)
def test_strange_videos_are_finished(tmp_path: Path, frames: list[np.ndarray]) -> None:
    made = run(tmp_path, frames, {"interpolate": {"fps": 60}, "upscale": 2})
    assert made.format.num_frames == (len(frames) - 1) * 60 // 16 + 1 == len(list(decoded(made.path)))


@pytest.mark.parametrize(
    ("fields", "step", "message"),
    [
        ({"upscale": {"factor": 2, "model": "x"}}, "upscale", "'upscale.model' has value 'x', expected one of none"),
        ({"interpolate": {"fps": 32, "model": "x"}}, "interpolate", "'interpolate.model' has value 'x'"),
        ({"interpolate": {"fps": 8}}, "interpolate", "expected at least the video's own 16"),
        ({"label": {"c2pa": True}}, "label", "expected a certificate and a key"),
        ({"label": {"mark": "生"}}, "label", "expected characters of the font"),
    ],
)
def test_a_failure_names_its_step(tmp_path: Path, fields: dict[str, Any], step: str, message: str) -> None:
    with pytest.raises(FinishFailed) as error:
        run(tmp_path, pan(3), fields)
    assert error.value.step == step and message in error.value.message and "\n" not in str(error.value)


def test_a_folder_that_is_gone_is_a_failure_of_encode(tmp_path: Path) -> None:
    with pytest.raises(FinishFailed) as error:
        run(tmp_path / "gone", pan(3), {"interpolate": {"fps": 32}})
    assert error.value.step == "encode"


def test_an_error_within_frames_is_passed_on(tmp_path: Path) -> None:
    def frames() -> Iterator[np.ndarray]:
        yield from pan(3)
        raise RuntimeError("the decode failed")

    with pytest.raises(RuntimeError, match="the decode failed"):
        finish_video(frames(), SOURCE, Finish.model_validate({"interpolate": {"fps": 32}, "upscale": 2}), tmp_path)


def test_a_frame_of_another_size_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(FinishFailed) as error:
        run(tmp_path, [*pan(2), np.zeros((10, 10, 3), np.uint8)], {"interpolate": {"fps": 32}})
    assert error.value.step == "interpolate"


@pytest.mark.parametrize("after", [0, 3])
def test_it_stops_when_told(tmp_path: Path, after: int) -> None:
    taken = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal taken
        for frame in pan(3) * 100:
            taken += 1
            yield frame

    with pytest.raises(FinishStopped):
        finish_video(
            frames(), SOURCE, Finish.model_validate({"interpolate": {"fps": 32}}), tmp_path, stop=lambda: taken > after
        )
    assert taken <= after + 1


def test_equal_frames_give_equal_files_on_any_number_of_threads(tmp_path: Path) -> None:
    files = []
    for threads in (1, 3):
        folder = tmp_path / str(threads)
        folder.mkdir()
        made = run(folder, pan(5), {"interpolate": {"fps": 48}, "upscale": 2}, equipment=Equipment(threads=threads))
        files.append(made.path.read_bytes())
    assert files[0] == files[1]
