"""How long until it serves, and whether the first request pays for it.

    python -m benchmarks.serving.cold_start [--starts 3]

Cold start is from `wan-serve up configs/tiny.yaml` (what `make serve` runs) to `/readyz` answering 200. Then ten
requests one after the other: a warmed-up server answers the first as fast as the tenth.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.machine import describe
from benchmarks.serving.serving_tax import request
from serve_app.launch.address import free_port


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--starts", type=int, default=3)
    options = arguments.parse_args()
    print(f"\n{describe()}; {options.starts} starts\n", flush=True)
    print("| start | ready after s | first request s | tenth s | median of 2 to 10 s | first / median |")
    print("|---|---|---|---|---|---|", flush=True)
    for start in range(options.starts):
        port = free_port()
        with tempfile.TemporaryDirectory() as home:
            began = time.perf_counter()
            server = subprocess.Popen(
                [
                    Path(sys.executable).parent / "wan-serve",
                    "up",
                    "configs/tiny.yaml",
                    "--own-ray",
                    "--port",
                    str(port),
                ],
                env={**os.environ, "WAN_SERVE_HOME": home},
                stdout=subprocess.DEVNULL,
            )
            try:
                while not ready(f"http://127.0.0.1:{port}/readyz"):
                    assert server.poll() is None, "the server ended"
                    time.sleep(0.05)
                cold = time.perf_counter() - began
                times = [request(f"http://127.0.0.1:{port}") for _ in range(10)]
            finally:
                server.send_signal(signal.SIGINT)
                server.wait(60)
        others = statistics.median(times[1:])
        print(
            f"| {start + 1} | {cold:.1f} | {times[0]:.2f} | {times[-1]:.2f} | {others:.2f} | {times[0] / others:.3f} |",
            flush=True,
        )


def ready(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    main()
