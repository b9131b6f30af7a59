"""One encoder without a cluster: numbers that are not finite fail their own request."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve_app.config import Config
from serve_app.errors import JobFailed
from serve_app.stages.encoder import Encoder
from serve_app.tiny import CHECKPOINT


@pytest.fixture
def encoder(tmp_path: Path) -> Any:
    config = {"home": str(tmp_path), "model": {"path": str(CHECKPOINT)}, "encoder": {"device": "cpu", "warmup": False}}
    made = Encoder.func_or_class(Config.model_validate(config))
    batch = type(made)._encode_batch.__wrapped__
    made.batch = lambda requests: batch(made, requests)
    return made


@pytest.mark.parametrize("poison", [math.nan, math.inf])
async def test_an_embedding_that_is_not_finite_fails_its_request_only(encoder: Any, poison: float) -> None:
    text = encoder._encoder
    star = {*text.tokenizer.ids("star")} - {*text.tokenizer.ids("circle blurry")}
    text.model.get_input_embeddings().weight.data[[*star], 0] = poison
    good, positive, negative = await encoder.batch([("circle", "blurry"), ("star", None), ("circle", "star")])
    assert np.isfinite(good.positive).all() and np.isfinite(good.negative).all()
    for failed, name in ((positive, "'prompt'"), (negative, "'negative_prompt'")):
        assert type(failed) is JobFailed, "others have to unpickle it without torch"
        assert (failed.code, failed.retryable) == ("not_finite", False)
        assert "encode stage" in failed.message and name in failed.message


async def test_the_failure_reaches_who_called(encoder: Any) -> None:
    encoder._encoder.model.get_input_embeddings().weight.data.fill_(math.nan)

    async def alone(request: Any) -> Any:
        """Stand in for Serve's batches, which replicas alone have."""
        return (await encoder.batch([request]))[0]

    encoder._encode_batch = alone
    with pytest.raises(JobFailed, match="encode stage"):
        await asyncio.wait_for(encoder.encode("a red circle", "blurry"), 60)
