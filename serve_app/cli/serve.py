"""The `wan-serve` command."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from serve_app import __version__
from serve_app.cli.client import Api
from serve_app.cli.jobs import jobs
from serve_app.cli.keys import keys
from serve_app.cli.prepare import prepare
from serve_app.cli.videos import generate, make, report, videos
from serve_app.errors import ConfigError
from serve_app.launch import guard
from serve_app.tiny.vocabulary import NOTE
from serve_app.whole_file import check_target

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(highlight=False)

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
DEMO_PROMPT = "A red circle moves to the right on a white background"


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


@cli.command()
def check(config: Path) -> None:
    """Check a configuration file, and the folders that it names: all that needs neither network nor GPU."""
    from serve_app.config import load_file
    from serve_app.launch.targets import LEFT_OUT, build, where_data_goes

    content, options = load_file(config)
    notes = build(config, content, options).notes
    for line in (*notes, where_data_goes(options), f"not looked at: {LEFT_OUT}; `wan-serve up` does, before it starts"):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"{config}: fine", soft_wrap=True, markup=False)


@cli.command()
def up(
    config: Path,
    port: Annotated[int | None, typer.Option(help="HTTP port, instead of the file's.")] = None,
    own_ray: Annotated[bool, typer.Option("--own-ray", help="Start a Ray even where one is running.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="End or replace the server that runs here.")] = False,
    dashboard: Annotated[bool, typer.Option(help="Run Ray's dashboard, where Ray is started here.")] = True,
) -> None:
    """Serve a configuration until Ctrl-C or SIGTERM, on the Ray that runs here or on one of its own."""
    guard.fork()
    from serve_app.server import Server

    started = time.monotonic()
    say = _Say()
    with Server(config, port=port, own_ray=own_ray, replace=replace, dashboard=dashboard, say=say) as server:
        server.wait_ready()
        for line in server.whereabouts():
            console.print(line, soft_wrap=True, markup=False)
        console.print(
            f"ready{server.url and ' on '}{server.url} after {time.monotonic() - started:.1f} s; Ctrl-C ends it",
            style="bold",
        )
        server.watch()


@cli.command()
def demo(
    prompt: Annotated[str, typer.Argument(help=f"What to draw. {NOTE}")] = DEMO_PROMPT,
    folder: Annotated[Path, typer.Option(help="Where the video goes.")] = Path("out"),
    config: Annotated[Path, typer.Option(help="What to serve.")] = TINY,
) -> None:
    """Start the embedded default, make one video over HTTP, and stop everything again."""
    guard.fork()
    from serve_app.server import Server

    started = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--folder has value '{folder}', expected a folder: {error.strerror}") from None
    check_target(folder / "video.mp4", "--folder", folder)
    say = _Say()
    with Server(config, port=_free_port(), own_ray=True, dashboard=False, say=say) as server:
        server.wait_ready()
        ready = time.monotonic()
        if server.config.model.bundled:
            say(NOTE)
        say(f"asking for: {prompt}")
        with Api(server.url, say=say) as api:
            video = make(api, lambda: api.create({"prompt": prompt}), lambda video: folder / f"{video['id']}.mp4")
        made = time.monotonic()
        say("stopping")
    report(video, folder / f"{video['id']}.mp4")
    console.print(f"start {ready - started:.1f} s, video {made - ready:.1f} s, stop {time.monotonic() - made:.1f} s")


cli.command()(generate)
cli.command()(prepare)
cli.add_typer(videos, name="videos")
cli.add_typer(jobs, name="jobs")
cli.add_typer(keys, name="keys")


class _Say:
    """Prints lines with the seconds since the beginning, so that nobody wonders whether it hangs."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, line: str) -> None:
        console.print(f"[dim]{time.monotonic() - self._started:5.1f} s[/dim]  {escape(line)}", soft_wrap=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _interrupt(signum: int, frame: Any) -> NoReturn:
    sys.exit(128 + signum)


def main() -> None:
    """Entry point: errors become one line, `--debug` anywhere keeps the traceback."""
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
