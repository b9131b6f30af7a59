"""`wan-serve prepare`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from serve_app.config import validate
from serve_app.wan.weights.checkpoint import Checkpoint
from serve_app.wan.weights.sharded import MANIFEST, ShardedCheckpoint
from tests.support import warm_command

COMMAND = (sys.executable, "-m", "serve_app.cli", "prepare")


def run(*arguments: object) -> tuple[int, str, str]:
    ended = warm_command.run("prepare", *arguments, imports="serve_app.wan.weights.writer")
    return ended.returncode, ended.stdout, ended.stderr


def test_what_it_says_can_be_configured(checkpoint: Path, tmp_path: Path) -> None:
    status, said, errors = run(checkpoint, tmp_path / "out", "--tensor", 2, "--dtype", "bf16")
    assert status == 0, errors
    report, _, options = said.partition("model:\n")
    assert f"{tmp_path / 'out'}: 4 files written, 0.007 GB, 0 were there, " in report
    config = validate(yaml.safe_load("model:\n" + options))
    assert config.model.sharded_folder is not None
    assert (config.denoiser.parallel.tensor, config.model.dtype) == (2, "bfloat16")
    sharded = ShardedCheckpoint(config.model.sharded_folder, Checkpoint(config.model.folder), 2, config.model.dtype)
    sharded.check_shard("transformer_2", 1)
    status, said, errors = run(checkpoint, tmp_path / "out", "--tensor", 2, "--dtype", "bfloat16", "--verify")
    assert (status, "0 files written, 0.000 GB, 4 were there" in said) == (0, True), errors


@pytest.mark.parametrize(
    ("status", "message", "arguments"),
    [
        (1, "nowhere: is not a folder, expected a Wan2.2 checkpoint", ("nowhere", "{out}", "--tensor", 2)),
        (1, "--tensor has value 3, expected a divisor of", ("tiny", "{out}", "--tensor", 3)),
        (2, "Invalid value for '--tensor'", ("tiny", "{out}", "--tensor", 0)),
        (2, "Invalid value for '--dtype'", ("tiny", "{out}", "--tensor", 2, "--dtype", "int8")),
        (2, "Invalid value for '--expert'", ("tiny", "{out}", "--tensor", 2, "--expert", "vae")),
        (2, "Missing option '--tensor'", ("tiny", "{out}")),
        (1, "/proc/shards: No such file or directory", ("tiny", "/proc/shards", "--tensor", 2)),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, status: int, message: str, arguments: tuple[object, ...]) -> None:
    out = tmp_path / "out"
    found, _, errors = run(*(out if argument == "{out}" else argument for argument in arguments))
    assert (found, errors.count("\n")) == (status, 1) and message in errors, errors
    assert not out.exists()


def test_ctrl_c(checkpoint: Path, tmp_path: Path) -> None:
    """The interruption comes while it writes the second file, a pipe that nobody reads."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    pipe = folder / ".rank-1-of-2.safetensors.partial"
    os.mkfifo(pipe)
    arguments = (str(checkpoint), str(tmp_path), "--tensor", "2")
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not noted(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, errors) == (130, "")
    assert "interrupted; the same command goes on after the last complete file" in said
    assert {path.name for path in folder.iterdir()} - {pipe.name} == {"rank-0-of-2.safetensors"}
    pipe.unlink(missing_ok=True)  # there still if the signal came before it was opened
    status, said, errors = run(*arguments)
    assert (status, "3 files written" in said, "1 were there" in said) == (0, True, True), errors


def noted(out: Path) -> bool:
    return (out / MANIFEST).exists() and len(json.loads((out / MANIFEST).read_text())["files"]) == 1
