"""The `wan-serve` command, assembled from its groups, and its entry point."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer

from serve_app import __version__
from serve_app.cli.canary import canary, generations
from serve_app.cli.degrade import degrade
from serve_app.cli.doctor import doctor
from serve_app.cli.jobs import jobs
from serve_app.cli.keys import keys
from serve_app.cli.manifests import manifests
from serve_app.cli.plan import plan
from serve_app.cli.prepare import prepare
from serve_app.cli.serve import check, demo, up
from serve_app.cli.simulate import simulate
from serve_app.cli.status import status
from serve_app.cli.verify import verify
from serve_app.cli.videos import generate, videos

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@cli.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Serve Wan2.2 text-to-video on Ray. An error is one line; `--debug` shows its traceback."""


@cli.command()
def version() -> None:
    """Print the version."""
    print(__version__)


for _command in (plan, simulate, check, up, demo, status, generate, prepare, degrade, manifests, doctor, verify):
    cli.command()(_command)
cli.add_typer(videos, name="videos")
cli.add_typer(jobs, name="jobs")
cli.add_typer(keys, name="keys")
cli.add_typer(canary, name="canary")
cli.add_typer(generations, name="generations")


def main() -> None:
    """Run the command line: an error becomes one line, and `--debug` anywhere keeps its traceback."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sys.exit(cli(arguments, standalone_mode=False))  # None, or the status of an early exit such as Ctrl-C
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        message = error.format_message() if hasattr(error, "format_message") else str(error) or repr(error)
        print(f"wan-serve: {message}", file=sys.stderr)
        sys.exit(2 if hasattr(error, "format_message") else 1)


def _interrupt(signum: int, frame: Any) -> NoReturn:
    sys.exit(128 + signum)
