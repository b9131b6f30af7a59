"""The device and the thread on which a process does its math."""

from __future__ import annotations

import asyncio
import gc
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from serve_app.compat.model import set_cuda_allocator
from serve_app.errors import ConfigError

if TYPE_CHECKING:
    import torch

SEE_ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Environment of processes that shall see all GPUs of their host: Ray shows a process only those it gave to it."""

P = ParamSpec("P")
T = TypeVar("T")

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "status_alloc_failed", "bad_alloc")
# The whole message of oneDNN when memory was refused, as observed.
_OUT_OF_MEMORY_ALONE = ("could not create a primitive", "could not execute a primitive")

_ALLOCATOR = "expandable_segments:True"
"""Setting of torch for CUDA memory: freed memory can then be had again in other sizes. `benchmarks.model.vae_decode`
prints what the allocator holds beside what is allocated."""
_ALLOCATOR_OPTIONS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables by which a deployer chooses other settings."""


def pick_device(wanted: str) -> torch.device:
    """Return the device that the configuration names; `auto` is CUDA where there is one, else the CPU."""
    import torch

    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    # A process's own devices are the only ones it sees, or the first. Setting limits needs an index.
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


def pick_devices(wanted: str, count: int, own: Sequence[str] = ()) -> list[torch.device]:
    """Return `count` devices of the kind that the decoder's configuration names.

    Args:
        wanted: the kind, see `pick_device`.
        count: number of devices.
        own: the GPUs that Ray gave this process, as `CUDA_VISIBLE_DEVICES` names them. With several devices the first
            is one of these, and the next ones of the host follow.

    Raises:
        ConfigError: there are fewer.
    """
    import torch

    first = pick_device(wanted)
    if count == 1:
        return [first]
    there = torch.cuda.device_count() if first.type == "cuda" else 0
    if there < count:
        raise ConfigError(f"decoder.devices has value {count}, expected at most {there}, the GPUs it sees")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(there)))
    start = min((visible.split(",").index(one) for one in own), default=0)
    return [torch.device("cuda", (start + place) % there) for place in range(count)]


def see_own_first(own: Sequence[str], there: int) -> None:
    """Let this process see all GPUs of its host, its own first. Call this before anything asks CUDA.

    Symmetric memory needs it, since it looks at how the devices are joined, see
    `serve_app.wan.parallel.symmetric_memory`.

    Args:
        own: the GPUs that Ray gave this process, as `CUDA_VISIBLE_DEVICES` names them; empty where it has none.
        there: number of GPUs of the host that Ray knows of.
    """
    if own:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        everyone = visible.split(",") if visible else [str(index) for index in range(there)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join([*own, *(one for one in everyone if one not in own)])


def limit_memory(device: torch.device, fraction: float) -> float:
    """Limit this process to a fraction of a device's memory; it fails beyond that as if the device had no more.

    Returns:
        Bytes that the process may take; infinite on a CPU.
    """
    import torch

    if device.type != "cuda":
        return math.inf
    if not any(name in os.environ for name in _ALLOCATOR_OPTIONS):
        set_cuda_allocator(_ALLOCATOR)
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    return fraction * torch.cuda.get_device_properties(device).total_memory


def settle() -> None:
    """Exempt all present objects from garbage collection, once first-time work is done.

    A collection that goes through all that a rank has imported takes a good part of a second
    (benchmarks/results/2026-11-26-a14b-2xh200.md), in which its GPU idles.
    """
    gc.collect()
    gc.freeze()


def set_threads(threads: int) -> None:
    """Let the calling thread use this many CPU threads for math (0: all cores), and no autograd.

    Both are properties of the thread that calls. Ray starts processes with one thread per reserved CPU, which a
    stage that reserves a fraction of a CPU does not want.
    """
    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)
    torch.set_grad_enabled(False)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that an allocation failed, on a device or on the host.

    Texts count as well: neither the CPU's allocator nor the libraries behind the layers have their own exception.
    """
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    said = text in _OUT_OF_MEMORY_ALONE or any(words in text for words in _OUT_OF_MEMORY)
    return isinstance(error, RuntimeError) and said


class MathThread:
    """The one thread that does a replica's math.

    The replica's event loop stays free to answer health checks and to collect the next batch.

    Args:
        threads: CPU threads that one operation may use; 0 is all cores.
    """

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(1, "math", initializer=set_threads, initargs=(threads,))

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function in the thread and wait for its result."""
        return self._executor.submit(function, *args, **kwargs).result()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function in the thread without blocking the event loop."""
        return await asyncio.wrap_future(self._executor.submit(function, *args, **kwargs))
