"""A check before a start that each process of a configuration fits on some GPU, by the plan's own numbers."""

from __future__ import annotations

from collections.abc import Iterable

from serve_app.capacity import Host
from serve_app.config import Config
from serve_app.model import open_model
from serve_app.planning.cards import Card, named_by_ray, this_machine
from serve_app.planning.model_shape import ModelShape
from serve_app.planning.shortfall import refuse_what_cannot_fit


def check_gpus(config: Config, cards: Iterable[Card]) -> None:
    """Check that the processes fit on the largest of these GPUs.

    Args:
        config: all options.
        cards: the GPUs that are there; none says nothing, and neither does a configuration that wants none.

    Raises:
        ConfigError: a line for each kind of process that surely does not fit.
    """
    found = list(cards)
    if found and wants_gpus(config):
        refuse_what_cannot_fit(config, ModelShape.of(open_model(config)), found)


def wants_gpus(config: Config) -> bool:
    """Return whether any stage reserves a GPU."""
    reserved = (config.encoder.resources, config.denoiser.rank, config.decoder.resources)
    return any(one.num_gpus > 0 for one in reserved)


def cards_here(config: Config) -> list[Card]:
    """Return this machine's GPUs, if the configuration wants any."""
    return this_machine() if wants_gpus(config) else []


def cards_of(hosts: Iterable[Host]) -> list[Card]:
    """Return the kinds of GPUs that the hosts of a Ray cluster say they have."""
    return [card for host in hosts if (card := named_by_ray(host.resources)) is not None]
