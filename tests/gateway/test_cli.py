"""`wan-serve generate` against the application on a real socket."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import openai

from tests.gateway.conftest import Server


async def generate(url: str, out: Path, *arguments: str) -> tuple[int | None, str]:
    command = (sys.executable, "-m", "serve_app.cli", "generate", "a cat", "-o", str(out), "--url", url, *arguments)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    return process.returncode, said.decode()


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
