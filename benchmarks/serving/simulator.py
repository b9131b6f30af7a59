"""The simulator against closed forms of queueing theory, then policies against each other on simulated fleets.

    python -m benchmarks.serving.simulator [--only theory fleets overload order day] [--groups 4 32] [--hours 24]

`theory`: mean wait of M/M/c and M/D/c. `fleets`: late jobs at equal GPU-hours, by autoscaling on work, on request
counts (its target is bisected until the GPU-hours are equal), and by a fixed number of groups. `overload`: 1.5 times of
what a fleet can do, with and without degrading. `order`: other orders than the engine's, and another router. `day`: the
seconds of a day of 500 groups. Late is who waited for longer than the `target_wait_s` of their class.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from typing import Any

import serve_app.engine.virtual_group as virtual_group
from benchmarks.machine import describe
from serve_app.engine.scheduler import Entry, Scheduler
from serve_app.simulate.fleet import Clip, Fleet
from serve_app.simulate.report import gpu_hours, rows
from serve_app.simulate.simulation import Result, Simulation
from serve_app.simulate.trace import Arrival, drawn

PARTS = ("theory", "fleets", "overload", "order", "day")
DEMAND = {"load": 0.55, "peak": 1.7, "burst_shape": 8.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--hours", type=float, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=400_000, help="of each closed form")
    options = parser.parse_args()
    print(f"\n{describe()}; seed {options.seed}; all numbers but the seconds of `day` are simulated", flush=True)
    for part in options.only:
        globals()[part](options)


def fleet(groups: int, hours: float, seed: int, scaling: dict[str, Any], **more: Any) -> Fleet:
    """Return a fleet of two H200 a group, with as many decoders as it needs."""
    base = {"max_replicas": groups, "upscale_delay_s": 30, "downscale_delay_s": 300}
    denoiser = {"autoscaling": {**base, **scaling}, "resident_samples": 4}
    content = {
        **{"hours": hours, "seed": seed, "denoiser": denoiser, "decoders": max(groups // 4, 1)},
        **{"running_jobs": 4 * groups, "demand": DEMAND, "start_s": 120, **more},
    }
    return Fleet.model_validate(content)


def played(made: Fleet) -> Result:
    """Return the result of a fleet with its own demand."""
    return Simulation(made, drawn(made, random.Random(made.seed))).run()


def late(made: Fleet, result: Result) -> float:
    """Return the share of all jobs that were late."""
    return rows(made, result)[-1].late


def theory(options: argparse.Namespace) -> None:
    """Print mean waits in mean service times beside their closed forms."""
    print("\n| queue | load of a server | simulated | closed form | error |\n|---|---|---|---|---|", flush=True)
    for servers, load, exponential in ((1, 0.5, True), (4, 2.8, True), (1, 0.6, False), (4, 2.8, False)):
        exact = wait_mmc(servers, load) if exponential else wait_mdc(servers, load)
        found = simulated_wait(servers, load, exponential, options.jobs, options.seed)
        name = f"M/{'M' if exponential else 'D'}/{servers}"
        error = f"{abs(found / exact - 1):.2%}"
        print(f"| {name} | {load / servers:.2f} | {found:.4f} | {exact:.4f} | {error} |", flush=True)


def simulated_wait(servers: int, load: float, exponential: bool, jobs: int, seed: int) -> float:
    """Return the mean wait in mean service times, first come, first served."""
    scaling = {"min_replicas": servers, "max_replicas": servers}
    made = Fleet.model_validate(
        {
            **{"denoiser": {"autoscaling": scaling, "resident_samples": 1}, "running_jobs": servers, "noise": 0},
            **{"fixed_s": 0, "encode_s": 0, "decode_s": 0, "router": "soonest", "look_s": 1e9, "seed": seed},
        }
    )
    draw, steps = random.Random(seed), 1000
    clips = {}

    def params(count: int) -> Any:
        if count not in clips:
            clips[count] = Clip(width=64, height=64, num_inference_steps=count).params
        return clips[count]

    mean_s = Simulation(made, [])._seconds(params(steps))

    def arrivals() -> Iterator[Arrival]:
        now = 0.0
        for _ in range(jobs):
            now += draw.expovariate(load / mean_s)
            count = max(round(draw.expovariate(1 / steps)), 1) if exponential else steps
            yield Arrival(now, "", "standard", params(count))

    outcomes = Simulation(made, arrivals()).run().outcomes
    return sum(one.wait_s for one in outcomes) / len(outcomes) / mean_s


def wait_mmc(servers: int, load: float) -> float:
    """Return the mean wait of M/M/c in service times, by Erlang's C."""
    terms = [load**nth / math.factorial(nth) for nth in range(servers)]
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(terms) + last) / (servers - load)


def wait_mdc(servers: int, load: float, states: int = 200) -> float:
    """Return the mean wait of M/D/c in service times, from the number in the system one service time later.

    Whoever is served now has left by then, so that number is how many waited, and how many came (Crommelin).
    """
    came = [math.exp(-load + nth * math.log(load) - math.lgamma(nth + 1)) for nth in range(states)]
    state = [1.0] + [0.0] * (states - 1)
    for _ in range(3000):
        after = [0.0] * states
        for count, chance in enumerate(state):
            if chance > 1e-15:
                for nth in range(states - max(count - servers, 0)):
                    after[max(count - servers, 0) + nth] += chance * came[nth]
        if sum(abs(a - b) for a, b in zip(after, state, strict=True)) < 1e-13:
            break
        state = after
    waiting = sum((count - servers) * chance for count, chance in enumerate(state) if count > servers)
    return waiting / load


def fleets(options: argparse.Namespace) -> None:
    """Print late jobs at equal GPU-hours."""
    print("\n| GPUs | hours | policy | router | GPU-hours | groups busy | late | late by work / late |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for groups in options.groups:
        least = max(groups // 8, 1)
        made = fleet(groups, options.hours, options.seed, {"by": "work", "min_replicas": least})
        ours = played(made)
        hours, share = gpu_hours(made, ours), late(made, ours)
        _print_fleet(options, groups, "work", made, ours, share)
        for router in ("two", "emptiest"):
            made, theirs, target = _by_requests(options, groups, least, router, hours)
            _print_fleet(options, groups, f"requests, {target:.2f} a group", made, theirs, share)
        count = max(round(hours / made.gpus / (ours.ended_at / 3600)), 1)
        base = fleet(groups, options.hours, options.seed, {"min_replicas": groups})
        fixed = fleet(count, options.hours, options.seed, {"min_replicas": count}, running_jobs=4 * groups)
        # The demand is that of the whole fleet.
        result = Simulation(fixed, drawn(base, random.Random(options.seed))).run()
        _print_fleet(options, groups, f"fixed, {count} groups", fixed, result, share)


def _by_requests(
    options: argparse.Namespace, groups: int, least: int, router: str, hours: float
) -> tuple[Fleet, Result, float]:
    """Return a fleet that is scaled by request counts to so many GPU-hours, its result and its target."""
    low, high = 0.5, 8.0  # more requests for a group are fewer groups
    for _ in range(7):
        target = math.sqrt(low * high)
        scaling = {"by": "requests", "min_replicas": least, "target_queue_length": target}
        made = fleet(groups, options.hours, options.seed, scaling, router=router)
        result = played(made)
        used = gpu_hours(made, result)
        low, high = (target, high) if used > hours else (low, target)
        if abs(used / hours - 1) < 0.01:
            break
    return made, result, target


def _print_fleet(options: argparse.Namespace, groups: int, name: str, made: Fleet, result: Result, ours: float) -> None:
    share = late(made, result)
    ratio = f"{ours / share:.2f}" if share else ""
    print(
        f"| {groups * made.gpus} | {options.hours:g} | {name} | {made.router} | {gpu_hours(made, result):.0f} "
        f"| {result.busy_s / result.group_s:.1%} | {share:.2%} | {ratio} |",
        flush=True,
    )


def overload(options: argparse.Namespace) -> None:
    """Print waits at 1.5 times of what a fleet can do."""
    print("\n| jobs that agree to less | hours | wait p50 s | p95 s | late | degraded | level changes an hour |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for may in (0.0, 0.5, 1.0):
        for hours in (6, 12, 24):
            demand = {"load": 1.5, "may_degrade": may}
            made = fleet(32, hours, options.seed, {"min_replicas": 32}, demand=demand, degrade={})
            result = played(made)
            row = rows(made, result)[-1]
            changes = result.level_changes / (result.ended_at / 3600)
            print(
                f"| {may:.0%} | {hours} | {row.waits[0]:.0f} | {row.waits[1]:.0f} | {row.late:.2%} "
                f"| {row.degraded:.1%} | {changes:.1f} |",
                flush=True,
            )


class BySlack(Scheduler):
    """Within a class, the sample with the least slack first: its effective deadline less its remaining work."""

    def _key(self, entry: Entry, now: float) -> tuple[float, ...]:
        key = super()._key(entry, now)
        return key if key[0] == 0 else (*key[:-1], entry.effective_deadline - entry.remaining / _TFLOP_PER_S)


class BySlackBuckets(Scheduler):
    """Within a class, those with less than a minute of slack first; among the others the least work left."""

    def _key(self, entry: Entry, now: float) -> tuple[float, ...]:
        key = super()._key(entry, now)
        slack = entry.effective_deadline - now - entry.remaining / _TFLOP_PER_S
        return key if key[0] == 0 else (*key[:-1], float(slack > 60), key[-1])


_TFLOP_PER_S = 1 / Fleet().cost.per_work_s


def order(options: argparse.Namespace) -> None:
    """Print what other orders and another router would change."""
    print(
        "\n| order | router | load | wait, mean s | p95 s | p99 s | late |\n|---|---|---|---|---|---|---|", flush=True
    )
    for load in (0.7, 0.9):
        for kind in (Scheduler, BySlack, BySlackBuckets):
            for router in ("two", "emptiest", "soonest") if kind is Scheduler else ("emptiest",):
                virtual_group.Scheduler = kind  # type: ignore[misc]
                demand = {"load": load, "burst_shape": 4.0}
                made = fleet(32, 12, options.seed, {"min_replicas": 32}, demand=demand, router=router)
                result = played(made)
                row = rows(made, result)[-1]
                mean = sum(one.wait_s for one in result.outcomes) / len(result.outcomes)
                print(
                    f"| {kind.__name__} | {router} | {load} | {mean:.1f} | {row.waits[1]:.0f} | {row.waits[2]:.0f} "
                    f"| {row.late:.2%} |",
                    flush=True,
                )
    virtual_group.Scheduler = Scheduler  # type: ignore[misc]


def day(options: argparse.Namespace) -> None:
    """Print the processor's seconds of a day of 1,000 GPUs."""
    made = fleet(500, 24, options.seed, {"by": "work", "min_replicas": 50})
    began, processor = time.monotonic(), time.process_time()
    result = played(made)
    print(
        f"\na day of 1,000 GPUs: {len(result.outcomes)} jobs, {time.process_time() - processor:.1f} s of one core "
        f"({time.monotonic() - began:.1f} s passed), {gpu_hours(made, result):.0f} GPU-hours, late "
        f"{late(made, result):.2%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
