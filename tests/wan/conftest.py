"""The pieces that several tests of the model path use, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serve_app.wan.generate import Generator
from serve_app.wan.parallel.process_groups import ProcessGroups


@pytest.fixture(scope="session")
def alone() -> ProcessGroups:
    """A group of one on the CPU."""
    return ProcessGroups.alone(torch.device("cpu"))


@pytest.fixture(scope="session")
def generator(checkpoint: Path) -> Generator:
    """The random checkpoint, loaded."""
    return Generator(checkpoint)


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The latents of WanPipeline for the cases of the parity benchmark."""
    from benchmarks.model import parity

    return parity.reference(checkpoint)
