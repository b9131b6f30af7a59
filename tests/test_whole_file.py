from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.whole_file import check_target, whole_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    target.write_bytes(b"old")
    target.chmod(0o640)
    with whole_file(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new" and names(tmp_path) == ["out.mp4"]
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_new_one_has_the_permissions_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with whole_file(tmp_path / ("n" * 251 + ".mp4")) as file:  # as long as names may be
        file.write(b"new")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_trouble_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    target.write_bytes(b"old")
    for error in (OSError("broken"), KeyboardInterrupt()):
        with pytest.raises(type(error)), whole_file(target) as file:
            file.write(b"half")
            raise error
        assert target.read_bytes() == b"old" and names(tmp_path) == ["out.mp4"]


def test_a_link_stays_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "there" / "out.mp4")
    with whole_file(tmp_path / "link.mp4") as file:
        file.write(b"new")
    assert (tmp_path / "link.mp4").is_symlink() and (tmp_path / "there" / "out.mp4").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    check_target(tmp_path / "pipe", "--out")
    with whole_file(tmp_path / "pipe") as file:
        file.write(b"new")
    assert reader.communicate()[0] == b"new" and names(tmp_path) == ["link.mp4", "pipe", "there"]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_ends_half_way(tmp_path: Path, end: signal.Signals) -> None:
    target = tmp_path / "out.mp4"
    target.write_bytes(b"old")
    code = (
        "import sys, time; from pathlib import Path; from serve_app.whole_file import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as file: file.write(b'half'); print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, target], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None and process.stdout.readline()
    process.send_signal(end)
    process.wait(30)
    assert target.read_bytes() == b"old"
    assert end == signal.SIGKILL or names(tmp_path) == ["out.mp4"]


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "nowhere" / "out.mp4", "in a folder that is there"),
        (tmp_path / "file" / "out.mp4", "in a folder that is there"),
        (Path("/proc/out.mp4"), "can be written"),
        (tmp_path / ("n" * 300), "can be written"),
        (tmp_path / "a\0b", "can be written"),
    ):
        with pytest.raises(ConfigError, match=r"^--out has value '.*', expected a file") as error:
            check_target(path, "--out")
        assert said in str(error.value) and "\n" not in str(error.value), error.value
    check_target(tmp_path / "file", "--out")
    check_target(tmp_path / "new", "--out")
    assert names(tmp_path) == ["file"]
