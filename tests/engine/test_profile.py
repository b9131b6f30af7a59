"""Profiles of a rank's steps."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from serve_app.config import validate
from serve_app.engine.messages import StepRequest
from serve_app.engine.profile import StepProfile
from serve_app.engine.rank import Rank
from serve_app.errors import ConfigError
from serve_app.request import Params
from serve_app.wan.parallel.mesh import Mesh

SMALL = {"width": 64, "height": 64, "num_frames": 5, "num_inference_steps": 3}


def test_a_rank_writes_a_table_for_every_step_and_makes_the_steps_of_one_that_does_not(tmp_path: Path) -> None:
    latents = []
    for folder in ("", str(tmp_path / "some" / "profiles")):
        config = validate({"model": {"path": "tiny"}, "denoiser": {"device": "cpu", "profile": folder}})
        rank = Rank(config, 0)
        rank.load("", 0, Mesh())
        params = Params(**{**config.defaults.model_dump(), **SMALL, "prompt": "a cat", "seed": 0})
        text = np.ones((3, int(rank.model.checkpoint.expert_config("transformer")["text_dim"])), dtype=np.float32)
        rank.admit("a/job", params, text, text)
        for _ in range(SMALL["num_inference_steps"]):
            rank.step(StepRequest(["a/job"]).to_wire())
        latents.append(rank.latents("a/job"))
    assert np.array_equal(latents[0], latents[1])
    files = sorted((tmp_path / "some" / "profiles" / "a_job").iterdir())
    assert [file.name[: len("step001-rank0-")] for file in files] == [f"step{n:03}-rank0-" for n in (1, 2, 3)]
    assert all("aten::_scaled_dot_product" in file.read_text() and file.name.endswith("s.txt") for file in files)


def test_a_step_that_fails_has_none(tmp_path: Path) -> None:
    profile = StepProfile(str(tmp_path), 0, "cpu")
    with pytest.raises(MemoryError), profile.step("job", 1):
        raise MemoryError
    assert not list(tmp_path.iterdir())
    with profile.step("job", 1):
        torch.zeros(1).add(1)
    assert len(list(tmp_path.glob("job/*.txt"))) == 1, "the one after it has"


def test_what_cannot_be_written_costs_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profile = StepProfile(str(tmp_path / "gone"), 0, "cpu")
    shutil.rmtree(tmp_path / "gone")
    with caplog.at_level(logging.WARNING), profile.step("job", 1):
        pass
    assert "profile not written" in caplog.text


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^denoiser\.profile has value '.*/file/x', expected a folder that can be"):
        StepProfile(str(tmp_path / "file" / "x"), 0, "cpu")
