"""The training commands at toy size: train, save, resume, export."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from serve_app.tiny import export, train_experts, train_vae, train_words
from serve_app.tiny.muon import orthogonalise


def run(module: object, monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr("sys.argv", ["command", "--device", "cpu", "--smoke", *args])
    module.main()  # type: ignore[attr-defined]


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
    monkeypatch.setattr("sys.argv", ["command", "--smoke", "--work", str(tmp_path), "--steps", "2", "--batch", "4"])
    train_words.main()
    assert export.export(tmp_path, tmp_path / "checkpoint") < export.LIMIT
    export.plot(tmp_path, tmp_path / "curves.png")
    pipe = WanPipeline.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    assert float(pipe.vae.config.latents_std[0]) > 0


def test_muon_orthogonalises_stacks() -> None:
    update = orthogonalise(torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.5
    assert values.max() < 1.5
