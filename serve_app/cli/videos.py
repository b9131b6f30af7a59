"""`wan-serve generate` and `wan-serve videos`: a client of a running server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from serve_app.cli.client import DEFAULT_URL, Api, ApiKey, Url, shown_status
from serve_app.cli.parameters import FpsOut, finish_field, with_parameters
from serve_app.cli.table import one_cell, print_table
from serve_app.errors import ServeAppError
from serve_app.whole_file import check_target

videos = typer.Typer(no_args_is_help=True, help="Look at the videos of a running server, fetch them, or cancel them.")
# Results are for scripts and go to stdout; progress and notes go to stderr.
console = Console(highlight=False)
progress = Console(highlight=False, stderr=True)

VideoId = Annotated[str, typer.Argument(metavar="ID", help="A video's id, as `generate` and `videos list` print it.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="File for the mp4.")]
Variant = Literal["video", "thumbnail", "spritesheet", "plain", "preview", "stills"]
_SUFFIXES = {
    "thumbnail": "-thumbnail.jpg",
    "spritesheet": "-spritesheet.jpg",
    "plain": "-plain.mp4",
    "stills": "-stills.zip",
}


@with_parameters
def generate(
    prompt: str,
    out: Out = Path("out.mp4"),
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
    fps_out: FpsOut = None,
    **fields: Any,
) -> None:
    """Make one video on a running server, with a progress bar. The first line on stdout is its id, printed at once."""
    fields["finish"] = finish_field(fields["finish"], fps_out)
    given = {"prompt": prompt, **{name: value for name, value in fields.items() if value is not None}}
    check_target(out, "--out")
    with _api(url, key) as api:
        report(make(api, lambda: api.create(given), lambda video: out), out)


@videos.command("list")
def list_videos(
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Largest number of videos to list.")] = 20,
    after: Annotated[str | None, typer.Option(metavar="ID", help="Begin after this video.")] = None,
    order: Annotated[Literal["asc", "desc"], typer.Option(help="By age; desc lists the newest first.")] = "desc",
) -> None:
    """List videos by age."""
    with _api(url, key) as api:
        page = api.list(after, limit, order)
    rows = [
        (
            video["id"],
            datetime.fromtimestamp(video["created_at"]).astimezone().isoformat(" ", "seconds"),
            shown_status(video),
            f"{video['progress']} %",
            video["size"],
            f"{video['seconds']} s",
            one_cell(video.get("prompt") or ""),
        )
        for video in page["data"]
    ]
    print_table(("ID", "CREATED", "STATUS", "DONE", "SIZE", "LENGTH", "PROMPT"), rows)
    if page["has_more"]:
        print(f"… and more: --after {page['last_id']}")


@videos.command()
def show(video_id: VideoId, url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """Show the resource of a video, as JSON."""
    with _api(url, key) as api:
        print(json.dumps(api.get(video_id), indent=2, ensure_ascii=False))


@videos.command()
def cancel(video_id: VideoId, url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """Cancel a video that waits or runs. One that has ended stays as it is."""
    with _api(url, key) as api:
        before = shown_status(api.get(video_id))
        if before in ("completed", "failed", "cancelled"):
            print(f"{video_id}: has ended already, {before}")
            return
        after = shown_status(api.cancel(video_id))
    print(f"{video_id}: {after if after == 'cancelled' else 'ends at its next step'}")


@videos.command()
def delete(video_id: VideoId, url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """Delete a video and its files for good. A running one is stopped first."""
    with _api(url, key) as api:
        api.delete(video_id)
    print(f"{video_id}: deleted")


@videos.command()
def download(
    video_id: VideoId,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write; ID.mp4 if not given.")] = None,
    variant: Annotated[Variant, typer.Option(help="The file to fetch.")] = "video",
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
) -> None:
    """Wait until a video is completed, and write it to a file."""
    with _api(url, key) as api:
        video = api.get(video_id)
        target = Path(f"{video_id}{_suffix(video, variant)}") if out is None else out
        check_target(target, "--out")
        _finish(api, video, target, variant)
    console.print(f"{target}: {target.stat().st_size} bytes", style="bold", soft_wrap=True, markup=False)


@videos.command()
def remix(
    video_id: VideoId, prompt: str, out: Out = Path("out.mp4"), url: Url = DEFAULT_URL, key: ApiKey = None
) -> None:
    """Make a video with the parameters and the seed of another one, and a new prompt. Prints its id first."""
    check_target(out, "--out")
    with _api(url, key) as api:
        report(make(api, lambda: api.remix(video_id, prompt), lambda video: out), out)


def make(api: Api, create: Callable[[], dict[str, Any]], target: Callable[[dict[str, Any]], Path]) -> dict[str, Any]:
    """Create a video, print its id, wait for its end and write its file.

    Args:
        api: the server.
        create: queues the video and returns its resource.
        target: returns the file for a video.

    Returns:
        The resource of the completed video.
    """
    try:
        video = create()
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, and SIGTERM
        progress.print("interrupted; `wan-serve videos list` shows whether a video was queued", soft_wrap=True)
        raise
    return _finish(api, video, target(video), announce=True)


def report(video: dict[str, Any], out: Path) -> None:
    """Print a completed video's warnings, file, size, length, seed and times."""
    for warning in video.get("warnings") or []:
        progress.print(f"warning: {warning}", soft_wrap=True, markup=False)
    times = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in (video.get("timings") or {}).items())
    size = video["size"]
    if (made := video.get("finished")) is not None:
        size = f"{made['width']}x{made['height']} at {made['fps']} fps"
    said = f"{out}: {size}, {video['seconds']} s, seed {video['seed']}"
    console.print(said, style="bold", soft_wrap=True, markup=False)
    console.print(times, soft_wrap=True)


def _suffix(video: dict[str, Any], variant: str) -> str:
    """Return the end of the file's name for a variant of a video."""
    encode = (video.get("finish") or {}).get("encode") or {}
    if variant == "preview":
        return f"-preview.{encode.get('preview') or 'webp'}"
    return _SUFFIXES.get(variant, f".{encode.get('container') or 'mp4'}")


def _api(url: str, key: str | None) -> Api:
    return Api(url, key, lambda line: progress.print(line, soft_wrap=True, markup=False))


def _finish(
    api: Api, video: dict[str, Any], out: Path, variant: str = "video", *, announce: bool = False
) -> dict[str, Any]:
    """Follow a video to its end, write its file and return its resource. `announce` prints its id first."""
    video_id = video["id"]
    more = ("-o", str(out), *(() if variant == "video" else ("--variant", variant)))
    fetch, stop = api.command("download", video_id, *more), api.command("cancel", video_id)
    with _telling_how_to_go_on(f"{video_id} goes on: `{fetch}` waits for it, `{stop}` stops it"):
        if announce:
            print(video_id, flush=True)
        video = _follow(api, video)
    if video["status"] == "failed":
        verb = "was cancelled" if shown_status(video) == "cancelled" else "failed"
        raise ServeAppError(f"{video_id} {verb}: {(video.get('error') or {}).get('message', 'no reason given')}")
    with _telling_how_to_go_on(f"{video_id} is made: `{fetch}` fetches it"):
        api.download(video_id, out, variant)
    return video


@contextmanager
def _telling_how_to_go_on(how: str) -> Iterator[None]:
    """Say how to go on, if the block is interrupted or fails."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, and SIGTERM
        progress.print(f"interrupted; {how}", soft_wrap=True, markup=False)
        raise
    except ServeAppError as error:
        raise ServeAppError(f"{error}; {how}") from error


def _follow(api: Api, video: dict[str, Any]) -> dict[str, Any]:
    """Wait for the end of a video, showing stage and step, and return its last resource."""
    if video["status"] in ("completed", "failed"):
        return video
    columns = (TextColumn("{task.description:>24}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=progress) as bar:
        task = bar.add_task(shown_status(video), total=100)
        for state in api.follow(video):
            step, steps = state.get("step") or 0, state.get("steps") or 0
            text = f"{state.get('stage') or state['status']} step {step} of {steps}" if steps > 1 else ""
            if state["status"] != "in_progress" or not text:
                text = shown_status(state)
            if text == "paused":
                text = "paused by an operator"
            bar.update(task, completed=state["progress"], description=text)
            video = state
    return video
