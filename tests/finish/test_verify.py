from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve_app.finish.equipment import Equipment
from serve_app.finish.finisher import finish_video
from serve_app.finish.label import AI_MADE
from serve_app.finish.plan import Finish, VideoFormat
from serve_app.finish.verify import verify
from serve_app.wan.video import write_mp4
from tests.support.films import certificates, decoded, pan

METADATA = {"id": "video_1", "model": "Wan-test", "revision": "r1", "prompt": "红 “x” & <y>"}
FRAMES = pan(3, height=48, width=64)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    return certificates(tmp_path_factory.mktemp("keys"))


def make(folder: Path, equipment: Equipment | None = None, **fields: Any) -> Path:
    finish = Finish.model_validate(fields or {"encode": {}})
    made = finish_video(
        iter(FRAMES), VideoFormat(64, 48, 16, 3), finish, folder, metadata=METADATA, equipment=equipment
    )
    return made.path


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_by_default_the_metadata_say_it(tmp_path: Path, container: str) -> None:
    codec = {"mp4": "h264", "webm": "av1"}[container]
    found = verify(make(tmp_path, encode={"codec": codec, "container": container}))
    assert found.ai_made and not found.changed and found.c2pa is None
    assert found.parameters == METADATA
    assert found.description.startswith("AI-generated video, made by Wan-test, served by serve_app ")
    assert found.xmp.get("Iptc4xmpExt:DigitalSourceType") == (AI_MADE if container == "mp4" else None)


def test_it_can_be_left_out(tmp_path: Path) -> None:
    found = verify(make(tmp_path, label={"metadata": False}))
    assert not found.ai_made and found.description == "" and found.xmp == {}


def test_the_plain_file_says_it_too(tmp_path: Path) -> None:
    import numpy as np

    write_mp4(np.stack(FRAMES), tmp_path / "plain.mp4", 16, METADATA)
    found = verify(tmp_path / "plain.mp4")
    assert found.ai_made and found.parameters == METADATA


@pytest.mark.parametrize("codec", ["h264", "h265", "av1"])
def test_a_signed_file(tmp_path: Path, keys: tuple[Path, Path, Path], codec: str) -> None:
    chain, key, anchors = keys
    equipment = Equipment(certificate=chain, private_key=key)
    path = make(tmp_path, equipment, encode={"codec": codec, "preview": "webp"})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["preview.webp", "video.mp4"]
    for file in (path, tmp_path / "preview.webp"):
        found = verify(file)
        assert found.c2pa is not None and found.ai_made and not found.changed
        assert (found.c2pa["state"], found.c2pa["signer"]) == ("valid", "Test Signer")
        assert found.c2pa["source_type"] == AI_MADE and found.c2pa["generator"].startswith("serve_app ")
        trusted = verify(file, anchors)
        assert trusted.c2pa is not None and (trusted.c2pa["state"], trusted.c2pa["problems"]) == ("trusted", [])
    assert len(list(decoded(path))) == 3
    assert verify(path).xmp["Iptc4xmpExt:DigitalSourceType"] == AI_MADE


def test_a_changed_file_is_found_out(tmp_path: Path, keys: tuple[Path, Path, Path]) -> None:
    path = make(tmp_path, Equipment(certificate=keys[0], private_key=keys[1]))
    content = bytearray(path.read_bytes())
    content[content.index(b"mdat") + 40] ^= 1
    path.write_bytes(content)
    found = verify(path, keys[2])
    assert found.changed and found.c2pa is not None and found.c2pa["state"] == "invalid"
    assert any("hash" in problem for problem in found.c2pa["problems"])


def run(*arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "serve_app.cli", "verify", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_the_command(tmp_path: Path, keys: tuple[Path, Path, Path]) -> None:
    path = make(tmp_path, Equipment(certificate=keys[0], private_key=keys[1]))
    status, said, _ = run(path, "--trust", keys[2])
    assert status == 0
    assert "AI-made     yes, by its description, XMP, C2PA manifest\n" in said
    assert "trusted: unchanged since it was signed" in said and "prompt: 红 “x” & <y>" in said
    status, said, _ = run(path, "--json")
    assert status == 0 and json.loads(said)["c2pa"]["state"] == "valid"


def test_the_command_on_files_that_say_nothing(tmp_path: Path) -> None:
    silent = make(tmp_path, label={"metadata": False})
    status, said, _ = run(silent)
    assert status == 1 and "the file does not say so" in said
    (tmp_path / "text.mp4").write_text("hello")
    assert run(tmp_path / "text.mp4")[2].count("\n") == 1
    for path, message in ((tmp_path / "text.mp4", "is no video"), (tmp_path / "none.mp4", "No such file")):
        with pytest.raises((ValueError, OSError), match=message):
            verify(path)
