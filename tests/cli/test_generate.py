"""`wan-serve generate` and `wan-serve videos` against the application on a real socket."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import openai
from typer.testing import CliRunner

from serve_app.cli import cli
from serve_app.errors import ServeAppError
from tests.gateway.conftest import Server
from tests.support.fakes import until


async def command(url: str, *words: str | Path) -> tuple[int, str]:
    """Run `wan-serve` against a server in a thread of this process, and return its status and output."""
    result = await asyncio.to_thread(CliRunner().invoke, cli, [*map(str, words), "--url", url])
    if isinstance(result.exception, ServeAppError):
        return 1, f"{result.output}wan-serve: {result.exception}\n"
    return result.exit_code, result.output


async def generate(url: str, out: Path, *arguments: str) -> tuple[int, str]:
    return await command(url, "generate", "a cat", "-o", out, *arguments)


async def test_videos(server: Server, client: openai.AsyncOpenAI, tmp_path: Path, held: asyncio.Event) -> None:
    url, out = str(client.base_url).removesuffix("/v1/"), tmp_path / "out.mp4"
    first = (await server.create(prompt="一只猫\nin two lines", seed=5))["id"]

    async def begun() -> bool:
        return len(server.pipeline.jobs) > 0

    await until(begun)
    await server.store.pause()
    second = (await server.create(prompt="waits"))["id"]
    status, said = await command(url, "videos", "list")
    heading, *lines = said.splitlines()
    assert status == 0 and heading.split() == ["ID", "CREATED", "STATUS", "DONE", "SIZE", "LENGTH", "PROMPT"]
    assert [line.split()[0] for line in lines] == [second, first] and "一只猫 in two lines" in lines[1]
    assert "paused" in lines[0] and "paused" not in lines[1]
    status, said = await command(url, "videos", "list", "--limit", "1")
    assert f"… and more: --after {second}" in said and first not in said
    assert first in (await command(url, "videos", "list", "--after", second))[1]
    assert (await command(url, "videos", "cancel", second)) == (0, f"{second}: cancelled\n")
    assert (await command(url, "videos", "cancel", second)) == (0, f"{second}: has ended already, cancelled\n")
    status, said = await command(url, "videos", "download", second, "-o", out)
    assert status == 1 and f"{second} was cancelled: Cancelled before it started." in said and not out.exists()
    assert "cancelled" in (await command(url, "videos", "list"))[1]
    await server.store.resume()
    fetching = asyncio.create_task(command(url, "videos", "download", first, "-o", out))  # which waits for its end
    held.set()
    status, said = await fetching
    assert status == 0 and out.stat().st_size == 200_192, said
    status, said = await command(url, "videos", "download", first, "--variant", "thumbnail", "-o", out)
    assert status == 0 and out.read_bytes() == b"\xff\xd8 thumbnail", said
    status, said = await command(url, "videos", "show", first)
    assert (status, json.loads(said)["seed"]) == (0, 5)
    status, said = await command(url, "videos", "remix", first, "a dog", "-o", out)
    remixed = said.splitlines()[0]
    job = await server.store.get(remixed)
    assert status == 0 and job is not None and (job.remixed_from, job.params["seed"]) == (first, 5), said
    assert (await command(url, "videos", "delete", first)) == (0, f"{first}: deleted\n")
    for verb in ("show", "delete", "cancel", "download"):
        assert (await command(url, "videos", verb, first)) == (1, f"wan-serve: There is no video '{first}'.\n")


async def test_priority_and_deadline(server: Server, client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    url, out = str(client.base_url).removesuffix("/v1/"), tmp_path / "out.mp4"
    status, said = await generate(url, out, "--priority", "interactive", "--deadline", "60")
    assert status == 0 and out.stat().st_size == 200_192, said
    job = (await server.store.list())[0][0]
    assert job.priority == "interactive" and job.deadline_at is not None and 55 < job.deadline_at - job.created_at < 65
    status, said = await generate(url, out, "--priority", "high")
    assert (status, said.count("\n")) == (1, 1) and "'priority' has value 'high'" in said, said
    status, said = await generate(url, out, "--deadline", "-1")
    assert (status, said.count("\n")) == (1, 1) and "'deadline_s' is -1.0, expected" in said, said
    server.pipeline.gate = asyncio.Event()
    status, said = await generate(url, out, "--deadline", "2")
    assert status == 1 and "Its deadline passed while it ran." in said, said
