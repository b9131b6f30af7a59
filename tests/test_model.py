"""What follows from a model's folder for the options, and commands on folders that are damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.app import gateway, wan
from serve_app.config import Config, validate
from serve_app.errors import ConfigError, InvalidRequest
from serve_app.model import departures, fit, open_model
from serve_app.request import parse, resolve
from serve_app.wan.weights.checkpoint import Checkpoint
from tests.support.warm_command import run


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def config(folder: Path, **args: Any) -> Config:
    return validate({"model": {"path": str(folder)}, **args})


def fitted(folder: Path, **args: Any) -> Config:
    return fit(config(folder, **args), Checkpoint(folder))


def test_the_boundary_is_that_of_request_or_options_or_folder(copy: Path) -> None:
    edit(copy / "model_index.json", boundary_ratio=0.5)
    assert fitted(copy).defaults.boundary_ratio == 0.5
    assert resolve(parse({"prompt": "a"}), fitted(copy)).boundary_ratio == 0.5
    assert resolve(parse({"prompt": "a", "boundary_ratio": 0.7}), fitted(copy)).boundary_ratio == 0.7
    assert resolve(parse({"prompt": "a", "boundary_ratio": None}), fitted(copy)).boundary_ratio == 0.5
    said = fitted(copy, defaults={"boundary_ratio": 0.6})
    assert resolve(parse({"prompt": "a"}), said).boundary_ratio == 0.6
    edit(copy / "model_index.json", boundary_ratio=None)
    assert resolve(parse({"prompt": "a"}), fitted(copy)).boundary_ratio is None
    assert resolve(parse({"prompt": "a"}), config(copy)).boundary_ratio is None  # a gateway far from the folder


def test_both_applications_have_the_options_as_the_model_has_them(copy: Path) -> None:
    edit(copy / "model_index.json", boundary_ratio=0.5)
    args = {"model": {"path": str(copy)}}
    (served, *_), (_, _, decoder, *_) = (build(args)._bound_deployment.init_args for build in (gateway, wan))
    for found in (served, decoder._bound_deployment.init_args[0]):
        assert (found.defaults.boundary_ratio, found.limits.side, found.limits.num_frames) == (0.5, 2048, 161)


def test_departures_from_the_folder_are_a_line_each(copy: Path) -> None:
    (line,) = departures(config(copy), Checkpoint(copy))
    assert line == f"{copy}/scheduler/scheduler_config.json: flow_shift is 3; defaults.flow_shift, 12, counts"
    assert not departures(fitted(copy, defaults={"flow_shift": 3}), Checkpoint(copy))
    both = departures(config(copy, defaults={"boundary_ratio": 0.9}), Checkpoint(copy))
    assert both[1] == f"{copy}/model_index.json: boundary_ratio is 0.875; defaults.boundary_ratio, 0.9, counts"
    edit(copy / "model_index.json", boundary_ratio=None)
    assert "boundary_ratio is null: transformer denoises alone" in departures(fitted(copy), Checkpoint(copy))[1]


def test_positions_bound_sides_and_frames(copy: Path) -> None:
    """The random model has 128: pixels of 16 a side, and four frames, each."""
    many = fitted(copy, limits={"pixels": 1 << 30, "num_frames": 10_001})
    resolve(parse({"prompt": "a", "width": 2048, "height": 2048, "num_frames": 509}), many)
    for fields, param, said in (
        ({"width": 2064}, "width", "'width' is 2064, expected 16 to 2048."),
        ({"height": 16400}, "height", "'height' is 16400, expected 16 to 2048."),
        ({"num_frames": 513}, "num_frames", "'num_frames' is 513, expected 4k+1 from 1 to 509."),
    ):
        with pytest.raises(InvalidRequest) as error:
            resolve(parse({"prompt": "a", **fields}), many)
        assert (error.value.param, str(error.value)) == (param, said)
    for expert in ("transformer", "transformer_2"):
        edit(copy / expert / "config.json", rope_max_seq_len=1 << 19)
    assert fitted(copy, limits={"pixels": 1 << 30}).limits.side == 16384  # the encoder's
    with pytest.raises(ConfigError, match=r"limits\.side has value 16400, expected less than or equal to 16384"):
        config(copy, limits={"side": 16400})


@pytest.mark.parametrize(("option", "value"), [("width", 4096), ("height", 4096), ("num_frames", 513)])
def test_defaults_beyond_the_positions(copy: Path, option: str, value: int) -> None:
    args = {"defaults": {"width": 16, "height": 16, option: value}, "limits": {"num_frames": 1000}}
    with pytest.raises(ConfigError, match=rf"defaults\.{option} has value {value}, expected at most \d+, the posit"):
        fitted(copy, **args)
    with pytest.raises(ConfigError, match=r"defaults: width is 4096, expected at most limits' 2048"):
        config(copy, defaults={"width": 4096, "height": 16}, limits={"side": 2048})


def test_a_damaged_folder_is_an_option_at_fault(copy: Path) -> None:
    (copy / "vae" / "config.json").write_text("")
    with pytest.raises(ConfigError, match=r"^model\.path has value '.*copy': .*/vae/config\.json: is empty") as error:
        open_model(config(copy))
    assert "\n" not in str(error.value)


def test_commands_say_it_in_one_line(copy: Path, tmp_path: Path) -> None:
    """Before any Ray: `up` too, which would start one of its own."""
    path = copy / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    args = {"model": {"path": str(copy)}, "home": str(tmp_path / "home")}
    applications = [
        {"name": name, "import_path": f"serve_app.app:{name}", "route_prefix": prefix, "args": args}
        for name, prefix in (("wan", None), ("gateway", "/"))
    ]
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"applications": applications}))
    alone = tmp_path / "gateway.yaml"
    alone.write_text(yaml.safe_dump({"applications": applications[1:]}))
    for command in (("check", file), ("prepare", copy, tmp_path / "out", "--tensor", 1), ("up", file, "--own-ray")):
        done = run(*command)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (1, 1, ""), done
        assert f"{path}: has " in done.stderr and "it was not copied completely" in done.stderr
    done = run("check", alone)
    assert done.returncode == 0, done.stderr
