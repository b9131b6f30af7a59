"""Symmetric memory: memory of each device of a host that the others can access, and copies by the copy engines.

A collective of NCCL is a kernel. It needs the multiprocessors that a matrix product uses, so the two hardly overlap. A
copy between devices joined by NVLink needs none. So ranks of tensor parallelism copy while they multiply: a rank sends
its run of the tokens while it multiplies that run already, and fetches the others' parts of a sum while it computes its
own. The signal that a run has arrived needs no multiprocessor either: a kernel for it would wait for the product that
it should overlap. Products of two runs, which do not wait for each other, go to two streams: where the last tiles of
one leave multiprocessors idle, the other uses them. The memory is that of `torch.distributed._symmetric_memory`.

All ranks make the same calls with the same sizes in the same order, as for collectives. Gathers and sums alternate:
each tells the ranks that the memory of the call before is free again.
"""

from __future__ import annotations

import ctypes
import os
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import torch

from serve_app.compat.model import enable_symmetric_memory, symmetric_workspace
from serve_app.errors import one_line
from serve_app.logs import get_logger
from serve_app.wan.parallel import collectives

logger = get_logger(__name__)

_DIVIDED, _MADE, _THERE = range(3)
"""Channels of signals: before memory is divided anew, before parts of sums are fetched, and when a run has arrived.

The last one and the one after it alternate, since a rank that signals does not look whether its last signal was waited
for."""
_TRIED_RUNS, _TRIED_WIDTH = (64, 1024, 1024, 1024, 64, 64), 256
"""Tokens and features of what is copied once to see that copies work."""
_TRIED_S = 60
"""Seconds to wait for other ranks then. Later ranks may wait for as long as a start takes."""
_NATIVE_ATOMICS = 3
"""CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED, CUDA's name for what signals between two devices need."""
_known: dict[str, SymmetricMemory] = {}


class OutOfStep(RuntimeError):
    """A rank broke off between signals.

    Signals that nobody has waited for would be taken for later ones, so its group is of no use any more.
    """


class SymmetricMemory:
    """The symmetric memory of the ranks of a group.

    Args:
        group: the ranks.
        device: this rank's device.
        timeout_s: seconds to wait for another rank. After that the device is of no use to this process.
    """

    def __init__(self, group: Any, device: torch.device, timeout_s: float) -> None:
        self._group = group
        self._device = device
        self._copies = torch.cuda.Stream(device, priority=-1)
        self._beside = torch.cuda.Stream(device)
        self._gathers = 0
        self._shape: tuple[int, ...] = ()
        self.held_bytes = 0
        """Bytes of this rank's device. torch's allocator does not count them, so its limit is lowered by as much."""
        self.exchanged = 0
        """Number of gathers and sums that were begun."""
        self._hold(1)
        self._timeout_ms = int(1e3 * min(timeout_s, _TRIED_S))
        self._try_signals()
        self._try_copies()
        torch.cuda.synchronize(device)
        self._timeout_ms = int(1e3 * timeout_s)

    def gather(self, own: torch.Tensor, use: Callable[[int, torch.Tensor], None]) -> None:
        """Gather the runs of all ranks and use each: this rank's at once, the others when they have arrived.

        Args:
            own: this rank's run, `[batch, run, features]`, of one shape on all ranks.
            use: called with the rank of each run, and the run. No two calls may write to the same place.
        """
        own = own.contiguous()
        self._divide(own)
        others = [(self._me + step) % self._size for step in range(1, self._size)]
        main, channel = self._main, _THERE + self._gathers % 2
        self.exchanged += 1
        self._gathers += 1
        self._copies.wait_stream(main)
        for place, rank in enumerate(reversed(others)):  # the first place of a rank is for the rank after it, and so on
            self._copy(self._area(rank, own, place), own)
            self._tell(rank, channel)
        events = [self._told(rank, channel) for rank in others]
        try:
            use(self._me, own)
            for place, (rank, event) in enumerate(zip(others, events, strict=True)):
                self._beside.wait_event(event)
                with torch.cuda.stream(self._beside):
                    use(rank, self._area(self._me, own, place))
        finally:  # a failing caller frees memory that is still being read
            main.wait_stream(self._copies)
            main.wait_stream(self._beside)

    def share_products(
        self, hidden: torch.Tensor, weight: torch.Tensor, own: torch.Tensor, others: torch.Tensor
    ) -> None:
        """Compute `hidden @ weight.t()`, a part of a sum, and give each rank all parts for its run of the tokens.

        The products for the others' runs come first; the others fetch them while this rank computes its own.

        Args:
            hidden: `[batch, tokens, own features in]`.
            weight: `[features out, own features in]`.
            own: where to put this rank's part, `[batch, run, features out]`. There are as many runs as ranks; the last
                one may end in rows for no token.
            others: where to put the other ranks' parts, `[other ranks, batch, run, features out]`.

        Raises:
            OutOfStep: the exchange was broken off.
        """
        self._divide(own)
        main, run = self._main, own.shape[1]
        self.exchanged += 1
        self._copies.wait_stream(main)  # it may have used the memory until now
        try:
            for step in range(1, self._size):
                rank = (self._me + step) % self._size
                _multiply(hidden[:, rank * run :], weight, self._area(self._me, own, self._size - 2 + step))
                self._memory.put_signal(rank, _MADE, self._timeout_ms)
            for step, part in enumerate(others, 1):
                rank = (self._me - step) % self._size
                self._told(rank, _MADE)
                self._copy(part, self._area(rank, own, self._size - 2 + step))
            _multiply(hidden[:, self._me * run :], weight, own)
        except Exception as error:
            raise OutOfStep(f"a sum was broken off by {type(error).__name__}: {one_line(error)}") from error
        finally:
            main.wait_stream(self._copies)

    @property
    def _main(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def _divide(self, like: torch.Tensor) -> None:
        """Divide the memory into two places like `like` for each other rank: its run, and a part of its sum."""
        shape = (*like.shape, like.element_size())
        if shape == self._shape:
            return
        if 2 * (self._size - 1) * like.nbytes > self.held_bytes:
            self._hold(2 * (self._size - 1) * like.nbytes)
        self._memory.barrier(_DIVIDED, self._timeout_ms)  # others may still use the old division
        self._shape = shape

    def _area(self, rank: int, like: torch.Tensor, place: int) -> torch.Tensor:
        """Return a place in a rank's memory: first come runs of the ranks after it, then products that they fetch."""
        return self._memory.get_buffer(rank, like.shape, like.dtype, place * like.numel())

    def _copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._copies):
            to.copy_(source)

    def _tell(self, rank: int, channel: int) -> None:
        """Signal to a rank that its copies have arrived, as torch would, but without a kernel."""
        with torch.cuda.stream(self._copies):
            self._memory.stream_write_value32(self._signals(rank), self._size * channel + self._me, 1)

    def _told(self, rank: int, channel: int) -> Any:
        """Wait for a rank's signal before the next copy; return the event of its arrival."""
        with torch.cuda.stream(self._copies):
            self._memory.wait_signal(rank, channel, self._timeout_ms)
        return self._copies.record_event()

    def _signals(self, rank: int, dtype: torch.dtype = torch.uint32) -> torch.Tensor:
        """Return a rank's signals, one of each rank on each channel: 1 from being given until being waited for."""
        signals: torch.Tensor = self._memory.get_signal_pad(rank, (self._size * (_THERE + 2),), dtype)
        return signals

    def _try_signals(self) -> None:
        """Check that `_tell` writes where torch waits for it; all ranks call this."""
        self._memory.put_signal(self._me, _MADE, self._timeout_ms)
        for rank in range(self._size):
            if rank != self._me:
                self._tell(rank, _MADE)
        self._main.wait_stream(self._copies)
        collectives.gather(torch.zeros(1, device=self._device), self._group)
        given = self._signals(self._me, torch.int32)
        found = given.tolist()
        given.zero_()
        right = found == [int(channel == _MADE) for channel in range(_THERE + 2) for _ in range(self._size)]
        if not _all(right, self._group, self._device):
            raise RuntimeError("signals lie elsewhere in this version of torch")

    def _try_copies(self) -> None:
        """Check that gathers and sums are right; all ranks call this."""
        numbers = torch.Generator(self._device).manual_seed(0)
        one = torch.eye(_TRIED_WIDTH, dtype=torch.bfloat16, device=self._device)
        wrong = torch.zeros((), device=self._device)
        for run in _TRIED_RUNS:
            shape = (1, self._size, run, _TRIED_WIDTH)
            # Small enough for bfloat16 to be exact, and the same on all ranks.
            drawn = torch.randint(-2, 3, shape, generator=numbers, device=self._device)
            whole = drawn.bfloat16().flatten(1, 2)
            mine = slice(self._me * run, (self._me + 1) * run)
            found, parts = torch.empty_like(whole), whole.new_empty(self._size, 1, run, _TRIED_WIDTH)

            def use(rank: int, rows: torch.Tensor, found: torch.Tensor = found, run: int = run) -> None:
                found[:, rank * run : (rank + 1) * run] = rows

            self.gather(whole[:, mine], use)
            self.share_products(whole * (self._me + 1), one, parts[0], parts[1:])
            times = self._size * (self._size + 1) // 2
            wrong += (found != whole).any() | (parts.sum(0) != whole[:, mine] * times).any()
        if wrong:
            raise RuntimeError("what is copied between devices is not what it was")

    def _hold(self, size: int) -> None:
        """Hold at least `size` bytes; all ranks call this."""
        torch.cuda.empty_cache()  # what the allocator keeps for later may be what is missing
        self._memory: Any = symmetric_workspace(self._group.group_name, size)
        self._me, self._size = self._memory.rank, self._memory.world_size
        # A device may still be clearing its signals, so that those given before would be lost.
        collectives.gather(torch.zeros(1, device=self._device), self._group)
        more, self.held_bytes = self._memory.buffer_size - self.held_bytes, self._memory.buffer_size
        share = torch.cuda.get_per_process_memory_fraction(self._device)
        whole = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.0, share - more / whole), self._device)


def connect(group: Any, device: torch.device, timeout_s: float, wanted: bool = True) -> None:
    """Give the ranks of a group symmetric memory if it is wanted and their devices can; all of them call this.

    Raises:
        RuntimeError: the device is of no use to this process any more.
    """
    made, why = None, _missing(group, device) if wanted else "asked for"
    if wanted and _all(why is None, group, device):
        os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")  # each calls its own device the first
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # newer versions of torch do without
                enable_symmetric_memory(group.group_name)
            made = SymmetricMemory(group, device, timeout_s)
        except Exception as error:  # whatever versions of torch and drivers come up with
            why = one_line(error)
            if "CUDA error" in why or "CUDA driver error" in why:  # after which nothing on the device succeeds
                raise RuntimeError(f"{why}; denoiser.symmetric_memory: false does without what failed") from error
        if _all(made is not None, group, device) and made is not None:
            _known[group.group_name] = made
    used = "copies between devices" if of(group.group_name) else "NCCL"
    logger.info("exchange", extra={"used": used, "reason": why or ("NVLink" if made else "another rank cannot")})


def of(group_name: str) -> SymmetricMemory | None:
    """Return the symmetric memory of a group; None where its ranks use collectives."""
    return _known.get(group_name)


def forget() -> None:
    """Drop the symmetric memory of all groups, when the groups of this process end."""
    _known.clear()


def _missing(group: Any, device: torch.device) -> str | None:
    """Return why the other ranks' devices cannot access this one's memory; None if they can."""
    own = _uuid(device.index)
    everyone = [bytes(one.tolist()) for one in collectives.gather(torch.tensor(list(own), device=device), group)]
    if len(set(everyone)) < len(everyone):
        return "ranks share a device"
    try:
        seen = {_uuid(index): index for index in range(torch.cuda.device_count())}
        if any(one not in seen for one in everyone):
            return "ranks are on several hosts, or do not see each other's devices"
        for one in everyone:
            if one != own and not _joined(device.index, seen[one]):
                return f"devices {device.index} and {seen[one]} are not joined by NVLink"
    except Exception as error:  # the other ranks wait for what this one says
        return one_line(error)
    return None


def _uuid(index: int) -> bytes:
    return uuid.UUID(str(torch.cuda.get_device_properties(index).uuid)).bytes


def _joined(first: int, second: int) -> bool:
    """Tell whether a device can access another one's memory, with atomic operations, which signals need."""
    if not torch.cuda.can_device_access_peer(first, second):
        return False
    atomics = ctypes.c_int(0)
    failed = ctypes.CDLL("libcuda.so.1").cuDeviceGetP2PAttribute(ctypes.byref(atomics), _NATIVE_ATOMICS, first, second)
    return not failed and bool(atomics.value)


def _all(said: bool, group: Any, device: torch.device) -> bool:
    """Tell whether all ranks say yes."""
    return all(bool(one) for one in collectives.gather(torch.tensor([said], device=device), group))


def _multiply(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Put the product of each sample, `[tokens, features]`, into `out`, which may have fewer rows, or more."""
    for rows, found in zip(hidden, out, strict=True):
        rows = rows[: len(found)]
        torch.mm(rows, weight.t(), out=found[: len(rows)])
        found[len(rows) :] = 0
