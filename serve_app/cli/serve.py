"""`wan-serve check`, `up` and `demo`: look at a configuration, serve it, or try the embedded default."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from serve_app.cli.client import Api
from serve_app.cli.parameters import FpsOut, finish_field
from serve_app.cli.videos import make, report
from serve_app.errors import ConfigError
from serve_app.launch import guard, shipped
from serve_app.launch.address import free_port
from serve_app.tiny.vocabulary import NOTE
from serve_app.whole_file import check_target

console = Console(highlight=False)

TINY = shipped.folder() / "tiny.yaml"
DEMO_PROMPT = "A red circle moves to the right on a white background"

ConfigArgument = Annotated[
    Path, typer.Argument(callback=shipped.config_file, help="A file, or the name of a shipped one, such as `tiny`.")
]


def check(
    config: ConfigArgument,
    gpu: Annotated[
        str | None, typer.Option(help="Kind of GPU that it has to fit on, such as `h100-80`; else this machine's.")
    ] = None,
) -> None:
    """Check a configuration file and the folders that it names, without network, and what fits on a GPU."""
    from serve_app.config import load_file
    from serve_app.launch.gpu_fit import cards_here, check_gpus
    from serve_app.launch.targets import LEFT_OUT, build, where_data_goes
    from serve_app.model import makes_videos
    from serve_app.planning.cards import card

    content, options = load_file(config)
    notes = build(config, content, options).notes
    if makes_videos(content):
        check_gpus(options, [card(gpu)] if gpu is not None else cards_here(options))
    for line in (*notes, where_data_goes(options), f"not looked at: {LEFT_OUT}; `wan-serve up` does, before it starts"):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"{config}: fine", soft_wrap=True, markup=False)


def up(
    config: ConfigArgument,
    port: Annotated[int | None, typer.Option(help="HTTP port, instead of the file's.")] = None,
    own_ray: Annotated[bool, typer.Option("--own-ray", help="Start a Ray even if one is running here.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="First end the server that runs here.")] = False,
    dashboard: Annotated[bool, typer.Option(help="Run Ray's dashboard, if Ray is started here.")] = True,
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


def demo(
    prompt: Annotated[str, typer.Argument(help=f"What to draw. {NOTE}")] = DEMO_PROMPT,
    folder: Annotated[Path, typer.Option(help="Folder for the video.")] = Path("out"),
    config: Annotated[Path, typer.Option(callback=shipped.config_file, help="The configuration to serve.")] = TINY,
    fps_out: FpsOut = None,
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
    with Server(config, port=free_port(), own_ray=True, dashboard=False, say=say) as server:
        server.wait_ready()
        ready = time.monotonic()
        if server.config.model.bundled:
            say(NOTE)
        say(f"asking for: {prompt}")
        with Api(server.url, say=say) as api:
            asked = {"prompt": prompt, **({} if fps_out is None else {"finish": finish_field(None, fps_out)})}
            video = make(api, lambda: api.create(asked), lambda video: folder / f"{video['id']}.mp4")
        made = time.monotonic()
        say("stopping")
    report(video, folder / f"{video['id']}.mp4")
    console.print(f"start {ready - started:.1f} s, video {made - ready:.1f} s, stop {time.monotonic() - made:.1f} s")


class _Say:
    """Prints a line after the seconds since the start, so that nobody wonders whether it hangs."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, line: str) -> None:
        console.print(f"[dim]{time.monotonic() - self._started:5.1f} s[/dim]  {escape(line)}", soft_wrap=True)
