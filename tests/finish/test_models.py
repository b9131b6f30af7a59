"""Operator's models, real files of tiny networks with weights that make them predictable."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.finish.equipment import Equipment
from serve_app.finish.failure import FinishFailed
from serve_app.finish.finisher import FinishedVideo, finish_video
from serve_app.finish.plan import Finish, VideoFormat
from serve_app.finish.torch_models import UpscalingModel, load_interpolator
from tests.support.films import decoded, pan, psnr


def run(folder: Path, fields: dict[str, Any], **files: dict[str, Path]) -> FinishedVideo:
    equipment = Equipment(threads=2, **files)  # type: ignore[arg-type]
    return finish_video(
        iter(pan(3)), VideoFormat(128, 96, 16, 3), Finish.model_validate(fields), folder, equipment=equipment
    )


class Blend(torch.nn.Module):
    def forward(self, first: torch.Tensor, second: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return first * (1 - time) + second * time


@pytest.fixture
def blend(tmp_path: Path) -> Path:
    torch.jit.save(torch.jit.script(Blend()), str(tmp_path / "blend.pt"))
    return tmp_path / "blend.pt"


def test_an_interpolation_model_makes_the_frames(tmp_path: Path, blend: Path) -> None:
    made = run(tmp_path, {"interpolate": {"fps": 48, "model": "blend"}}, interpolators={"blend": blend})
    assert made.format.num_frames == 7
    frames, shown = pan(3), list(decoded(made.path))
    assert psnr(shown[1], np.uint8(frames[0] * (2 / 3) + frames[1] * (1 / 3)), 16) > 30  # type: ignore[arg-type]
    first, second = (np.full((33, 65, 3), level, np.uint8) for level in (0, 100))
    assert [int(one[0, 0, 0]) for one in load_interpolator(blend, "cpu")(first, second, [0.25, 0.75])] == [25, 75]


@pytest.mark.parametrize("step", ["interpolate", "upscale"])
def test_bad_weights_are_a_failure_of_the_step(tmp_path: Path, step: str, request: pytest.FixtureRequest) -> None:
    if step == "upscale":
        request.getfixturevalue("spandrel")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    plans = {"interpolate": {"fps": 32, "model": "bad"}, "upscale": {"factor": 2, "model": "bad"}}
    fields = {step: plans[step]}
    files = {"interpolators" if step == "interpolate" else "upscalers": {"bad": tmp_path / "bad.pth"}}
    with pytest.raises(FinishFailed, match=r"bad\.pth cannot be read") as error:
        run(tmp_path, fields, **files)
    assert error.value.step == step


@pytest.fixture
def spandrel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import spandrel, or skip. No torchvision is made for some builds of torch, and no upscaler needs it."""
    functional = types.ModuleType("torchvision.transforms.functional")
    functional.InterpolationMode = functional.rotate = functional.normalize = None  # type: ignore[attr-defined]
    for name in ("torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    return pytest.importorskip("spandrel", reason="spandrel is not installed (optional, with CI=true too)")


@pytest.fixture
def upscaler(tmp_path: Path, spandrel: Any) -> Path:
    """Write an SRVGGNet of scale 2 whose residual is zero: it repeats each pixel, as its own base does."""
    from spandrel.architectures.Compact import Compact

    model = Compact(num_feat=8, num_conv=2, upscale=2)
    with torch.no_grad():
        for parameter in model.body[-1].parameters():
            parameter.zero_()
    torch.save(model.state_dict(), tmp_path / "compact.pth")
    return tmp_path / "compact.pth"


def test_an_upscaling_model_makes_larger_frames(tmp_path: Path, upscaler: Path) -> None:
    model = UpscalingModel(upscaler, "cpu")
    frame = np.random.default_rng(0).integers(0, 256, (400, 777, 3), np.uint8)  # several tiles, odd
    assert np.array_equal(model(frame), frame.repeat(2, axis=0).repeat(2, axis=1))
    made = run(tmp_path, {"upscale": {"factor": 2, "model": "compact"}}, upscalers={"compact": upscaler})
    assert made.format == VideoFormat(256, 192, 16, 3)
    with pytest.raises(FinishFailed, match=r"'upscale\.factor' is 4, expected at most 2"):
        run(tmp_path, {"upscale": {"factor": 4, "model": "compact"}}, upscalers={"compact": upscaler})


def test_without_the_library_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    (tmp_path / "x.pth").touch()
    with pytest.raises(FinishFailed, match="expected spandrel and a torchvision") as error:
        run(tmp_path, {"upscale": {"factor": 2, "model": "x"}}, upscalers={"x": tmp_path / "x.pth"})
    assert error.value.step == "upscale"
