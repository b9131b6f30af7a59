"""`wan-serve status`: what it makes of what Serve and the replicas say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.common import ReplicaState

from serve_app.cli import status as command
from serve_app.device_memory import DeviceMemory
from serve_app.errors import ServeAppError
from serve_app.jobs.waiting import Waiting
from serve_app.launch import claim
from serve_app.launch.fleet import Replica, _replicas

GB = 1e9
NOW = 1000.0
MEMORY = DeviceMemory(
    allocated=60 * GB,
    reserved=64 * GB,
    peak=66 * GB,
    free=5 * GB,
    limit=68 * GB,
    parts={"weights": 57 * GB, "texts": 1.7 * GB, "other": 1.3 * GB},
    planned=65.4 * GB,
).plain()
QUEUE = Waiting({"interactive": 2, "batch": 40}, {"interactive": 26.0, "batch": 520.0}, 3, 19.5, 2.0)


def found() -> list[Replica]:
    def one(name: str, state: str = "RUNNING", began: float = 900.0) -> dict[str, Any]:
        return {"replica_id": name, "state": ReplicaState(state), "node_ip": "10.0.0.1", "start_time_s": began}

    applications = {
        "gateway": {"deployments": {"Gateway": {"replicas": [one("g")]}}},
        "wan": {
            "deployments": {
                "Encoder": {"replicas": [one("e")]},
                "Denoiser": {"replicas": [one("d1"), one("d2", "STARTING", 970.0)]},
                "Decoder": {"replicas": [one("v")]},
            }
        },
    }
    sample = {"id": "video_1.1", "priority": "batch", "step": 12, "steps": 40}
    group = {
        "kind": "group",
        "mesh": "guidance 2",
        "samples": [sample],
        "waiting": 1,
        "memory": [MEMORY],
        "tight": True,
    }
    board = {
        "wan/Denoiser/d1": {"at": NOW - 1, **group},
        "wan/Denoiser/gone": {"at": NOW, **group},
        "wan/Encoder/e": {"at": NOW - 60, "kind": "encoder", "memory": [MEMORY]},
    }
    return list(_replicas(applications, board, NOW))


def test_replicas_that_run_have_their_notes() -> None:
    encoder, first, second, decoder = found()
    assert [one.deployment for one in (encoder, first, second, decoder)] == [
        "Encoder",
        "Denoiser",
        "Denoiser",
        "Decoder",
    ]
    assert first.state == "running" and first.note["mesh"] == "guidance 2" and first.note_s == 1
    assert second.state == "loading" and second.seconds == 30 and second.note == {}
    assert encoder.note_s == 60 and decoder.note == {}


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    command._show(found(), QUEUE)
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in out.splitlines() if line}
    assert "running, memory short" in lines["Denoiser"] or "running, memory short" in out
    assert "101 %" in out  # of the plan, at the peak
    assert "silent for 60 s" in lines["Encoder"]
    assert "12/40" in out and "weights 57.00, texts 1.70, other 1.30" in out
    assert "loading: Denoiser d2 for 30 s on 10.0.0.1" in out
    assert lines["interactive"].split() == ["interactive", "2", "26.0"]
    assert "work waiting: 283 s" in out  # (26 + 520 + 19.5) TFLOP at half a second each, by one group


def test_for_programs() -> None:
    plain = json.loads(json.dumps(command.plain(found(), QUEUE)))
    assert plain["loading"] == ["Denoiser/d2"]
    assert plain["queue"]["seconds_waiting"] == pytest.approx(282.75)
    assert plain["queue"]["jobs"] == {"interactive": 2, "batch": 40}
    assert plain["replicas"][1]["note"]["memory"][0]["planned"] == 65.4 * GB


def test_memory_that_is_left() -> None:
    assert command._left(MEMORY) == pytest.approx(1 - 66 / 68)
    assert command._left({**MEMORY, "free": 3 * GB}) == pytest.approx(1 - 66 / 67)
    assert command._left({**MEMORY, "limit": None, "free": float("inf")}) == 1.0


def test_the_server_that_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers: list[claim.Running] = []
    monkeypatch.setattr(claim, "running", lambda: iter(servers))
    with pytest.raises(ServeAppError, match="no such server runs on this host, expected --config and --ray"):
        command._server(None, None)
    servers.append(claim.Running(["wan"], str(tmp_path / "a.yaml"), "http://x", 1, 0.0, "127.0.0.1:1"))
    assert command._server(None, None) == (tmp_path / "a.yaml", "127.0.0.1:1")
    servers.append(claim.Running(["wan"], str(tmp_path / "b.yaml"), "http://y", 2, 0.0, "127.0.0.1:2"))
    with pytest.raises(ServeAppError, match=r"several servers run on this host \(.*a\.yaml, .*b\.yaml\)"):
        command._server(None, None)
    (tmp_path / "b.yaml").touch()
    assert command._server(tmp_path / "b.yaml", None) == (tmp_path / "b.yaml", "127.0.0.1:2")
