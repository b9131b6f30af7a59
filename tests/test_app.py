"""The options that the Serve builders give to their deployments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray import serve

from serve_app import app
from serve_app.errors import ConfigError
from serve_app.wan.weights.checkpoint import Checkpoint
from tests.support.shapes import A14B


def arguments(application: serve.Application) -> tuple[Any, ...]:
    return tuple(application._bound_deployment.init_args)


def test_the_gateway_learns_the_shape_of_the_model(checkpoint: Path) -> None:
    config, _, expert = arguments(app.gateway({"model": {"path": str(checkpoint)}}))
    assert config.model.folder == checkpoint and set(A14B) <= set(expert)
    assert expert == Checkpoint(checkpoint).expert_config("transformer")


def test_a_gateway_can_be_deployed_from_where_the_model_is_not(tmp_path: Path) -> None:
    args = {"model": {"path": str(tmp_path / "on-gpu-nodes-only")}}
    assert arguments(app.gateway(args))[2] is None
    with pytest.raises(ConfigError, match=r"^model\.path has value '.*on-gpu-nodes-only'"):
        app.wan(args)
