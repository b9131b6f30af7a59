"""`wan-serve plan` as people call it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.cli.command import cli
from serve_app.config import load_file
from serve_app.errors import ConfigError


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    cli(["plan", *arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_a_plan_for_people(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = run(capsys, "--gpu", "h200", "--gpus", "2", "-o", str(tmp_path / "my.yaml"))
    assert "high-noise expert" in out and "28.64" in out and "CUDA context" in out and "free" in out
    assert "*  guidance 2 x sequence 1 x tensor 1  together" in out and "measured" in out
    assert f"wan-serve up {tmp_path}/my.yaml" in out
    _, config = load_file(tmp_path / "my.yaml")
    assert config.denoiser.parallel.guidance == 2
    assert (tmp_path / "my.yaml").read_text().startswith("# Made by `wan-serve")


def test_a_plan_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "--gpu", "h100-80", "--gpus", "8", "--for", "throughput", "--json"))
    assert found["gpu"]["name"] == "h100-80" and found["for"] == "throughput"
    best = found["layouts"][0]
    assert best["videos_per_hour_and_gpu"] == max(one["videos_per_hour_and_gpu"] for one in found["layouts"])
    assert {one["process"] for one in found["memory"]} == {"rank", "encoder", "decoder"}
    assert "applications:" in found["yaml"]


def test_the_estimate_that_circulates(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "--gpu", "a100-80", "--explain")
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert " 28 " in lines["weights of the transformers"] and " 57.3 " in lines["weights of the transformers"]
    assert " - " in lines["text encoder"] and " 11.9 " in lines["text encoder"]
    assert "36-46" in lines["together"]


def test_a_file_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "--gpu", "h100-80", "--gpus", "2", "--config", "a14b-2xh200")
    assert "denoiser.memory_fraction has value 0.6, 47.8 GiB of a GPU (H100 80 GB), expected" in out
    assert "fits on this GPU as it is" in run(capsys, "--gpu", "h200", "--gpus", "2", "--config", "a14b-2xh200")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h200", "--for", "speed"], "--for has value 'speed', expected 'latency' or 'throughput'"),
        (["--gpu", "h200", "--size", "720p"], "--size has value '720p', expected WIDTHxHEIGHT"),
        (["--gpu", "h200", "--frames", "80"], "--frames has value 80, expected a multiple of 4 and 1 more"),
        (["--gpu", "h2000"], "--gpu has value 'h2000', did you mean 'h200'"),
        (["--gpu", "h200", "-o", "/"], "--output has value '/', expected a file"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        cli(["plan", *arguments], standalone_mode=False)
    assert str(raised.value).startswith(said)


def test_neither_torch_nor_ray_is_imported() -> None:
    code = (
        "import sys; from serve_app.cli.command import cli;"
        "cli(['plan', '--gpu', 'h100', '--gpus', '2'], standalone_mode=False);"
        "print(sorted({'torch', 'ray', 'diffusers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
