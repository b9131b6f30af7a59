"""A real Prometheus on loopback, from Debian's package, which is unpacked and not installed, and its promtool."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.plain_http import http
from tests.support.ports import free_port

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "serve_app" / "prometheus"


@pytest.fixture(scope="session")
def prometheus_bin() -> Path:
    """A folder with `prometheus` and `promtool`: of this machine, or unpacked once into the user's cache."""
    try:
        return find()
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or error
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no Prometheus: {said}")
        raise


def find() -> Path:
    """Return a folder with the two programs, downloaded if this machine has none.

    Raises:
        OSError, subprocess.SubprocessError: they cannot be had.
    """
    if found := shutil.which("promtool"):
        return Path(found).parent
    if not (_CACHE / "promtool").exists():
        _unpack()
    return _CACHE


def _unpack() -> None:
    """Download Debian's package and keep its two programs."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    whole = _CACHE / f"new-{os.getpid()}"
    whole.mkdir(exist_ok=True)
    options: dict[str, Any] = {"cwd": whole, "check": True, "capture_output": True, "text": True, "timeout": 300}
    try:
        subprocess.run(["apt-get", "download", "prometheus"], **options)
        package = next(whole.glob("prometheus_*.deb"))
        subprocess.run(["dpkg", "-x", package, "."], **options)
        for name in ("prometheus", "promtool"):  # promtool last: it says that both are there
            (whole / "usr/bin" / name).replace(_CACHE / name)
    finally:
        shutil.rmtree(whole)


@dataclass
class Prometheus:
    """A Prometheus that runs.

    Attributes:
        url: that of its API.
    """

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an instant query, each with `metric` and `value`."""
        return list(self._ask("query", {"query": expression})["result"])

    def value(self, expression: str) -> float:
        """Return the number of the only series of a query."""
        (one,) = self.query(expression)
        return float(one["value"][1])

    def range(self, expression: str, start: float, end: float, step_s: float) -> list[dict[str, Any]]:
        """Return the series of a query over a span of time, each with `metric` and `values`."""
        span = {"query": expression, "start": start, "end": end, "step": step_s}
        return list(self._ask("query_range", span)["result"])

    def rules(self) -> list[dict[str, Any]]:
        """Return all rules, once each has been evaluated."""
        deadline = time.monotonic() + 60
        while True:
            rules = [rule for group in self._ask("rules", {})["groups"] for rule in group["rules"]]
            if rules and all(rule["health"] != "unknown" for rule in rules):
                return rules
            assert time.monotonic() < deadline, rules
            time.sleep(0.3)

    def wait(self, expression: str, timeout_s: float = 90) -> list[dict[str, Any]]:
        """Return the series of a query as soon as there are any."""
        deadline = time.monotonic() + timeout_s
        while not (found := self.query(expression)):
            assert time.monotonic() < deadline, f"no data within {timeout_s} s: {expression}"
            time.sleep(0.3)
        return found

    def _ask(self, what: str, parameters: dict[str, Any]) -> dict[str, Any]:
        answer = http.get(f"{self.url}/api/v1/{what}", params=parameters, timeout=30)
        assert answer.status_code == 200, f"{parameters}: {answer.text}"
        return dict(answer.json()["data"])


@contextmanager
def scraping(bin_folder: Path, folder: Path, target: str, rules: Path | None = None) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes one target every second.

    Args:
        bin_folder: where its program is.
        folder: where its configuration, data and log go.
        target: host and port.
        rules: a file of rules that it evaluates.
    """
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "5s"},
        "rule_files": [str(rules)] if rules else [],
        "scrape_configs": [
            {
                "job_name": "ray",
                "static_configs": [{"targets": [target]}],
                "metric_relabel_configs": [{"action": "labeldrop", "regex": "otel_scope_.*|SessionName|Version"}],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    port = free_port()
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                bin_folder / "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_ready(f"http://127.0.0.1:{port}", process, folder / "prometheus.log")
            yield Prometheus(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(60)


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            if http.get(f"{url}/-/ready", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.05)


def promtool(bin_folder: Path, *arguments: str | Path) -> str:
    """Run promtool and return what it printed; a failure fails the test."""
    done = subprocess.run([bin_folder / "promtool", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{json.dumps([str(one) for one in arguments])}\n{done.stdout}{done.stderr}"
    return done.stdout
