"""Profiles of a rank's steps: a table of kernels for each step, written to a file.

Imports torch where it is used, as `rank` does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve_app.errors import ConfigError, one_line
from serve_app.logs import get_logger

logger = get_logger(__name__)

_ROWS = 60


class StepProfile:
    """Writes `<folder>/<sample>/step<number>-rank<rank>-<seconds>s.txt` after each step.

    The table lists kernels, on a CPU operators, by the time that all calls of each took together.

    Args:
        folder: its absolute path on the rank's host; made if it is not there.
        rank: index in the group.
        device: `cuda` or `cpu`.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: str, rank: int, device: str) -> None:
        self._folder = Path(folder)
        self._rank = rank
        self._device = device
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"denoiser.profile has value '{folder}', expected a folder that can be written to: {error.strerror}"
            ) from None

    @contextmanager
    def step(self, sample: str, number: int) -> Iterator[None]:
        """Measure what runs in the context; it has to wait for the device itself.

        If it raises, nothing is written. If writing fails, that is logged: a step is worth more than its profile.

        Args:
            sample: id of the first sample in the batch.
            number: its step, from 1.
        """
        from torch.profiler import ProfilerActivity, profile

        # The host's side of a GPU's step would be thousands of events that slow it down.
        activities = [ProfilerActivity.CUDA if self._device == "cuda" else ProfilerActivity.CPU]
        with profile(activities=activities) as profiled:
            started = time.perf_counter()
            yield
            seconds = time.perf_counter() - started
        folder = self._folder / re.sub(r"[^\w.-]", "_", sample)
        try:
            table = profiled.key_averages().table(f"self_{self._device}_time_total", _ROWS, max_name_column_width=90)
            folder.mkdir(exist_ok=True)
            (folder / f"step{number:03}-rank{self._rank}-{seconds:.3f}s.txt").write_text(table)
        except Exception as error:
            logger.warning("profile not written", extra={"job": sample, "error": one_line(error)})
