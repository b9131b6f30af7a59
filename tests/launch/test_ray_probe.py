"""The search for a Ray where none can be joined. Tests with a Ray are in tests/launch/test_ray_life.py."""

from __future__ import annotations

import socket
import time

import pytest

from serve_app.errors import ConfigError, ServeAppError
from serve_app.launch import ray_probe


@pytest.fixture(autouse=True)
def _no_ray(tmp_path, monkeypatch):
    """Hide every Ray that runs on this machine."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray_probe, "_raylets", list)


def find(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    said = []
    found = ray_probe.find(said.append)
    return found, said


@pytest.mark.parametrize(
    "address",
    ["ray://127.0.0.1:10001", "http://127.0.0.1:8265", "foo", "foo:bar", ":6379", "127.0.0.1:", "127.0.0.1:99999"],
)
def test_nonsense_is_refused(monkeypatch, address):
    with pytest.raises(ConfigError, match="RAY_ADDRESS has value") as refused:
        find(monkeypatch, address)
    assert repr(address) in str(refused.value) and "\n" not in str(refused.value)


def test_a_wish_that_nobody_answers_is_not_replaced_by_another_ray(monkeypatch):
    with socket.socket() as taken:  # bound, but it does not listen
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServeAppError, match="nothing answers") as refused:
            find(monkeypatch, address)
    assert f"RAY_ADDRESS={address}" in str(refused.value)
    with pytest.raises(ConfigError, match="'auto', expected a Ray that runs on this machine"):
        find(monkeypatch, "auto")


def test_what_listens_and_never_answers_is_given_up_within_seconds(monkeypatch):
    """The server hangs, as a control process may."""
    monkeypatch.setattr(ray_probe, "_ANSWER_S", 0.5)
    monkeypatch.setattr(ray_probe, "_SETTLE_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        began = time.monotonic()
        with pytest.raises(ServeAppError, match=r"ray stop|nothing answers"):
            find(monkeypatch, f"127.0.0.1:{mute.getsockname()[1]}")
    assert time.monotonic() - began < 30


def test_what_speaks_something_else_is_no_ray(monkeypatch):
    """Another program, such as Redis, listens on the port that `ray start` takes by default."""
    with pytest.raises(ServeAppError, match="nothing answers"):
        find(monkeypatch, "127.0.0.1:5432")


def test_without_a_wish_or_a_trace_there_is_none(monkeypatch):
    assert find(monkeypatch, "") == (None, [])
    assert find(monkeypatch, "local") == (None, [])


def test_the_stale_address_of_a_ray_that_has_ended_is_said_and_passed_over(monkeypatch, tmp_path):
    (tmp_path / "ray").mkdir()
    for file in (tmp_path / "ray" / "ray_current_cluster", tmp_path / "ray_current_cluster"):
        file.write_text("127.0.0.1:1")
    found, said = find(monkeypatch, "")
    assert found is None and len(said) == 1 and "127.0.0.1:1" in said[0] and "ray stop" in said[0]
