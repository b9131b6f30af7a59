"""What cross-attention makes of the texts of a batch: keys and values, which no step changes.

Knows neither samples nor ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# The texts of a batch may come in two forward passes, one for each half of guidance.
_HALVES = 2


@dataclass
class CachedTexts:
    """A batch of texts.

    `texts` are the whole ones, `[1, tokens, dim]` each. `given` is what the model gets of them, `[batch, kept, dim]`,
    one token once the keys and values are made. `bias` is added to the attention's logits, `[1, 1, 1, kept]`, None for
    nothing. `layers` are the keys and values, `[2, batch, kept, heads, features]`, as far as they are made; none if
    they were `beyond` the memory's limit.
    """

    texts: list[torch.Tensor]
    given: torch.Tensor
    bias: torch.Tensor | None
    layers: dict[int, torch.Tensor] = field(default_factory=dict)
    beyond: bool = False

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(one.nbytes for one in self.layers.values())


class TextCache:
    """Keys and values by layer, kept while one and the same batch steps on.

    A batch that changes has all of them made anew, as every step would without: to keep them by sample would save that
    too, but each step would have to join them, and a sample that waits would hold more memory for its text than for
    its video: at A14B's size 2 x 40 layers x 512 tokens x 5120 features x 2 bytes, 419 MB for a text. The smaller the
    video, the more of a step's work they are.

    Args:
        limit_bytes: for all that is kept, in the midst of a pass as well; batches beyond it are served without.
        fold: let one token stand for the padding at the end of the texts, whose tokens are all alike: a logit raised by
            log(n) weighs as much as n of them. Not on GPUs, whose fastest attention kernels take no bias, and not in
            bfloat16, which would round it.
    """

    def __init__(self, limit_bytes: float, fold: bool) -> None:
        self._limit = limit_bytes
        self._fold = fold
        self._kept: list[CachedTexts] = []
        self._current: CachedTexts | None = None

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        return sum(one.bytes for one in self._kept)

    @property
    def bias(self) -> torch.Tensor | None:
        """Of the pass that is being served, see `CachedTexts`."""
        return None if self._current is None else self._current.bias

    @contextmanager
    def serving(self, texts: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """One forward pass over these texts, each `[1, tokens, dim]`, zero where it is padding. Where they are known by
        their identity, the pass finds their keys and values in `get`; else those that it puts are kept, unless it
        raises.

        Yields:
            What to give the model for its texts, `[batch, kept, dim]`; one token where nothing will look at it.
        """
        known = next((one for one in self._kept if _same(one.texts, texts)), None)
        self._current = serving = known or self._prepare(texts)
        try:
            yield serving.given
        finally:
            self._current = None
        if known is None and not serving.beyond:
            serving.given = serving.given[:, :1].clone()  # nothing will look at it
            self._kept.append(serving)

    def get(self, layer: int) -> torch.Tensor | None:
        """Keys and values of this pass's texts in a layer, `[2, batch, kept, heads, features]`; None if not known."""
        return None if self._current is None else self._current.layers.get(layer)

    def put(self, layer: int, keys_values: torch.Tensor) -> None:
        """Keep them, if a pass is being served whose keys and values have been within the limit so far."""
        serving = self._current
        if serving is None or serving.beyond:
            return
        while self._kept and self.bytes + serving.bytes + keys_values.nbytes > self._limit:
            self._kept.pop(0)
        if serving.bytes + keys_values.nbytes > self._limit:
            serving.layers.clear()
            serving.beyond = True
        else:
            serving.layers[layer] = keys_values

    def clear(self) -> None:
        """Free everything."""
        self._kept.clear()

    def _prepare(self, texts: list[torch.Tensor]) -> CachedTexts:
        # Before the new ones are made, so that there is never more than the halves of one batch.
        self._kept = self._kept[-(_HALVES - 1) :]
        given = torch.cat(texts)
        if not self._fold:
            return CachedTexts(texts, given, None)
        tokens = given.shape[1]
        used = given.ne(0).any(dim=2).any(dim=0).nonzero()
        kept = int(used[-1]) + 2 if len(used) else 1  # and one for the padding
        if kept >= tokens:
            return CachedTexts(texts, given, None)
        bias = torch.zeros(1, 1, 1, kept, dtype=given.dtype, device=given.device)
        bias[..., -1] = math.log(tokens - kept + 1)
        return CachedTexts(texts, given[:, :kept], bias)


def _same(kept: list[torch.Tensor], texts: list[torch.Tensor]) -> bool:
    # By identity: what is kept holds on to its texts, so none of them can be another tensor in the same place.
    return len(kept) == len(texts) and all(one is other for one, other in zip(kept, texts, strict=True))
