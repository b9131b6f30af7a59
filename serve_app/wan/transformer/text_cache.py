"""A cache of the keys and values that cross-attention makes of a batch's texts. No step changes them.

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
    """The texts of a batch, with their keys and values.

    Attributes:
        texts: the whole texts, `[1, tokens, dim]` each.
        given: what the model gets of them, `[batch, kept, dim]`; one token once the keys and values are made.
        bias: added to the attention's logits, `[1, 1, 1, kept]`; None for nothing.
        layers: keys and values by layer, `[2, batch, kept, heads, features]`; empty if they were `beyond` the limit.
        beyond: whether keys and values took more than the cache's limit.
    """

    texts: list[torch.Tensor]
    given: torch.Tensor
    bias: torch.Tensor | None
    layers: dict[int, torch.Tensor] = field(default_factory=dict)
    beyond: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(one.nbytes for one in self.layers.values())


class TextCache:
    """Keys and values by layer, kept while the same batch makes its steps.

    When the batch changes, all of them are made anew, as every step would without a cache. Keeping them by sample would
    save that too, but each step would have to join them, and a waiting sample would hold more memory for its text than
    for its video: at A14B's size 2 x 40 layers x 512 tokens x 5120 features x 2 bytes, 419 MB for a text. The smaller
    the video, the larger their share of a step's work.

    Args:
        limit_bytes: bound of all cached keys and values, also during a pass; a batch beyond it is not cached.
        fold: let one token stand for the padding at the end of the texts, whose tokens are all alike: a logit raised by
            log(n) weighs as much as n tokens. Not on GPUs, whose fastest attention kernels take no bias, and not in
            bfloat16, which would round it.
    """

    def __init__(self, limit_bytes: float, fold: bool) -> None:
        self._limit = limit_bytes
        self._fold = fold
        self._kept: list[CachedTexts] = []
        self._current: CachedTexts | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all cached keys and values."""
        return sum(one.bytes for one in self._kept)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the present pass, see `CachedTexts`."""
        return None if self._current is None else self._current.bias

    @contextmanager
    def serving(self, texts: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Serve one forward pass over these texts.

        If the cache has exactly these tensors, `get` returns their keys and values. Else those that the pass puts are
        kept, unless it raises.

        Args:
            texts: `[1, tokens, dim]` each, zero where it is padding.

        Yields:
            The model's texts, `[batch, kept, dim]`; one token where the keys and values are cached.
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
        """Return the texts' keys and values in a layer, `[2, batch, kept, heads, features]`; None if not cached."""
        return None if self._current is None else self._current.layers.get(layer)

    def put(self, layer: int, keys_values: torch.Tensor) -> None:
        """Keep keys and values of the present pass, if those of all its layers so far were within the limit."""
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
        # Drop old ones before new ones are made, so that there are never more than the halves of one batch.
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
    # By identity: the cache holds on to its texts, so no other tensor can have come to their place in memory.
    return len(kept) == len(texts) and all(one is other for one, other in zip(kept, texts, strict=True))
