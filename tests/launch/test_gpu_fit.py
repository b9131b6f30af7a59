"""`check` and `up` refuse what cannot fit, in the words of the rank that would find out later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.model import dummy_checkpoint
from serve_app import server
from serve_app.capacity import Host
from serve_app.cli.command import cli
from serve_app.config import Config, load_file
from serve_app.engine.memory_budget import MemoryBudget
from serve_app.errors import ConfigError
from serve_app.launch import shipped
from serve_app.launch.gpu_fit import cards_of, check_gpus
from serve_app.planning.cards import CARDS
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.weights.checkpoint import Checkpoint

OWN = {
    "a14b-1xh200": "h200",
    "a14b-24gb": "rtx-4090",
    "a14b-2xh100": "h100-80",
    "a14b-2xh200": "h200",
    "a14b-4xh100": "h100-80",
    "a14b-8xh100": "h100-80",
}


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dummy_checkpoint.write(tmp_path_factory.mktemp("dummy") / "a14b")


def written(name: str, a14b: Path, folder: Path, **denoiser: Any) -> Path:
    """Write a shipped file whose model is a folder of A14B's shapes."""
    content = yaml.safe_load((shipped.folder() / f"{name}.yaml").read_text())
    args = content["applications"][0]["args"]
    args["model"]["path"], args["home"] = str(a14b), str(folder / "home")
    args["denoiser"].update(denoiser)
    content["applications"][1]["args"] = args
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / f"{name}.yaml"


@pytest.mark.parametrize("name", OWN)
def test_shipped_files_fit_on_their_cards(name: str, a14b: Path, tmp_path: Path) -> None:
    _, config = load_file(written(name, a14b, tmp_path))
    check_gpus(config, [CARDS[OWN[name]]])
    if OWN[name] != "rtx-4090":
        with pytest.raises(ConfigError, match="of a GPU \\(RTX 4090 24 GB\\), expected"):
            check_gpus(config, [CARDS["rtx-4090"]])


def test_the_words_are_those_of_the_rank(a14b: Path, tmp_path: Path) -> None:
    _, config = load_file(written("a14b-2xh200", a14b, tmp_path))
    with pytest.raises(ConfigError) as raised:
        check_gpus(config, [CARDS["h100-80"]])
    (line,) = str(raised.value).splitlines()
    limit = config.denoiser.memory_fraction * CARDS["h100-80"].memory_bytes
    checkpoint = Checkpoint(a14b)
    with pytest.raises(ConfigError) as later:
        MemoryBudget(config, checkpoint, checkpoint.experts, Mesh(guidance=2)).check_fits(limit)
    assert str(later.value) == line.replace("a GPU (H100 80 GB)", "this GPU")


def test_blocks_that_do_not_fit(a14b: Path, tmp_path: Path) -> None:
    _, config = load_file(written("a14b-24gb", a14b, tmp_path, memory_fraction=0.3))
    with pytest.raises(ConfigError, match=r"denoiser\.memory_fraction leaves 0 MiB for blocks .* for 2 blocks"):
        check_gpus(config, [CARDS["rtx-4090"]])


def test_the_other_stages(a14b: Path, tmp_path: Path) -> None:
    _, config = load_file(written("a14b-1xh200", a14b, tmp_path))
    small = config.encoder.model_copy(update={"memory_fraction": 0.05})
    tiny = config.decoder.model_copy(update={"memory_fraction": 0.002})
    config = config.model_copy(update={"encoder": small, "decoder": tiny})
    with pytest.raises(ConfigError) as raised:
        check_gpus(config, [CARDS["h200"]])
    encoder, decoder = str(raised.value).splitlines()
    where = "of a GPU (H200 141 GB), expected"
    assert encoder.startswith(f"encoder.memory_fraction has value 0.05, 7.0 GiB {where} 11.0 GiB")
    assert decoder.startswith(f"decoder.memory_fraction has value 0.002, 0.3 GiB {where} 0.")


def test_nothing_is_said_without_gpus() -> None:
    check_gpus(Config.model_validate({"denoiser": {"rank": {"num_gpus": 0}}}), [])


def test_gpus_that_hosts_of_ray_name() -> None:
    hosts = [Host({"CPU": 4, "accelerator_type:H100": 1.0}), Host({"CPU": 2}), Host({"accelerator_type:A100": 1.0})]
    assert [card.name for card in cards_of(hosts)] == ["h100-80", "a100-80"]
    assert cards_of([Host({"accelerator_type:TPU-V4": 1.0})]) == []


def test_check_with_the_kind_of_gpu(a14b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written("a14b-2xh200", a14b, tmp_path))
    cli(["check", path, "--gpu", "h200"], standalone_mode=False)
    assert "fine" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"^denoiser\.memory_fraction has value 0\.6, 47\.8 GiB"):
        cli(["check", path, "--gpu", "h100"], standalone_mode=False)


def test_up_refuses_before_it_starts_anything(a14b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written("a14b-2xh200", a14b, tmp_path)
    monkeypatch.setattr(server, "cards_here", lambda config: [CARDS["h100-80"]])
    ours = server.Server(path, port=_free_port(), own_ray=True)
    monkeypatch.setattr(ours._ray, "start", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match=r"of a GPU \(H100 80 GB\), expected"):
        ours.start()


def _free_port() -> int:
    from serve_app.launch.address import free_port

    return free_port()
