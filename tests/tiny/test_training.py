"""The training commands at toy size: train, save, resume, export."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import nn

from serve_app.tiny import CHECKPOINT
from serve_app.tiny.recipe import export, train_experts, train_vae
from serve_app.tiny.recipe.dataset import encoded
from serve_app.tiny.recipe.experts import EXPERT, quicken
from serve_app.tiny.recipe.muon import Muon, orthogonalise
from serve_app.tiny.recipe.shapes import random_scenes


def run(module: object, monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr("sys.argv", ["command", "--device", "cpu", "--smoke", *args])
    module.main()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_train_resume_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = ("--work", str(tmp_path), "--steps", "2", "--every", "1", "--minutes", "5")
    run(train_vae, monkeypatch, *work, "--batch", "2")
    run(train_vae, monkeypatch, *work, "--batch", "2", "--resume")
    assert json.loads((tmp_path / "vae_log.json").read_text())[-1]["step"] == 4
    run(train_experts, monkeypatch, *work, "--batch", "16", "--fresh-tokenizer")
    run(train_experts, monkeypatch, *work, "--batch", "16", "--resume")
    assert json.loads((tmp_path / "experts_log.json").read_text())[-1]["step"] == 4
    # Without the full state the exported weights are enough to go on.
    (tmp_path / "state.pt").unlink()
    run(train_experts, monkeypatch, *work, "--batch", "16", "--resume", "--restart")
    assert export.export(tmp_path, tmp_path / "checkpoint") < export.LIMIT
    export.plot(tmp_path, tmp_path / "curves.png")
    pipe = WanPipeline.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    assert float(pipe.vae.config.latents_std[0]) > 0


def test_muon_orthogonalises_stacks() -> None:
    update = orthogonalise(torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.5
    assert values.max() < 1.5


@pytest.mark.slow
def test_start_from_the_shipped_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = ("--work", str(tmp_path), "--steps", "1", "--every", "1", "--minutes", "5", "--resume")
    run(train_vae, monkeypatch, *work, "--batch", "2", "--decoder-only")
    old = AutoencoderKLWan.from_pretrained(CHECKPOINT / "vae", dtype=torch.float32)
    new = AutoencoderKLWan.from_pretrained(tmp_path / "vae", dtype=torch.float32)
    assert new.config.latents_mean == old.config.latents_mean
    same = {k for k, v in new.state_dict().items() if torch.equal(v, old.state_dict()[k])}
    assert {k for k in new.state_dict() if k.startswith(("encoder.", "quant_conv."))} <= same
    assert not all(k in same for k in new.state_dict() if k.startswith("decoder."))
    run(train_experts, monkeypatch, *work, "--batch", "16")
    run(train_experts, monkeypatch, *work, "--batch", "16")
    old, new = (
        WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
        for folder in (CHECKPOINT, tmp_path)
    )
    # Two steps at the first learning rates of the warm-up: the weights are the shipped ones, a little further.
    assert (
        torch.nn.utils.parameters_to_vector(new.parameters())
        .sub(torch.nn.utils.parameters_to_vector(old.parameters()))
        .abs()
        .max()
        < 1e-2
    )
    assert json.loads((tmp_path / "experts_log.json").read_text())[-1]["step"] == 2


def test_experts_alone_can_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(train_experts, monkeypatch, "--work", str(tmp_path), "--steps", "1", "--batch", "16", "--resume")
    assert 0 < export.export(tmp_path, tmp_path / "checkpoint") < export.LIMIT
    with pytest.raises(FileNotFoundError, match="--source has value"):
        run(train_experts, monkeypatch, "--work", str(tmp_path / "other"), "--resume", "--source", str(tmp_path / "no"))


def test_latents_are_kept_for_the_same_clips_only(tmp_path: Path) -> None:
    lots = [random_scenes(2, torch.Generator().manual_seed(k)) for k in (0, 1)]
    call = (tmp_path / "latents.pt", CHECKPOINT / "vae")
    first, kept = encoded(*call, lots[:1], [(5, 32, 32)], torch.device("cpu"))
    again, kept_again = encoded(*call, lots[:1], [(5, 32, 32)], torch.device("cpu"))
    assert (kept, kept_again) == (False, True)
    assert torch.equal(first[0], again[0])
    assert encoded(*call, lots[1:], [(5, 32, 32)], torch.device("cpu"))[1] is False


def test_quickened_expert_computes_the_same() -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**(EXPERT | {"num_layers": 1}))
    x = torch.randn(2, 16, 3, 8, 12)
    slow = model.patch_embedding(x)
    names = list(model.state_dict())
    quicken(model)
    assert torch.allclose(model.patch_embedding(x), slow, atol=1e-5)
    assert list(model.state_dict()) == names


def one_by_one(p: torch.Tensor, grad: torch.Tensor, momentum: torch.Tensor, lr: float) -> None:
    """Do a step of Muon as its source writes it, for one matrix. Changes p and momentum."""
    momentum.lerp_(grad, 0.05)
    x = grad.lerp(momentum, 0.95)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    p.mul_(1 - lr * 0.02).sub_((x.T if tall else x) * (lr * 0.2 * max(p.shape) ** 0.5))


def test_muon_in_batches_is_muon_one_by_one() -> None:
    torch.manual_seed(0)
    shapes = ((24, 24), (24, 48), (24, 24), (48, 24), (16, 8), (24, 48))
    parameters = [nn.Parameter(torch.randn(s)) for s in shapes]
    wanted = [p.detach().clone() for p in parameters]
    momenta = [torch.zeros(s) for s in shapes]
    muon = Muon(parameters)
    muon.lr = 0.1
    for _ in range(3):
        for p, q, m in zip(parameters, wanted, momenta, strict=True):
            p.grad = torch.randn_like(p)
            one_by_one(q, p.grad, m, muon.lr)
        muon.step()
    for p, q in zip(parameters, wanted, strict=True):
        assert torch.allclose(p.detach(), q, atol=1e-4)
