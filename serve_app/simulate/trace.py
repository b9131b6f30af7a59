"""The jobs that come to a simulated fleet: drawn by a seed, or read from a file."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from serve_app.config import Priority
from serve_app.errors import ConfigError
from serve_app.request import Params
from serve_app.simulate.fleet import Clip, Fleet, work_of

_DAY_S = 86400.0


@dataclass(frozen=True)
class Arrival:
    """A job that is asked for.

    Attributes:
        at: seconds since the beginning.
        owner: who asks.
        priority: its class.
        params: what is asked for.
        may_degrade: whether it agrees to less.
    """

    at: float
    owner: str
    priority: Priority
    params: Params
    may_degrade: bool = False


def drawn(fleet: Fleet, draw: random.Random) -> Iterator[Arrival]:
    """Yield arrivals at random: Poisson, at a rate that follows the day and bursts.

    A day begins at its quietest. The rate is that at which all groups together would be busy for `load` of the time.
    """
    demand = fleet.demand
    clips = [(clip, clip.params) for clip in demand.clips]
    weights = [clip.weight for clip in demand.clips]
    seconds = [fleet.cost.fixed_s * p.num_inference_steps + fleet.cost.per_work_s * work_of(p) for _, p in clips]
    mean_s = sum(w * s for w, s in zip(weights, seconds, strict=True)) / sum(weights)
    rate = demand.load * fleet.denoiser.autoscaling.max_replicas / mean_s
    owners = list(itertools.accumulate(1 / (nth + 1) ** demand.zipf for nth in range(demand.owners)))
    classes = list(demand.classes)
    class_weights = [demand.classes[name] for name in classes]
    now, burst, burst_until = 0.0, 1.0, -1.0
    most = rate * demand.peak
    while True:
        # Thinning: candidates at the highest rate, of which as many are kept as the rate of that moment asks.
        if now >= burst_until:
            burst_until = now + demand.burst_s
            shape = demand.burst_shape
            burst = draw.gammavariate(shape, 1 / shape) if shape else 1.0
        step = draw.expovariate(most * burst)
        if now + step >= burst_until:  # nothing more comes in this burst; a Poisson process forgets
            now = burst_until
            if now >= fleet.hours * 3600:
                return
            continue
        now += step
        if now >= fleet.hours * 3600:
            return
        if draw.random() * demand.peak > 1 - (demand.peak - 1) * math.cos(2 * math.pi * now / _DAY_S):
            continue
        (_, params) = draw.choices(clips, weights)[0]
        owner = draw.choices(range(demand.owners), cum_weights=owners)[0]
        priority = draw.choices(classes, class_weights)[0]
        yield Arrival(now, f"owner{owner}", priority, params, draw.random() < demand.may_degrade)


def recorded(path: Path) -> list[Arrival]:
    """Return the arrivals of a file with a line of JSON each.

    A line has `at` in seconds, and any of `owner`, `priority`, `may_degrade`, `width`, `height`, `num_frames` and
    `num_inference_steps`.

    Raises:
        ConfigError: a line cannot be read.
    """
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace has value '{path}', expected a file: {str(error).splitlines()[0]}") from None
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            at, owner = float(fields.pop("at")), str(fields.pop("owner", ""))
            priority, may = fields.pop("priority", "standard"), bool(fields.pop("may_degrade", False))
            if priority not in ("interactive", "standard", "batch"):
                raise ValueError(f"priority is {priority!r}")
            found.append(Arrival(at, owner, priority, Clip(**fields).params, may))
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            said = str(error).splitlines()[0]
            raise ConfigError(f"--trace has value '{path}': line {number} cannot be read: {said}") from None
    return sorted(found, key=lambda arrival: arrival.at)


def write(arrivals: Iterable[Arrival], path: Path) -> None:
    """Write arrivals to a file that `recorded` reads."""
    names = ("width", "height", "num_frames", "num_inference_steps")
    lines = (
        json.dumps(
            {
                **{"at": round(one.at, 3), "owner": one.owner, "priority": one.priority},
                **{"may_degrade": one.may_degrade, **{name: getattr(one.params, name) for name in names}},
            }
        )
        for one in arrivals
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
