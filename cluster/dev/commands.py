"""The commands of `python -m cluster.dev`: several hosts on one machine, from the command line."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Annotated, TypeVar

import typer

from cluster.dev.cluster import Cluster
from cluster.dev.errors import ClusterError, bad_option
from cluster.dev.teardown import leftovers, take_down

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Value = TypeVar("Value")

Name = Annotated[str, typer.Option(help="Name of the cluster: 1 to 8 small letters and digits.")]
Number = Annotated[int, typer.Argument(metavar="N", help="Number of the host; 0 is the head.")]


@cli.callback()
def _main() -> None:
    """Several hosts on one machine, each with an address and a Ray node of its own."""


@cli.command()
def up(
    nodes: Annotated[int, typer.Option(help="Number of hosts.")] = 3,
    name: Name = "dev",
    cpus: Annotated[
        list[str] | None, typer.Option(metavar="[N:]COUNT", help="CPUs of all hosts, or of host N.")
    ] = None,
    gpus: Annotated[
        list[str] | None, typer.Option(metavar="[N:]COUNT", help="GPUs to declare; they need not exist.")
    ] = None,
    labels: Annotated[list[str] | None, typer.Option(metavar="[N:]KEY=VALUE,...", help="Ray node labels.")] = None,
    resources: Annotated[list[str] | None, typer.Option(metavar="[N:]KEY=AMOUNT,...", help="Ray resources.")] = None,
    redis: Annotated[
        str | None, typer.Option(metavar="HOST:PORT|auto", help="A Redis for the control process; `join 0` needs it.")
    ] = None,
    config: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Ray's internal options.")] = None,
    object_store_mb: Annotated[int, typer.Option(help="Size of Ray's object store on each host.")] = 256,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Ray's dashboard on host 0.")] = False,
    loopback: Annotated[
        bool, typer.Option("--loopback", help="Use no namespaces: all Ray nodes have one address.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is up; `down` takes it down.")] = False,
) -> None:
    """Bring a cluster up, and keep it until Ctrl-C or until somebody takes it down."""
    cluster = Cluster(
        nodes,
        name=name,
        cpus=_each("--cpus", cpus, nodes, _count, 4),
        gpus=_each("--gpus", gpus, nodes, _count, 0),
        labels=_each("--labels", labels, nodes, _pairs, {}),
        resources=_each("--resources", resources, nodes, _amounts, {}),
        redis=redis,
        dashboard=dashboard,
        loopback=loopback or None,
        object_store_mb=object_store_mb,
        config=dict(pair for entry in config or [] for pair in _pairs("--config", entry).items()),
        detached=detach,
        say=_say,
    )
    left_alone = False
    try:
        cluster.up()
        _say(f'in other shells, for clients:  eval "$(python -m cluster.dev env{_named(name)})"')
        if detach:
            _say(f"take it down with:  python -m cluster.dev down{_named(name)}")
        else:
            _say("Ctrl-C takes it down")
            while cluster.exists:
                time.sleep(0.5)
            _say("somebody took it down")
        left_alone = True
    finally:
        if cluster.begun and not left_alone:
            for number in _SIGNALS:  # a second Ctrl-C would leave half of it
                signal.signal(number, signal.SIG_IGN)
            cluster.down()


@cli.command()
def down(
    name: Name = "dev",
    everything: Annotated[bool, typer.Option("--all", help="Take all clusters of this machine down.")] = False,
) -> None:
    """Take a cluster down, or remove what a killed run has left of it."""
    for one in leftovers() if everything else [name]:
        _say(f"{one}: is down, {take_down(one)} processes ended")


@cli.command()
def kill(host: Number, name: Name = "dev") -> None:
    """SIGKILL every process of a host at once."""
    Cluster.attach(name, _say).kill(host)


@cli.command()
def kill_control(name: Name = "dev") -> None:
    """SIGKILL the control process (gcs_server) of host 0; `join 0` starts it again."""
    Cluster.attach(name, _say).kill_control()


@cli.command()
def cut(
    host: Number,
    name: Name = "dev",
    seconds: Annotated[float | None, typer.Option(min=0, help="Put the link up again after this long.")] = None,
) -> None:
    """Take a host's link down."""
    Cluster.attach(name, _say).cut(host, seconds)


@cli.command()
def join(host: Number, name: Name = "dev") -> None:
    """Put a host's link up again, and start its Ray node if it does not run."""
    Cluster.attach(name, _say).join(host)
    _say(f"host {host}: is alive")


@cli.command()
def status(name: Name = "dev") -> None:
    """Show each host as this machine and as the control process see it."""
    cluster = Cluster.attach(name)
    try:
        alive = {node.host for node in cluster.view(2) if node.alive}
    except ClusterError as error:
        _say(str(error))
        alive = None
    for host in cluster.nodes:
        spec = host.spec
        declared = [f"{spec.cpus} CPUs", f"{spec.gpus} GPUs", *(f"{key}={value}" for key, value in spec.labels.items())]
        declared += [f"{key}={amount:g}" for key, amount in spec.resources.items()]
        seen = "unknown" if alive is None else "alive" if host.index in alive else "dead"
        link = "cut" if host.is_cut else "linked"
        print(f"{host.index}  {host.ip:15} {seen:8} {link:7} {len(host.pids()):3} processes  {', '.join(declared)}")


@cli.command()
def env(name: Name = "dev") -> None:
    """Print the environment variables that clients need, for `eval`."""
    for variable, value in Cluster.attach(name).variables.items():
        print(f"export {variable}={shlex.quote(value)}")


@cli.command(context_settings={"ignore_unknown_options": True})
def run(host: Number, command: Annotated[list[str], typer.Argument()], name: Name = "dev") -> None:
    """Run a command inside a host: `run 0 -- serve run configs/tiny.yaml`."""
    cluster = Cluster.attach(name)
    argv = cluster.inside(host, command)
    os.execvpe(argv[0], argv, cluster.inner_env(host))


def _each(
    option: str, entries: list[str] | None, nodes: int, parse: Callable[[str, str], Value], default: Value
) -> dict[int, Value]:
    """Return `[N:]VALUE` entries as a mapping by host. Later entries replace earlier ones."""
    values = dict.fromkeys(range(nodes), default)
    for entry in entries or []:
        host, colon, value = entry.partition(":")
        if colon and not host.isdigit():
            raise bad_option(option, entry, "[N:]VALUE, N being the number of a host")
        if colon and int(host) >= nodes:
            raise bad_option(option, entry, f"a host from 0 to {nodes - 1}")
        for one in [int(host)] if colon else range(nodes):
            values[one] = parse(option, value if colon else entry)
    return values


def _count(option: str, value: str) -> int:
    if not value.isdigit():
        raise bad_option(option, value, "a whole number, 0 or more")
    return int(value)


def _pairs(option: str, value: str) -> dict[str, str]:
    pairs = dict(entry.partition("=")[::2] for entry in value.split(","))
    if not all(key and text for key, text in pairs.items()):
        raise bad_option(option, value, "KEY=VALUE,...")
    return pairs


def _amounts(option: str, value: str) -> dict[str, float]:
    try:
        return {key: float(amount) for key, amount in _pairs(option, value).items()}
    except ValueError:
        raise bad_option(option, value, "KEY=AMOUNT,... with numbers") from None


def _named(name: str) -> str:
    return "" if name == "dev" else f" --name {name}"


def _say(line: str) -> None:
    print(line, flush=True)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line: an error becomes one line."""
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    try:
        sys.exit(cli(standalone_mode=False))
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, ClusterError) and not hasattr(error, "format_message"):
            raise
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        print(f"cluster: {message}", file=sys.stderr)
        sys.exit(2)
