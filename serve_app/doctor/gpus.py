"""Health of a host's GPUs and of the links between them, as `nvidia-smi` tells it.

Knows neither Ray nor torch, so that it starts no CUDA context beside those that work.
"""

from __future__ import annotations

import csv
import re
import subprocess
from dataclasses import dataclass

_ANSWER_S = 30
# Names that all drivers since 2021 know; one unknown name would refuse the whole query.
_FIELDS = (
    "index",
    "name",
    "driver_version",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "clocks_throttle_reasons.hw_slowdown",
)
_GPU = re.compile(r"GPU (\d+):")
_LINK = re.compile(r"Link \d+: *(.*)")


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        index: number on its host.
        name: model.
        driver: version of the driver.
        celsius: temperature; None if it does not tell.
        memory_errors: uncorrectable memory errors since the driver was loaded; None if it does not tell.
        remapping: a row of its memory waits for a reset of the GPU to be replaced, or could not be replaced.
        lanes: lanes of PCIe that it uses, and those that it has; None if it does not tell.
        slowed: the hardware slows it down, for heat or power.
        links: links of NVLink that work, and all that it has.
    """

    index: int
    name: str
    driver: str
    celsius: int | None = None
    memory_errors: int | None = None
    remapping: bool = False
    lanes: tuple[int, int] | None = None
    slowed: bool = False
    links: tuple[int, int] = (0, 0)


class GpusSick(Exception):
    """An answer of `nvidia-smi` that is none: it hangs, or ends with an error. The message is one line."""


def gpus() -> list[Gpu]:
    """Return the GPUs of this host; none if it has no `nvidia-smi`.

    Raises:
        GpusSick: the driver does not answer.
    """
    try:
        rows = _ask(f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
    except FileNotFoundError:
        return []
    try:
        remapped = _ask(
            "--query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure", "--format=csv,noheader"
        )
    except GpusSick:  # GPUs before Ampere replace no rows
        remapped = ""
    try:
        links = links_of(_ask("nvlink", "--status"))
    except GpusSick:  # as it is called where no GPU has links
        links = {}
    return parse(rows, remapped, links)


def parse(rows: str, remapped: str, links: dict[int, tuple[int, int]]) -> list[Gpu]:
    """Return the GPUs that answers of `nvidia-smi` describe.

    Args:
        rows: a line with the values of `_FIELDS` for each GPU.
        remapped: a line for each GPU: its bus, and whether replacing a row of its memory is pending or has failed.
        links: links that work, and all links, by GPU.

    Raises:
        GpusSick: the rows are something else, such as a sentence.
    """
    waiting = [any(value not in ("", "0", "No", "[N/A]") for value in row[1:]) for row in _table(remapped)]
    found = []
    for number, row in enumerate(_table(rows)):
        if len(row) != len(_FIELDS):
            raise GpusSick(f"nvidia-smi says {', '.join(row)[:100]!r}")
        index, name, driver, celsius, errors, width, most, slowed = row
        lanes = (_number(width), _number(most))
        found.append(
            Gpu(
                index=int(index),
                name=name,
                driver=driver,
                celsius=_number(celsius),
                memory_errors=_number(errors),
                remapping=number < len(waiting) and waiting[number],
                lanes=None if lanes[0] is None or lanes[1] is None else (lanes[0], lanes[1]),
                slowed=slowed == "Active",
                links=links.get(int(index), (0, 0)),
            )
        )
    return found


def links_of(text: str) -> dict[int, tuple[int, int]]:
    """Return the links that work, and all links, of each GPU, from what `nvidia-smi nvlink --status` prints."""
    found: dict[int, tuple[int, int]] = {}
    gpu = None
    for line in text.splitlines():
        if match := _GPU.match(line.strip()):
            gpu = int(match[1])
            found[gpu] = (0, 0)
        elif gpu is not None and (match := _LINK.match(line.strip())):
            works = match[1].split()[0].replace(".", "").isdigit()
            found[gpu] = (found[gpu][0] + works, found[gpu][1] + 1)
    return found


def _ask(*arguments: str) -> str:
    try:
        ended = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_ANSWER_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise GpusSick(f"nvidia-smi does not answer within {_ANSWER_S} s") from None
    if ended.returncode:
        said = (ended.stdout + ended.stderr).strip().splitlines()
        raise GpusSick(f"nvidia-smi ended with {ended.returncode}: {said[-1] if said else 'no message'}")
    return ended.stdout


def _table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None
