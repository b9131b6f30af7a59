"""Notes of replicas, on a board that is a mapping."""

from __future__ import annotations

import gc
import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.stages import status_board
from serve_app.stages.status_board import StatusBoard, key_of, read_board


class Board(dict[str, bytes]):
    """A board that tells when something is put on it."""

    def __init__(self) -> None:
        super().__init__()
        self.put = threading.Event()

    def put_note(self, key: str, value: bytes) -> None:
        self[key] = value
        self.put.set()


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    """A board, and a replica of `wan` called `r1` that puts its notes on it."""
    made = Board()
    deployment = SimpleNamespace(app_name="wan", name="Decoder")
    context = SimpleNamespace(replica_id=SimpleNamespace(deployment_id=deployment, unique_id="r1"))
    monkeypatch.setattr(status_board.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(status_board, "put_note", made.put_note)
    monkeypatch.setattr(status_board, "notes", lambda: dict(made))
    monkeypatch.setattr(status_board, "remove_note", made.pop)
    return made


class Stage:
    def __init__(self) -> None:
        self.videos = 0
        self.board = StatusBoard(self.status, period_s=0.01)

    def status(self) -> dict[str, Any]:
        self.videos += 1
        if self.videos == 2:
            raise RuntimeError("not now")
        return {"videos": self.videos}


def test_a_replica_tells_again_and_again_whatever_goes_wrong(board: Board) -> None:
    stage = Stage()
    while stage.videos < 4:
        board.put.clear()
        assert board.put.wait(60)
    note = read_board()[key_of("wan", "Decoder", "r1")]
    assert note["videos"] >= 3 and note["at"] > 0


def test_it_ends_with_its_replica(board: Board) -> None:
    def threads() -> list[threading.Thread]:
        return [one for one in threading.enumerate() if one.name == "status"]

    before = threads()
    stage = Stage()
    assert board.put.wait(60)
    (mine,) = [one for one in threads() if one not in before]
    del stage
    gc.collect()
    mine.join(60)
    assert not mine.is_alive()


def test_old_notes_are_removed(board: Board) -> None:
    board["wan/Decoder/old"] = json.dumps({"at": 1.0}).encode()
    assert read_board() == {} and dict(board) == {}


def test_nothing_is_told_outside_of_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_board, "put_note", lambda *_: pytest.fail("told"))
    assert Stage().videos == 0
