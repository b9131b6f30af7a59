"""States in storage: the newest stays, and failures cost no job anything."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from serve_app.engine.saver import Saver, latest_state
from serve_app.storage import Storage


def wait(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def states(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.glob("samples/a/*.safetensors"))


async def test_a_newer_state_replaces_the_older_and_is_found(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    saver = Saver(storage)
    assert await latest_state(storage, "samples/a") is None
    for step in (3, 12):
        saver.save("samples/a", step, lambda step=step: str(step).encode())
        wait(lambda: not saver._busy)  # the file is there a little sooner, and what comes until then is left out
        assert states(tmp_path) == [f"{step:05d}"]
    assert await latest_state(storage, "samples/a") == b"12"


async def test_the_furthest_is_found_among_what_several_processes_left(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for name in ("00009-aa", "00100-bb", "00020-cc"):
        await storage.put(f"samples/a/{name}.safetensors", name.encode())
    await storage.put("samples/a/notes.txt", b"something else")
    assert await latest_state(storage, "samples/a") == b"00100-bb"


async def test_one_that_was_denoised_again_from_an_older_state_does_not_remove_a_newer(tmp_path: Path) -> None:
    """A group that was wrongly presumed dead may still save; the state with more steps stays."""
    storage = Storage(str(tmp_path))
    await storage.put("samples/a/00030-aa.safetensors", b"30")
    Saver(storage).save("samples/a", 10, lambda: b"10")
    wait(lambda: states(tmp_path) == ["00010", "00030"])
    assert await latest_state(storage, "samples/a") == b"30"


async def test_one_save_at_a_time_and_saving_waits_for_nobody(tmp_path: Path) -> None:
    saver, go, waited = Saver(Storage(str(tmp_path))), threading.Event(), threading.Event()

    def slow() -> bytes:
        go.wait(60)
        waited.set()
        return b"1"

    saver.save("samples/a", 1, slow)
    saver.save("samples/a", 2, lambda: b"2")  # left out: the first is still being written
    assert not waited.is_set()
    go.set()
    wait(lambda: not saver._busy)
    assert states(tmp_path) == ["00001"]
    saver.save("samples/a", 3, lambda: b"3")
    wait(lambda: states(tmp_path) == ["00003"])


async def test_a_state_that_cannot_be_written_is_forgotten_and_the_next_is_saved(tmp_path: Path) -> None:
    saver = Saver(Storage(str(tmp_path)))
    (tmp_path / "samples").write_text("a file where a folder should be")
    saver.save("samples/a", 1, lambda: b"1")
    saver.save("samples/b", 1, lambda: (_ for _ in ()).throw(RuntimeError("no bytes")))
    wait(lambda: not saver._busy)
    (tmp_path / "samples").unlink()
    saver.save("samples/a", 2, lambda: b"2")
    wait(lambda: states(tmp_path) == ["00002"])
