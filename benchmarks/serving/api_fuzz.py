"""Throws generated requests at the API and looks for answers that its OpenAPI does not describe.

    python -m benchmarks.serving.api_fuzz [--cases 6000] [--seed 1] [--url http://127.0.0.1:8000] [--key wan_...]

Without `--url` it starts the application in this process, with keys, over a pipeline without a model. Requests are made
by schemathesis from /openapi.json, half of them as described and half in breach of it. Where a route names a video,
half of the time one that is there is put in. Found is: any 500; a status or content type that is not described; a body
that does not fit its schema; an error that is no envelope.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis.strategies import SearchStrategy
from schemathesis.checks import CheckFunction
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.machine import describe

_CHECKS: list[CheckFunction] = [status_code_conformance, content_type_conformance, response_schema_conformance]
_TIMEOUT_S = 60


@dataclass
class Report:
    """Statuses by operation, and what was found: a description to the requests that showed it."""

    statuses: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def cases(self) -> int:
        """Return the number of requests that were sent."""
        return sum(sum(counter.values()) for counter in self.statuses.values())


def fuzz(url: str, cases: int, seed: int = 1, key: str | None = None) -> Report:
    """Send about `cases` requests to a server.

    Args:
        url: address of the server.
        cases: number of requests.
        seed: of the requests.
        key: an API key, if the server wants one.
    """
    report = Report()
    draw = random.Random(seed)
    session = requests.Session()
    session.trust_env = False
    if key is not None:
        session.headers["authorization"] = f"Bearer {key}"
    known = [_create(session, url) for _ in range(5)]
    found: Any = schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()
    operations = [result.ok() for result in found]
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            strategy = operation.as_strategy(generation_mode=mode)
            send = partial(
                _send, label=operation.label, url=url, session=session, report=report, known=known, draw=draw
            )
            with suppress(hypothesis.errors.Unsatisfiable):  # without parameters it cannot be called wrongly
                _run(strategy, send, max(cases // len(operations) // 2, 1), draw.getrandbits(32))
    return report


def _run(strategy: SearchStrategy[Any], send: Callable[[Any], None], times: int, seed: int) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=times,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=strategy)
    def all_of_them(case: Any) -> None:
        send(case)

    all_of_them()


def _send(
    case: Any,
    *,
    label: str,
    url: str,
    session: requests.Session,
    report: Report,
    known: list[str],
    draw: random.Random,
) -> None:
    if "video_id" in (case.path_parameters or {}) and draw.random() < 0.5:
        case.path_parameters["video_id"] = draw.choice(known)
    if label.startswith("DELETE"):
        known.append(_create(session, url))
        del known[0]
    case.headers = {name: value for name, value in (case.headers or {}).items() if name.lower() != "authorization"}
    try:
        answer = case.call(base_url=url, session=session, timeout=_TIMEOUT_S)
    except (requests.exceptions.InvalidHeader, UnicodeError):
        return  # cannot be said in HTTP
    status = answer.status_code
    report.statuses[label][status] += 1
    sent = case.as_curl_command()[:300]
    if status == 500:
        report.found[f"{label}: 500"].append(sent)
    for check in _CHECKS:
        try:
            case.validate_response(answer, checks=[check])
        except (AssertionError, schemathesis.errors.SchemathesisError, ExceptionGroup) as error:
            reason = str(getattr(error, "exceptions", [error])[0]).splitlines()[0]
            report.found[f"{label}: {status}: {check.__name__}: {reason}"].append(sent)
    if status >= 400:
        kind = "".join(answer.headers.get("content-type", ""))
        envelope = answer.json().get("error") if kind == "application/json" else None
        if not isinstance(envelope, dict) or set(envelope) != {"message", "type", "param", "code"}:
            report.found[f"{label}: {status} without an envelope"].append(sent)


def _create(session: requests.Session, url: str) -> str:
    fields: dict[str, Any] = {"prompt": "a star", "size": "64x64", "num_frames": 5, "num_inference_steps": 2}
    answer = session.post(f"{url}/v1/videos", json=fields, timeout=_TIMEOUT_S)
    answer.raise_for_status()
    return str(answer.json()["id"])


@asynccontextmanager
async def serving(home: str) -> AsyncIterator[tuple[str, str]]:
    """Serve the application with keys on a free port; yield its URL and a key."""
    import uvicorn

    from serve_app.config import AuthConfig, Config, DispatcherConfig, Limits
    from serve_app.dispatch import dispatcher
    from serve_app.gateway.app import create_app
    from serve_app.jobs.store import JobStore
    from serve_app.storage import Storage
    from tests.support.fakes import FakePipeline

    config = Config(
        home=home,
        auth=AuthConfig(mode="keys"),
        limits=Limits(queued_jobs=1_000_000),
        dispatcher=DispatcherConfig(poll_s=0.2, running_jobs=16, late_outputs_s=0),
    )
    store, storage = JobStore(config.store_url, 0), Storage(config.storage_url)
    await store.start()
    driver = dispatcher.Dispatcher(store, storage, FakePipeline(storage), config.dispatcher)
    driver.start()

    async def wake() -> None:
        driver.wake()

    async def ready() -> str | None:
        return None

    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(config, store, storage, wake, ready)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    text = (await store.keys.create("fuzz", ["create", "read"]))[1]
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", text
    server.should_exit = True
    await task
    await driver.stop()
    await store.close()


async def own(cases: int, seed: int) -> Report:
    """Run `fuzz` on a server of its own."""
    with tempfile.TemporaryDirectory() as home:
        async with serving(home) as (url, key):
            return await asyncio.to_thread(fuzz, url, cases, seed, key)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cases", type=int, default=6000)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--url", help="of a server that runs already")
    arguments.add_argument("--key")
    options = arguments.parse_args()
    began = time.monotonic()
    if options.url:
        report = fuzz(options.url, options.cases, options.seed, options.key)
    else:
        report = asyncio.run(own(options.cases, options.seed))
    print(f"\n{describe()}, schemathesis {schemathesis.__version__}; seed {options.seed}\n")
    print("| operation | cases | answers |\n|---|---|---|")
    for label, counter in sorted(report.statuses.items()):
        answers = ", ".join(f"{status}: {count}" for status, count in sorted(counter.items()))
        print(f"| {label} | {sum(counter.values())} | {answers} |")
    print(f"\n{report.cases} cases in {time.monotonic() - began:.0f} s, {len(report.found)} findings")
    for what, requests_ in report.found.items():
        print(f"\n{what} ({len(requests_)} times)\n  {requests_[0]}")
    sys.exit(bool(report.found))


if __name__ == "__main__":
    main()
