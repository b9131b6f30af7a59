"""Plans: every layout fits, the best one is picked, and its file is one that `up` takes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import get_args

import pytest
import yaml

from benchmarks.model import dummy_checkpoint
from serve_app.config import load_file
from serve_app.errors import ConfigError
from serve_app.planning import plan_file
from serve_app.planning.cards import CARDS
from serve_app.planning.layout import Aim, Layout, Wish
from serve_app.planning.layouts import FREE
from serve_app.planning.memory import Size
from serve_app.planning.model_shape import ModelShape
from serve_app.planning.plan import Plan
from serve_app.planning.shortfall import shortfalls
from serve_app.wan.weights.checkpoint import Checkpoint

MODEL = ModelShape.published()
AT_480P, AT_720P = Size(832, 480, 81), Size(1280, 720, 81)
FLEETS = [
    ("rtx-4090", 1, 1, AT_480P),
    ("rtx-5090", 1, 1, AT_480P),
    ("l40s", 4, 1, AT_480P),
    ("a100-40", 4, 2, AT_720P),
    ("a100-80", 1, 1, AT_720P),
    ("h100-80", 8, 1, AT_720P),
    ("h100-80", 2, 3, Size(1280, 720, 121)),
    ("h200", 1, 1, AT_720P),
    ("b200", 8, 2, AT_720P),
]


@lru_cache
def planned(card: str, gpus: int, hosts: int, size: Size, aim: Aim = "latency", path: str = "") -> Plan:
    args = {"model": {"path": path}} if path else {}
    return Plan.of(Wish(CARDS[card], gpus, hosts, size, aim, MODEL, args))


def shares(layout: Layout) -> float:
    """Share of the fullest GPU's memory that processes may take."""
    config, alone = layout.config, layout.wish.gpus * layout.wish.hosts == 1
    encoder = 0.0 if config.encoder.device == "cpu" else config.encoder.memory_fraction
    decoder = config.decoder.memory_fraction
    meet = alone or config.decoder.devices > 1
    return config.denoiser.memory_fraction + (encoder + decoder if meet else max(encoder, decoder))


@pytest.mark.parametrize(("card", "gpus", "hosts", "size"), FLEETS)
def test_all_layouts_fit_and_leave_a_tenth(card: str, gpus: int, hosts: int, size: Size) -> None:
    plan = planned(card, gpus, hosts, size)
    total = CARDS[card].memory_bytes
    for layout in plan.layouts:
        assert shares(layout) <= 1 - FREE + 1e-9
        assert layout.groups * layout.mesh.ranks == gpus * hosts and not layout.crosses
        for need in (layout.rank, layout.encoder, layout.decoder):
            assert need.total <= need.fraction * total or not need.gpus
        assert shortfalls(layout.config, MODEL, CARDS[card]) == []
    assert all(one.missing > 0 for one in plan.rejected)


@pytest.mark.parametrize(("card", "gpus", "hosts", "size"), FLEETS)
def test_the_file_is_one_that_up_takes(card: str, gpus: int, hosts: int, size: Size, tmp_path: Path) -> None:
    for aim in get_args(Aim):
        plan = planned(card, gpus, hosts, size, aim)
        path = tmp_path / f"{aim}.yaml"
        path.write_text(plan_file.write(plan, "wan-serve plan"))
        _, config = load_file(path)
        expected = plan.pick.config
        for section in ("encoder", "denoiser", "decoder", "limits", "defaults"):
            assert getattr(config, section) == getattr(expected, section)
        assert f"{plan.pick.seconds.total:.0f} s for a video" in path.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dummy_checkpoint.write(tmp_path_factory.mktemp("dummy") / "a14b")


def test_check_takes_the_files(folder: Path, tmp_path: Path) -> None:
    """With weights of the real shapes, whose files are holes."""
    from serve_app.launch.targets import build

    for card, gpus, hosts, size in FLEETS[:: len(FLEETS) // 3]:
        path = tmp_path / "plan.yaml"
        path.write_text(plan_file.write(planned(card, gpus, hosts, size, path=str(folder)), "wan-serve plan"))
        content, config = load_file(path)
        assert build(path, content, config).gateways == ["/"]


def test_the_published_shape_is_that_of_the_files(folder: Path) -> None:
    model = ModelShape.of(Checkpoint(folder))
    assert model.is_a14b and model.text.tensors() == MODEL.text.tensors()
    for tensor in (1, 2):
        assert model.expert_bytes(1, 2, tensor) == MODEL.expert_bytes(1, 2, tensor)
    assert model.text_encoder_bytes(2) == MODEL.text_encoder_bytes(2)
    assert model.vae_bytes(4) == MODEL.vae_bytes(4)


def test_the_aim_decides() -> None:
    fast, many = (planned("h100-80", 8, 1, AT_720P, aim) for aim in ("latency", "throughput"))
    assert fast.pick.mesh.ranks == 8 and fast.pick.groups == 1
    assert many.pick.groups >= 4
    assert fast.pick.seconds.total == min(one.seconds.total for one in fast.layouts)
    assert many.pick.per_gpu == max(one.per_gpu for one in many.layouts)
    assert fast.pick.seconds.total < many.pick.seconds.total and fast.pick.per_gpu < many.pick.per_gpu


def test_a_measured_time_is_said_to_be() -> None:
    plan = planned("h200", 2, 1, AT_720P)
    assert plan.pick.seconds.basis == "measured" and "The time is measured." in plan.reasons()
    assert plan.pick.seconds.total == pytest.approx(379.27)
    assert "The time is estimated." in planned("a100-80", 2, 1, AT_720P).reasons()


def test_groups_cross_hosts_only_where_none_fits_on_one() -> None:
    assert not any(layout.crosses for layout in planned("h100-80", 1, 2, AT_720P).layouts)
    plan = planned("rtx-4090", 1, 2, Size(1280, 720, 241))
    assert plan.pick.crosses and plan.pick.mesh.ranks == 2
    assert plan.pick.config.denoiser.placement == "PACK"
    assert any("spans hosts" in line for line in plan.reasons())


def test_what_does_not_fit_is_told_with_what_is_missing() -> None:
    plan = planned("h100-80", 1, 1, Size(1280, 720, 241))
    lacking = [one for one in plan.rejected if one.experts == "together"]
    assert lacking and all(0 < one.missing < 30e9 and "GB missing on a GPU" in str(one) for one in lacking)
    with pytest.raises(
        ConfigError, match=r"--gpu has value 'rtx-4090' with --gpus 1, expected more memory .* GB missing"
    ):
        planned("rtx-4090", 1, 1, Size(1920, 1088, 161))


def test_the_memory_of_the_fullest_gpu_adds_up() -> None:
    for card, gpus, hosts, size in FLEETS:
        parts = planned(card, gpus, hosts, size).gpu_parts()
        assert sum(part.bytes for part in parts) == pytest.approx(CARDS[card].memory_bytes)
        assert parts[-1].name == "free" and parts[-1].bytes > 0


def test_options_of_a_file_are_kept() -> None:
    args = {"auth": {"mode": "keys"}, "defaults": {"num_inference_steps": 20}, "limits": {"fps": 24}}
    plan = Plan.of(Wish(CARDS["h200"], 1, 1, AT_480P, "latency", MODEL, args))
    written = yaml.safe_load(plan_file.write(plan, "wan-serve plan"))["applications"][0]["args"]
    assert written["auth"] == {"mode": "keys"}
    assert written["defaults"] == {"num_inference_steps": 20, "width": 832, "height": 480, "num_frames": 81}
    assert written["limits"]["fps"] == 24
