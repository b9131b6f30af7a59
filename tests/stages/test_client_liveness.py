from __future__ import annotations

import subprocess
import sys


def test_outside_of_ray_nothing_is_asked_and_no_ray_is_started() -> None:
    code = (
        "import ray\n"
        "from serve_app.replica import this_process\n"
        "assert this_process() is None and not ray.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
