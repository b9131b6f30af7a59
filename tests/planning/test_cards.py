"""GPUs by name, and those that the driver lists."""

from __future__ import annotations

import pytest

from serve_app.errors import ConfigError
from serve_app.planning import cards
from serve_app.planning.cards import CARDS, card, listed


@pytest.mark.parametrize(
    ("name", "found"),
    [("h100", "h100-80"), ("H100-80", "h100-80"), ("a100", "a100-80"), ("RTX 4090", "rtx-4090"), ("b200", "b200")],
)
def test_names(name: str, found: str) -> None:
    assert card(name) is CARDS[found]


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"--gpu has value 'h20', did you mean 'h200'\?"):
        card("h20")
    with pytest.raises(ConfigError, match=r"--gpu has value 'tpu', expected one of a100-40, .*b200, here"):
        card("tpu")


def test_this_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "_SMI", ("/nowhere/nvidia-smi",))
    with pytest.raises(
        ConfigError, match=r"--gpu has value 'here', expected one of .*: this machine has no NVIDIA GPU"
    ):
        card("here")


def test_what_the_driver_lists() -> None:
    said = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA H200, 143771\nNVIDIA A100-SXM4-40GB, 40960\nTesla T4, 15360\n\n"
    h100, h200, a100, unknown = listed(said)
    assert (h100.name, h200.name, a100.name) == ("h100-80", "h200", "a100-40")
    assert h100 == CARDS["h100-80"]
    assert unknown.fallback and unknown.label == "Tesla T4" and unknown.memory_bytes == 15360 * 2**20
    (part,) = listed("NVIDIA H200 MIG 1g.18gb, 16384")
    assert part.name == "h200" and part.memory_bytes == 16384 * 2**20


def test_the_smallest_card_of_a_machine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "this_machine", lambda: listed("NVIDIA H200, 143771\nNVIDIA H100 80GB HBM3, 81559"))
    assert card("here").name == "h100-80"
