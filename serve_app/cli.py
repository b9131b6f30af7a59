"""The `wan-serve` command."""

from __future__ import annotations

import signal
import socket
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from serve_app import __version__
from serve_app.cli_jobs import jobs
from serve_app.cli_keys import keys
from serve_app.cli_prepare import prepare
from serve_app.errors import ServeAppError
from serve_app.tiny.vocabulary import NOTE

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
cli.add_typer(jobs, name="jobs")
cli.add_typer(keys, name="keys")
cli.command()(prepare)
console = Console(highlight=False)

Url = Annotated[str, typer.Option(help="Where the server listens.")]
ApiKey = Annotated[str | None, typer.Option("--key", envvar="WAN_SERVE_KEY", help="API key, where it wants one.")]
DEFAULT_URL = "http://127.0.0.1:8000"
TINY = Path(__file__).parent.parent / "configs" / "tiny.yaml"
DEMO_PROMPT = "A red circle moves to the right on a white background"


@cli.callback()
def _main() -> None:
    """Serve Wan2.2 text-to-video on Ray. An error is one line; `--debug` shows its traceback."""


@cli.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@cli.command()
def check(config: Path) -> None:
    """Check a configuration file: every key, every value, before anything starts."""
    from serve_app.config import load_file

    load_file(config)
    console.print(f"{config}: fine")


@cli.command()
def up(
    config: Path,
    port: Annotated[int | None, typer.Option(help="HTTP port, instead of the file's.")] = None,
    own_ray: Annotated[bool, typer.Option("--own-ray", help="Start a Ray even where one is running.")] = False,
    dashboard: Annotated[bool, typer.Option(help="Run Ray's dashboard, where Ray is started here.")] = True,
) -> None:
    """Serve a configuration until Ctrl-C, on the Ray that runs here or on one of its own."""
    from serve_app.server import Server

    started = time.monotonic()
    with Server(config, port=port, own_ray=own_ray, dashboard=dashboard, say=_Say()) as server:
        server.wait_ready()
        console.print(f"ready on {server.url} after {time.monotonic() - started:.1f} s; Ctrl-C ends it", style="bold")
        signal.pause()


@cli.command()
def generate(
    prompt: str,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the mp4 goes.")] = Path("out.mp4"),
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
    negative_prompt: Annotated[str | None, typer.Option("--negative")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="4k+1 frames.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Of the high-noise expert.")] = None,
    guidance_2: Annotated[float | None, typer.Option(help="Of the low-noise expert.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same video.")] = None,
    priority: Annotated[str | None, typer.Option(help="interactive, standard or batch.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds from now after which it is of no use.")] = None,
    start_at: Annotated[float | None, typer.Option(help="Seconds since 1970 at which it may begin.")] = None,
) -> None:
    """Make one video on a running server, with a progress bar."""
    fields = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "size": size,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "guidance_scale_2": guidance_2,
        "seed": seed,
        "priority": priority,
        "deadline_s": deadline,
        "start_at": start_at,
    }
    video = _generate(url, {name: value for name, value in fields.items() if value is not None}, out, key)
    _report(video, out)


@cli.command()
def demo(
    prompt: Annotated[str, typer.Argument(help=f"What to draw. {NOTE}")] = DEMO_PROMPT,
    folder: Annotated[Path, typer.Option(help="Where the video goes.")] = Path("out"),
    config: Annotated[Path, typer.Option(help="What to serve.")] = TINY,
) -> None:
    """Start the embedded default, make one video over HTTP, and stop everything again."""
    from serve_app.server import Server

    started = time.monotonic()
    say = _Say()
    with Server(config, port=_free_port(), own_ray=True, dashboard=False, say=say) as server:
        server.wait_ready()
        ready = time.monotonic()
        if server.config.model.bundled:
            say(NOTE)
        say(f"asking for: {prompt}")
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".partial.mp4"
        video = _generate(server.url, {"prompt": prompt}, partial)
        out = partial.rename(folder / f"{video['id']}.mp4")
        made = time.monotonic()
        say("stopping")
    _report(video, out)
    console.print(f"start {ready - started:.1f} s, video {made - ready:.1f} s, stop {time.monotonic() - made:.1f} s")


def _generate(url: str, fields: dict[str, Any], out: Path, key: str | None = None) -> dict[str, Any]:
    """Create, follow and download one video. Returns its resource."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    if key is not None and not key.isascii():
        raise ServeAppError("--key has letters that no key has, expected wan_...")
    if not out.absolute().parent.is_dir() or out.is_dir():  # before a video is made that cannot be kept
        raise ServeAppError(f"--out has value '{out}', expected a file in a folder that is there")
    try:
        client = httpx.Client(base_url=url, timeout=30, headers=headers, follow_redirects=True)
    except httpx.InvalidURL as error:
        raise ServeAppError(f"--url has value {url!r}, expected http://host:port: {error}") from None
    with client as http:
        try:
            video = _checked(http.post("/v1/videos", json=fields))
            video = _follow(http, video)
            if video["status"] == "failed":
                raise ServeAppError(f"{video['id']} failed: {video['error']['message']}")
            with http.stream("GET", f"/v1/videos/{video['id']}/content") as response, out.open("wb") as file:
                response.raise_for_status()
                for chunk in response.iter_bytes():
                    file.write(chunk)
        except httpx.HTTPError as error:
            raise ServeAppError(f"--url has value {url!r}, expected a running server: {error}") from error
    return video


def _follow(http: httpx.Client, video: dict[str, Any]) -> dict[str, Any]:
    """Poll until the end, showing stage and step. A server that restarts in between is waited for."""
    columns = (TextColumn("{task.description:>24}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("queued", total=100)
        patience = time.monotonic() + 60
        pause_s = 0.2
        while video["status"] not in ("completed", "failed"):
            time.sleep(pause_s)
            try:
                response = http.get(f"/v1/videos/{video['id']}")
                video = _checked(response)
                pause_s = min(poll_after_s(response), 0.5)
                patience = time.monotonic() + 60
            except (httpx.TransportError, _Unavailable):
                if time.monotonic() > patience:
                    raise
            step, steps = video.get("step") or 0, video.get("steps") or 0
            text = f"{video.get('stage') or video['status']} step {step} of {steps}" if steps > 1 else video["status"]
            bar.update(task, completed=video["progress"], description=text)
        bar.update(task, completed=video["progress"], description=video["status"])
    return video


def poll_after_s(response: httpx.Response) -> float:
    """When the server wants to be asked again."""
    return float(response.headers.get("openai-poll-after-ms", 1000)) / 1000


class _Unavailable(ServeAppError):
    """The server cannot answer at the moment."""


def _checked(response: httpx.Response) -> dict[str, Any]:
    if response.status_code >= 500:
        raise _Unavailable(f"the server answered {response.status_code}")
    try:
        body: dict[str, Any] = response.json()
        message = body["error"]["message"] if response.status_code >= 400 else None
    except (ValueError, KeyError, TypeError):
        raise ServeAppError(f"--url has value '{response.url}', which is no server of videos") from None
    if message is not None:
        raise ServeAppError(message)
    return body


def _report(video: dict[str, Any], out: Path) -> None:
    times = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in (video.get("timings") or {}).items())
    console.print(f"{out}: {video['size']}, {video['seconds']} s, seed {video['seed']}", style="bold", soft_wrap=True)
    console.print(times, soft_wrap=True)
    for warning in video.get("warnings") or []:
        console.print(f"warning: {escape(warning)}", style="yellow", soft_wrap=True)


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
    raise KeyboardInterrupt


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
    except Exception as error:
        if debug:
            raise
        message = error.format_message() if hasattr(error, "format_message") else str(error) or repr(error)
        print(f"wan-serve: {message}", file=sys.stderr)
        sys.exit(2 if hasattr(error, "format_message") else 1)


if __name__ == "__main__":
    main()
