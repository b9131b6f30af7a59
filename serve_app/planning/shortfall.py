"""The words in which a process is refused that cannot fit on its device: one line with option, value and need.

The plan, `check`, `up` and a rank that is about to load all say it like this.
"""

from __future__ import annotations

from collections.abc import Iterator

from serve_app.config import Config
from serve_app.errors import ConfigError
from serve_app.planning.cards import Card
from serve_app.planning.memory import RankMemory, Size, decoder_need, encoder_need
from serve_app.planning.model_shape import ModelShape
from serve_app.planning.parts import GIB, ProcessMemory
from serve_app.wan.offload.passing import PASSING_SLOTS, no_room_for_blocks
from serve_app.wan.parallel.mesh import Mesh

_LESS = {
    "rank": "denoiser.experts, .offload and .parallel.tensor make it less",
    "encoder": "encoder.device: cpu does without a GPU",
    "decoder": "model.vae_dtype: bfloat16 makes it less",
}


def does_not_fit(need: ProcessMemory, limit: float, device: str) -> str:
    """Return the line for a process that needs more than it may take.

    Args:
        need: of the process.
        limit: bytes that it may take.
        device: the device, in words: `this GPU`, or `an H100 80 GB`.
    """
    return (
        f"{need.option}.memory_fraction has value {need.fraction:g}, {limit / GIB:.1f} GiB of {device}, expected "
        f"{need.least / GIB:.1f} GiB for weights ({need.weights / GIB:.1f}) and {need.work}; {_LESS[need.process]}"
    )


def refuse_what_cannot_fit(config: Config, model: ModelShape, cards: list[Card]) -> None:
    """Check that every process of a configuration fits on some of these GPUs.

    Args:
        config: all options.
        model: the model's shape.
        cards: the GPUs that are there; none says nothing.

    Raises:
        ConfigError: a line for each kind of process that fits on none.
    """
    if cards and (lines := shortfalls(config, model, max(cards, key=lambda one: one.memory_bytes))):
        raise ConfigError("\n".join(lines))


def shortfalls(config: Config, model: ModelShape, card: Card) -> list[str]:
    """Return a line for each kind of process that surely does not fit on a GPU of this kind.

    Counted is the least that a process can do with: a step of the default size, one request's texts, tiles as small as
    can be.
    """
    return [*_of_ranks(config, model, card), *_of_stages(config, model, card)]


def _of_ranks(config: Config, model: ModelShape, card: Card) -> Iterator[str]:
    stage = config.denoiser
    if stage.device == "cpu":
        return
    # Where the group picks its mesh itself, it may divide the weights among all of its ranks.
    mesh = Mesh.of(stage.parallel) or Mesh(tensor=stage.parallel.size)
    held = (0,) if stage.experts == "split" else tuple(range(len(model.experts)))
    memory, limit = RankMemory(config, model, mesh, held), stage.memory_fraction * card.memory_bytes
    if stage.offload != "none":
        least = min(PASSING_SLOTS, model.experts[0].num_layers) * memory.weights[0].block
        if memory.block_budget(limit) < least:
            yield no_room_for_blocks(memory.block_budget(limit), memory.weights[0].block)
        return
    need = memory.need(Size.of(config.defaults))
    if need.least > limit:
        yield does_not_fit(need, limit, _named(card))


def _of_stages(config: Config, model: ModelShape, card: Card) -> Iterator[str]:
    needs = (encoder_need(config, model), decoder_need(config, model, Size.of(config.defaults), bound=0))
    for stage, need in zip((config.encoder, config.decoder), needs, strict=True):
        limit = stage.memory_fraction * card.memory_bytes
        if stage.device != "cpu" and need.least > limit:
            yield does_not_fit(need, limit, _named(card))


def _named(card: Card) -> str:
    """Return a card in words: `a GPU (H100 80 GB)`."""
    return f"a GPU ({card.label})"
