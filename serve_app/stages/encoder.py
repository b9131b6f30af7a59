"""The text encoder's deployment: prompts in, embeddings out, batched across requests."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import serve

from serve_app.compute import MathThread, limit_memory, pick_device, settle
from serve_app.config import Config
from serve_app.errors import JobFailed, one_line
from serve_app.logs import get_logger
from serve_app.stages.stage_memory import StageMemory
from serve_app.stages.status_board import StatusBoard

if TYPE_CHECKING:
    from serve_app.wan.text import Embedding

logger = get_logger(__name__)


@dataclass(frozen=True)
class Encoded:
    """The embeddings of a request.

    Attributes:
        positive: embedding of the prompt, float32 [tokens, dim] without padding.
        negative: embedding of the negative prompt, likewise; None without guidance.
        truncated: which of `prompt` and `negative_prompt` were longer than the encoder reads.
        seconds: how long its batch took.
    """

    positive: np.ndarray
    negative: np.ndarray | None
    truncated: list[str]
    seconds: float


@serve.deployment(name="Encoder")
class Encoder:
    """Loads the text encoder and answers `encode`.

    Args:
        config: the deployment's configuration.
    """

    def __init__(self, config: Config) -> None:
        import torch

        from serve_app.wan.text import TextEncoder
        from serve_app.wan.weights.checkpoint import Checkpoint

        stage = config.encoder
        started = time.monotonic()
        self._math = MathThread(stage.threads)
        device = pick_device(stage.device)
        limit_memory(device, stage.memory_fraction)
        checkpoint = Checkpoint(config.model.folder, config.model.random)
        self._encoder = self._math.call(
            TextEncoder,
            checkpoint,
            device,
            getattr(torch, config.model.dtype),
        )
        if stage.warmup:
            self._math.call(self._encoder.encode, ["warm-up"])
            settle()
        self._memory = StageMemory("encoder", config, checkpoint, [device], [self._encoder.model])
        self._board = StatusBoard(self.status)
        self._encode_batch.set_max_batch_size(stage.batch.size)
        self._encode_batch.set_batch_wait_timeout_s(stage.batch.wait_s)
        logger.info("encoder ready", extra={"seconds": round(time.monotonic() - started, 2)})

    async def encode(self, prompt: str, negative_prompt: str | None) -> Encoded:
        """Embed a prompt and, where guidance needs it, a negative prompt.

        Raises:
            JobFailed: `encode_failed`, or `not_finite` if an embedding holds NaN or infinity.
        """
        result = await self._encode_batch((prompt, negative_prompt))
        if isinstance(result, Exception):
            raise result
        return result

    def status(self) -> dict[str, Any]:
        """Return the replica's status for people; called from another thread."""
        return self._memory.plain()

    @serve.batch
    async def _encode_batch(self, requests: list[tuple[str, str | None]]) -> list[Encoded | Exception]:
        """Embed all texts of a batch in one forward pass, equal ones once: most requests share the negative prompt."""
        started = time.monotonic()
        texts = list(dict.fromkeys(text for request in requests for text in request if text is not None))
        try:
            embeddings = await self._math.run(self._encoder.encode, texts)
        except Exception as error:
            # Passed on as our own type, because a process without torch cannot unpickle torch's.
            logger.exception("encoding failed")
            return [JobFailed("encode_failed", one_line(error)) for _ in requests]
        by_text = dict(zip(texts, embeddings, strict=True))
        seconds = time.monotonic() - started
        results: list[Encoded | Exception] = []
        for prompt, negative_prompt in requests:
            positive = by_text[prompt]
            negative = None if negative_prompt is None else by_text[negative_prompt]
            if (failure := _not_finite(positive, negative)) is not None:
                logger.error("embeddings are not finite", extra={"error": failure.message})
                results.append(failure)
                continue
            truncated = [
                name
                for name, embedding in (("prompt", positive), ("negative_prompt", negative))
                if embedding is not None and embedding.truncated
            ]
            results.append(
                Encoded(
                    positive=positive.tensor.float().numpy(),
                    negative=None if negative is None else negative.tensor.float().numpy(),
                    truncated=truncated,
                    seconds=seconds,
                )
            )
        return results


def _not_finite(positive: Embedding, negative: Embedding | None) -> JobFailed | None:
    """Return the failure of a request whose embeddings hold NaN or infinity; None if all numbers are finite."""
    for name, embedding in (("prompt", positive), ("negative_prompt", negative)):
        if embedding is not None and not embedding.tensor.isfinite().all():
            kind = str(embedding.tensor.dtype).removeprefix("torch.")
            return JobFailed(
                "not_finite", f"The encode stage made numbers of '{name}' that are not finite ({kind}, model.dtype)."
            )
    return None
