"""The simulator against closed forms of queueing theory, and what it must never do."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve_app.cli.command import cli
from serve_app.config import Autoscaling
from serve_app.errors import ConfigError
from serve_app.jobs.backlog import Backlog
from serve_app.simulate.fleet import Clip, Fleet, load_fleet
from serve_app.simulate.report import gpu_hours, rows, text
from serve_app.simulate.scaler import Scaler
from serve_app.simulate.simulation import Result, Simulation
from serve_app.simulate.trace import Arrival, drawn, recorded, write


def fleet(groups: int = 4, **more: Any) -> Fleet:
    denoiser = {"autoscaling": {"min_replicas": groups, "max_replicas": groups}, **more.pop("denoiser", {})}
    return Fleet.model_validate({"denoiser": denoiser, "decoders": 64, "hours": 4, **more})


def played(made: Fleet) -> Result:
    return Simulation(made, drawn(made, random.Random(made.seed))).run()


def erlang_c(servers: int, load: float) -> float:
    """Return the probability of a wait of M/M/c; `load` is the arrival rate times the service time."""
    terms = [load**nth / math.factorial(nth) for nth in range(servers)]
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(terms) + last)


def mean_wait(servers: int, load: float, jobs: int, exponential: bool) -> float:
    """Return the mean wait of jobs by the simulator, in mean service times: one queue, first come, first served."""
    draw = random.Random(3)
    steps = 1000
    made = fleet(
        servers,
        denoiser={"autoscaling": {"min_replicas": servers, "max_replicas": servers}, "resident_samples": 1},
        running_jobs=servers,
        noise=0,
        fixed_s=0,
        encode_s=0,
        decode_s=0,
        router="soonest",
        look_s=1e9,
    )
    mean_s = Simulation(made, [])._seconds(Clip(width=64, height=64, num_inference_steps=steps).params)

    def arrivals() -> Iterator[Arrival]:
        now = 0.0
        for _ in range(jobs):
            now += draw.expovariate(load / mean_s)
            count = max(round(draw.expovariate(1 / steps)), 1) if exponential else steps
            yield Arrival(now, "", "standard", Clip(width=64, height=64, num_inference_steps=count).params)

    outcomes = Simulation(made, arrivals()).run().outcomes
    return sum(one.wait_s for one in outcomes) / len(outcomes) / mean_s


@pytest.mark.parametrize("servers, load", [(1, 0.5), (3, 2.1)])
def test_exponential_work(servers: int, load: float) -> None:
    """M/M/c. `benchmarks.serving.simulator` holds it to 1 % with more jobs."""
    expected = erlang_c(servers, load) / (servers - load)
    assert mean_wait(servers, load, 12_000, exponential=True) == pytest.approx(expected, rel=0.08)


def test_equal_work() -> None:
    """M/D/1: half the wait of M/M/1."""
    assert mean_wait(1, 0.6, 12_000, exponential=False) == pytest.approx(0.6 / (2 * 0.4), rel=0.06)


def test_every_job_ends_once_and_a_seed_says_all() -> None:
    made = fleet(denoiser={"autoscaling": {"by": "work", "min_replicas": 0, "max_replicas": 6}}, start_s=60)
    first, second = played(made), played(made)
    assert text(made, first) == text(made, second)
    assert len(first.outcomes) > 100 and all(one.done_at is not None for one in first.outcomes)
    assert all(one.done_at >= one.arrival.at for one in first.outcomes if one.done_at is not None)
    assert first.busy_s <= first.group_s and first.most_groups <= 6
    other = fleet(seed=1)
    assert text(other, played(other)) != text(made, first)


def test_groups_follow_the_day() -> None:
    """Fewer GPU-hours than a fleet that is always there, and no more than a few late."""
    demand = {"load": 0.5, "peak": 1.9}
    always = fleet(8, demand=demand, hours=24)
    scaled = fleet(8, demand=demand, hours=24, denoiser={"autoscaling": {**_WORK, "max_replicas": 8}})
    assert gpu_hours(scaled, played(scaled)) < 0.9 * gpu_hours(always, played(always))


_WORK = {"by": "work", "min_replicas": 1, "downscale_delay_s": 600}


def test_overload_stays_bounded_by_less() -> None:
    """1.5 times of what the groups can do: without `degrade` the waits grow with the hours, with it they do not."""
    waits = {}
    for name, less in (("whole", None), ("less", {})):
        for hours in (4, 8):
            made = fleet(8, demand={"load": 1.5, "may_degrade": 1.0}, hours=hours, degrade=less)
            result = played(made)
            waits[name, hours] = rows(made, result)[-1].waits[1]
            assert result.level_changes <= 3 + 4 * hours  # the rises of the beginning, then four an hour
            assert any(one.degraded for one in result.outcomes) == (name == "less")
    assert waits["whole", 8] > 1.5 * waits["whole", 4]
    assert waits["less", 8] < 0.3 * waits["whole", 8] and waits["less", 8] < 1.5 * waits["less", 4]


def test_who_agrees_to_nothing_gets_what_they_asked_for() -> None:
    made = fleet(2, demand={"load": 2.0, "may_degrade": 0.5}, degrade={})
    outcomes = played(made).outcomes
    assert any(one.degraded for one in outcomes)
    assert all(one.arrival.may_degrade for one in outcomes if one.degraded)


def test_what_would_wait_too_long_is_refused() -> None:
    made = fleet(2, demand={"load": 2.0}, admission={"max_wait_s": {"batch": 600, "standard": 600}})
    found = {row.name: row for row in rows(made, played(made))}
    assert found["interactive"].refused == 0 and 0.1 < found["batch"].refused < 1
    assert found["standard"].waits[2] < 4 * 600


def test_a_day_and_its_bursts() -> None:
    made = fleet(8, demand={"load": 0.7, "peak": 2.0, "burst_shape": 2.0}, hours=24)
    times = [one.at for one in drawn(made, random.Random(1))]
    night, noon = (sum(hour <= at / 3600 % 24 < hour + 6 for at in times) for hour in (-3, 9))
    assert times == sorted(times) and noon > 3 * night
    owners = [one.owner for one in drawn(made, random.Random(1))]
    assert owners.count("owner0") > 5 * owners.count("owner50") > 0


def test_delays_of_the_scaler() -> None:
    options = Autoscaling(by="work", max_replicas=9, upscale_delay_s=10, downscale_delay_s=100)
    scaler, busy, idle = Scaler(options, 8), Backlog({"standard": 3000.0}, {"standard": 999}, 0, 1.0), Backlog()
    assert [scaler.target(busy, 0, 1, now) for now in (0.0, 9.0, 10.0)] == [1, 1, 9]
    assert [scaler.target(idle, 0, 9, now) for now in (20.0, 119.0, 120.0)] == [9, 9, 1]
    requests = Scaler(Autoscaling(max_replicas=9, upscale_delay_s=0), 8)
    assert requests.target(idle, 7, 1, 0.0) == 4


def test_traces_can_be_kept(tmp_path: Path) -> None:
    made = fleet(hours=1)
    arrivals = list(drawn(made, random.Random(0)))
    write(arrivals, tmp_path / "trace")
    again = recorded(tmp_path / "trace")
    assert [(one.owner, one.priority, one.params) for one in again] == [
        (one.owner, one.priority, one.params) for one in arrivals
    ]
    for line in ("{}", "7", '{"at": 1, "priority": "now"}', '{"at": 1, "width": 7}', '{"at": 1, "colour": 7}', "x"):
        (tmp_path / "trace").write_text(line)
        with pytest.raises(ConfigError, match=r"^--trace has value '.*trace': line 1 cannot be read: "):
            recorded(tmp_path / "trace")


def test_the_command(tmp_path: Path) -> None:
    path, trace = tmp_path / "fleet.yaml", tmp_path / "trace"
    path.write_text("hours: 0.5\ndenoiser: {autoscaling: {min_replicas: 4, max_replicas: 4}}\n")
    shown = CliRunner().invoke(cli, ["simulate", str(path), "--write-trace", str(trace)])
    assert shown.exit_code == 0 and "| all |" in shown.output and "seed 0" in shown.output
    again = CliRunner().invoke(cli, ["simulate", str(path), "--trace", str(trace)])
    assert again.output.splitlines()[1:] == shown.output.splitlines()[1:]
    path.write_text("hour: 1\n")
    with pytest.raises(ConfigError, match="unknown option 'hour'"):
        load_fleet(path)
    path.write_text("fixed_s: 20\n")
    with pytest.raises(ConfigError, match=r"^fixed_s has value 20, expected less than "):
        load_fleet(path)
