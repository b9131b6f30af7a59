"""`wan-serve generate` and `wan-serve videos` against servers that misbehave, on real sockets."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from serve_app.cli import cli
from serve_app.cli.client import Api, retry_after_s, shown_status
from serve_app.errors import ServeAppError
from tests.support import warm_command
from tests.support.scripted import BYTES, VIDEO_ID, Reply, refusal, resource, scripted

CREATE, GET, CONTENT = "POST /v1/videos", f"GET /v1/videos/{VIDEO_ID}", f"GET /v1/videos/{VIDEO_ID}/content"
PLAY = {
    CREATE: [Reply(body=resource("queued"))],
    GET: [Reply(body=resource("in_progress")), Reply(body=resource("completed", progress=100))],
    CONTENT: [Reply(body=BYTES)],
}


def play(**changes: list[Reply]) -> dict[str, list[Reply]]:
    """Return a script in which all goes well, except for the given replies."""
    names = {"create": CREATE, "get": GET, "content": CONTENT}
    return {**{what: list(replies) for what, replies in PLAY.items()}, **{names[n]: r for n, r in changes.items()}}


def start(url: str, *words: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "serve_app.cli", *map(str, words), "--url", url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(url: str, *words: str | Path) -> tuple[int, str, str]:
    done = warm_command.run(*words, "--url", url)
    return done.returncode, done.stdout, done.stderr


def invoke(url: str, *words: str | Path) -> tuple[int, str, str]:
    """Do the same as `run` in this process, which is faster, for tests without signals and pipes."""
    result = CliRunner().invoke(cli, [*map(str, words), "--url", url])
    if isinstance(result.exception, ServeAppError):
        return 1, result.stdout, f"{result.stderr}wan-serve: {result.exception}\n"
    return result.exit_code, result.stdout, result.stderr


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_id_comes_first_and_alone(tmp_path: Path) -> None:
    with scripted(play()) as script:
        status, out, err = run(
            script.url, "generate", "a cat", "-o", tmp_path / "out.mp4", "--frames", "5", "--fps", "8"
        )
    assert status == 0, err
    assert out.splitlines()[0] == VIDEO_ID and "seed 7" in out
    assert (tmp_path / "out.mp4").read_bytes() == BYTES and names(tmp_path) == ["out.mp4"]
    what, headers, body = script.asked[0]
    assert what == CREATE and len(headers["idempotency-key"]) == 32
    assert json.loads(body) == {"prompt": "a cat", "num_frames": 5, "fps": 8}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (Reply(body=BYTES, cut=1000), "the download broke off"),
        (Reply(body=BYTES, headers={"content-length": str(len(BYTES) + 1)}), "the download broke off"),
        (refusal(404, "The video is no longer stored."), "The video is no longer stored."),
        (Reply(500, b"<html>"), "the server answered 500"),
        (refusal(503, "Later.", retry_after="3600"), "Later."),
    ],
    ids=["cut", "short", "gone", "proxy", "busy"],
)
def test_a_broken_download_leaves_the_old_file(
    tmp_path: Path, broken: Reply, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.cli.client._RETRY_FOR_S", 0.2)
    out = tmp_path / "my out.mp4"
    out.write_bytes(b"old")
    with scripted(play(content=[broken])) as script:
        with Api(script.url) as api, pytest.raises(ServeAppError, match=said):
            api.download(VIDEO_ID, out)
        if broken.status == 200:
            status, printed, err = run(script.url, "generate", "a cat", "-o", out)
            assert (status, printed.split()) == (1, [VIDEO_ID])
            fetch = f"wan-serve videos download {VIDEO_ID} -o '{out}' --url {script.url}"
            line = err.splitlines()[-1]
            assert line.startswith("wan-serve: ") and said in line and fetch in line, err
    assert out.read_bytes() == b"old" and names(tmp_path) == ["my out.mp4"]


def test_ctrl_c_while_it_downloads(tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    out.write_bytes(b"old")
    with scripted(play(), hold=CONTENT) as script:
        process = start(script.url, "generate", "a cat", "-o", out)
        assert script.held.wait(60)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"wan-serve videos download {VIDEO_ID} -o {out}" in err
    assert out.read_bytes() == b"old" and names(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_how_to_go_on(tmp_path: Path, end: signal.Signals) -> None:
    with scripted(play(get=[Reply(body=resource("in_progress"))])) as script:
        process = start(script.url, "generate", "a cat", "-o", tmp_path / "out.mp4")
        assert process.stdout is not None and process.stdout.readline().strip() == VIDEO_ID  # while it is being made
        process.send_signal(end)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + end
    assert f"`wan-serve videos download {VIDEO_ID} -o {tmp_path}/out.mp4 --url {script.url}` waits for it" in err
    assert f"`wan-serve videos cancel {VIDEO_ID} --url {script.url}` stops it" in err
    assert names(tmp_path) == []


def test_ctrl_c_before_there_is_an_id(tmp_path: Path) -> None:
    with scripted(play(), hold=CREATE) as script:
        process = start(script.url, "generate", "a cat", "-o", tmp_path / "out.mp4")
        assert script.held.wait(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "") and "wan-serve videos list" in err


def test_what_cannot_be_written_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with scripted(play()) as script:
        for out in (tmp_path, tmp_path / "nowhere" / "out.mp4", Path("/proc/out.mp4")):
            for command in (("generate", "a cat"), ("videos", "remix", VIDEO_ID, "a dog")):
                status, printed, err = invoke(script.url, *command, "-o", out)
                assert (status, printed, err.count("\n")) == (1, "", 1) and f"--out has value '{out}'" in err, err
    assert script.asked == []


def test_retry_after_is_obeyed(tmp_path: Path) -> None:
    busy = refusal(429, "Too many jobs wait.", retry_after="1", x_should_retry="true")
    fast = refusal(429, "Too many calls.", retry_after="1", x_should_retry="true")
    away = refusal(503, "The store is away.", retry_after="1")
    replies = play(
        create=[busy, PLAY[CREATE][0]], get=[PLAY[GET][0], fast, away, PLAY[GET][1]], content=[fast, PLAY[CONTENT][0]]
    )
    began = time.monotonic()
    with scripted(replies) as script:
        status, _, err = invoke(script.url, "generate", "a cat", "-o", tmp_path / "out.mp4")
    assert status == 0 and (tmp_path / "out.mp4").read_bytes() == BYTES, err
    assert time.monotonic() - began > 4
    for said in ("Too many jobs wait.", "Too many calls.", "The store is away."):
        assert said in err.replace("\n", " "), err
    keys = [headers["idempotency-key"] for what, headers, _ in script.asked if what == CREATE]
    assert len(keys) == 2 and len(set(keys)) == 1


@pytest.mark.parametrize(
    "refused",
    [
        refusal(429, "GPU seconds are used up.", retry_after="3600", x_should_retry="false"),
        refusal(503, "Nobody knows.", retry_after="1", x_should_retry="false"),
        refusal(400, "'size' is wrong."),
        refusal(401, "The key is unknown."),
    ],
    ids=["long", "hopeless", "wrong", "key"],
)
def test_what_no_retry_helps_is_said_at_once(tmp_path: Path, refused: Reply) -> None:
    with scripted(play(create=[refused])) as script:
        status, out, err = invoke(script.url, "generate", "a cat", "-o", tmp_path / "out.mp4")
    assert (status, out, err) == (1, "", f"wan-serve: {refused.body['error']['message']}\n")
    assert script.count(CREATE) == 1


def test_a_server_that_restarts_is_waited_for(tmp_path: Path) -> None:
    lost = [Reply(body=resource("in_progress")), Reply(cut=-1)]
    with scripted(play(get=lost)) as first:
        process = start(first.url, "generate", "a cat", "-o", tmp_path / "out.mp4")
        while first.count(GET) < 2:
            time.sleep(0.01)
    time.sleep(1.5)  # nobody listens meanwhile
    with scripted(play(get=[Reply(502, b"<html>"), PLAY[GET][1]]), port=int(first.url.rpartition(":")[2])):
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "out.mp4").read_bytes() == BYTES, out + err


def test_a_server_that_stays_away_leaves_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.cli.client._RETRY_FOR_S", 0.5)
    with scripted(play(get=[Reply(cut=-1)])) as script, Api(script.url) as api:
        states = api.follow(api.create({"prompt": "a cat"}))
        assert next(states)["status"] == "queued"
        with pytest.raises(ServeAppError, match="expected a running server"):
            next(states)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ({"code": "cancelled", "message": "Cancelled while it ran."}, "was cancelled: Cancelled while it ran."),
        ({"code": "out_of_memory", "message": "It is too large."}, "failed: It is too large."),
    ],
)
def test_a_video_that_has_no_file(tmp_path: Path, error: dict[str, str], said: str) -> None:
    (tmp_path / "out.mp4").write_bytes(b"old")
    with scripted(play(get=[Reply(body=resource("failed", error=error))])) as script:
        status, _, err = invoke(script.url, "generate", "a cat", "-o", tmp_path / "out.mp4")
    assert status == 1 and err.splitlines()[-1] == f"wan-serve: {VIDEO_ID} {said}"
    assert (tmp_path / "out.mp4").read_bytes() == b"old"


def test_whoever_reads_the_id_may_leave(tmp_path: Path) -> None:
    with scripted(play(), hold=GET) as script:
        process = start(script.url, "generate", "a cat", "-o", tmp_path / "out.mp4")
        assert process.stdout is not None and process.stdout.readline().strip() == VIDEO_ID
        process.stdout.close()
        script.release.set()
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
        process.wait(60)
    assert (tmp_path / "out.mp4").read_bytes() == BYTES


def test_no_server_of_videos(tmp_path: Path) -> None:
    with scripted({CREATE: [Reply(body=b"<html>")], "GET /v1/videos": [Reply(body=[1])]}) as script:
        status, _, err = invoke(script.url, "generate", "a cat", "-o", tmp_path / "out.mp4")
        assert status == 1 and "which is no server of videos" in err and err.count("\n") == 1
        status, _, err = invoke(script.url, "videos", "list")
        assert status == 1 and "which is no server of videos" in err and err.count("\n") == 1
    for url in (script.url, "127.0.0.1:1", "http://[", "ftp://x"):
        status, _, err = invoke(url, "videos", "list")
        assert status == 1 and f"--url has value '{url}'" in err and err.count("\n") == 1, err
    status, _, err = invoke(script.url, "videos", "show", "../models")
    assert status == 1 and "ID has value '../models', expected that of a video" in err


def test_times_and_words() -> None:
    def wait_s(said: str | None) -> float:
        return retry_after_s(httpx.Response(429, headers={} if said is None else {"retry-after": said}))

    assert [wait_s(said) for said in (None, "", "soon", "nan", "7", "0", "-3")] == [1, 1, 1, 1, 7, 0.1, 0.1]
    assert 50 < wait_s(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert shown_status(resource("failed", error={"code": "cancelled", "message": ""})) == "cancelled"
    assert shown_status(resource("queued", paused=True)) == "paused"
    assert [shown_status(resource(status)) for status in ("queued", "failed")] == ["queued", "failed"]


def test_an_address_with_v1_is_the_same_server() -> None:
    with scripted({GET: [Reply(body=resource("queued"))]}) as script:
        for url in (script.url, f"{script.url}/", f"{script.url}/v1", f"{script.url}/v1/"):
            with Api(url) as api:
                assert api.get(VIDEO_ID)["id"] == VIDEO_ID
