"""Errors in a step, as a rank translates them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from serve_app.config import Config
from serve_app.engine.errors import DeviceBroken, OutOfMemory
from serve_app.engine.messages import StepRequest
from serve_app.engine.rank import Rank
from serve_app.wan.parallel.symmetric_memory import OutOfStep
from serve_app.wan.sampling import sampler


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), OutOfMemory),
        (RuntimeError("CUDA driver error: out of memory"), OutOfMemory),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceBroken),
        (RuntimeError("CUDA driver error: unknown error"), DeviceBroken),
        (OutOfStep("a sum was broken off by OutOfMemoryError: CUDA out of memory."), DeviceBroken),
        (RuntimeError("shapes do not match"), RuntimeError),
    ],
)
def test_what_is_raised_in_a_step_is_told_as_what_it_means(
    error: Exception, said: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        groups.exchanged += 7
        raise error

    monkeypatch.setattr(sampler, "advance", fail)
    groups = SimpleNamespace(exchanged=100)
    experts = SimpleNamespace(use=lambda name: None, forget_texts=lambda: None)
    rank = Rank(Config(), 0)
    rank._loaded = SimpleNamespace(groups=groups, experts=experts, device=torch.device("cpu"))  # type: ignore[assignment]
    rank._samples["a"] = SimpleNamespace(latents=torch.zeros(1), expert="transformer")  # type: ignore[assignment]
    with pytest.raises(said) as raised:
        rank.step(StepRequest(["a"]).to_wire())
    assert type(raised.value) is said
    if isinstance(raised.value, OutOfMemory):
        assert raised.value.exchanged == 7 and str(error) in str(raised.value)
