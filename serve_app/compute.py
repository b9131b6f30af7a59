"""Where a process does its math: on which device, and in which thread."""

from __future__ import annotations

import asyncio
import gc
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from serve_app.compat import set_cuda_allocator
from serve_app.errors import ConfigError

if TYPE_CHECKING:
    import torch

SEE_ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Environment of processes that shall see them: Ray hides from one with a share of a GPU all others of its host."""

P = ParamSpec("P")
T = TypeVar("T")

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "status_alloc_failed", "bad_alloc")
# All that oneDNN says when it was refused memory. It was seen to.
_OUT_OF_MEMORY_ALONE = ("could not create a primitive", "could not execute a primitive")

_ALLOCATOR = "expandable_segments:True"
"""Setting of torch for CUDA memory: freed memory can then be had again in other sizes. `benchmarks.model.vae_decode`
prints what the allocator holds beside what is allocated."""
_ALLOCATOR_OPTIONS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where whoever deploys says otherwise."""


def pick_device(wanted: str) -> torch.device:
    """The device that the configuration names; `auto` is CUDA where there is one, because nothing else is as fast."""
    import torch

    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    # Ray shows a process its own devices alone, or they are the first. What sets limits wants to be told which.
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


def pick_devices(wanted: str, count: int, own: Sequence[str] = ()) -> list[torch.device]:
    """So many devices of the kind that the decoder's configuration names.

    Args:
        own: what Ray gave this process, of the GPUs that it sees, as `CUDA_VISIBLE_DEVICES` names them. With several
            devices the first is among these, and those behind it follow.

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
    """Let this process see all GPUs of its host, the one that is its own as the first; before anything asks CUDA.

    Whoever shows its device's memory to others looks at how the devices are joined, see
    `serve_app.wan.parallel.symmetric_memory`.

    Args:
        own: what Ray gave this process, as `CUDA_VISIBLE_DEVICES` names it; empty where it has none.
        there: GPUs of the host that Ray knows of.
    """
    if own:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        everyone = visible.split(",") if visible else [str(index) for index in range(there)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join([*own, *(one for one in everyone if one not in own)])


def limit_memory(device: torch.device, fraction: float) -> float:
    """Let this process take so much of a device's memory, and fail as if it had no more.

    Returns:
        Bytes that it may take; infinite on a CPU.
    """
    import torch

    if device.type != "cuda":
        return math.inf
    if not any(name in os.environ for name in _ALLOCATOR_OPTIONS):
        set_cuda_allocator(_ALLOCATOR)
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    return fraction * torch.cuda.get_device_properties(device).total_memory


def settle() -> None:
    """Take all objects that are there now out of the garbage collector's rounds; for when first-time work is done.

    A round through all that a rank has imported takes a good part of a second
    (benchmarks/results/2026-11-26-a14b-2xh200.md), in which it gives its GPU nothing to do.
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
    """Whether an allocation failed, on a device or on the host.

    By text as well: neither the CPU's allocator nor the libraries behind the layers have an exception of their own.
    """
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    said = text in _OUT_OF_MEMORY_ALONE or any(words in text for words in _OUT_OF_MEMORY)
    return isinstance(error, RuntimeError) and said


class MathThread:
    """The one thread that does a replica's math, so that its event loop stays free to answer health checks and to
    collect the next batch.

    Args:
        threads: CPU threads that one operation may use; 0 is all cores.
    """

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(1, "math", initializer=set_threads, initargs=(threads,))

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run there and wait."""
        return self._executor.submit(function, *args, **kwargs).result()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run there without holding up the event loop."""
        return await asyncio.wrap_future(self._executor.submit(function, *args, **kwargs))
