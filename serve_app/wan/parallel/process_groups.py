"""This process's place among the ranks of its group, and the process groups along the axes of the mesh."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch

from serve_app.compat.model import collectives_begun, disable_compiled_operators, shared_memory_all_reduce
from serve_app.errors import ConfigError
from serve_app.wan.parallel import collectives, symmetric_memory
from serve_app.wan.parallel.mesh import AXES, AxisName, Mesh


@dataclass(frozen=True)
class Axis:
    """The ranks that differ from this one along one axis of the mesh. `group` is None where there is no other."""

    size: int = 1
    index: int = 0
    group: Any | None = None

    def gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of all ranks, in the order of their indices; all are of one shape and dtype."""
        if self.group is None:
            return [part]
        return collectives.gather(part, self.group)


@dataclass(frozen=True)
class ProcessGroups:
    """This process's place in its group, with a process group along each axis."""

    rank: int
    mesh: Mesh
    device: torch.device
    axes: dict[AxisName, Axis]

    @classmethod
    def alone(cls, device: torch.device) -> Self:
        """Return a group of one."""
        return cls(0, Mesh(), device, {axis: Axis() for axis in AXES})

    @property
    def guidance(self) -> Axis:
        """The ranks with the other half of guidance, for the same tokens and shards."""
        return self.axes["guidance"]

    @property
    def sequence(self) -> Axis:
        """The ranks with the other sequence shards."""
        return self.axes["sequence"]

    @property
    def tensor(self) -> Axis:
        """The ranks with the other shards of the weights."""
        return self.axes["tensor"]

    @property
    def exchanged(self) -> int:
        """Number of messages and collectives that this rank has begun; the same on every rank that is in step."""
        groups = [axis.group for axis in self.axes.values() if axis.group is not None]
        peers = [symmetric_memory.of(group.group_name) for group in groups]
        begun = sum(one.exchanged for one in peers if one is not None)
        return begun + sum(collectives_begun(group) for group in groups)

    def close(self) -> None:
        """Leave the group. The process cannot join another one afterwards."""
        symmetric_memory.forget()
        if self.mesh.ranks > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def init_process_groups(
    rank: int,
    mesh: Mesh,
    address: str,
    port: int,
    device: torch.device,
    timeout_s: float,
    peers: bool = True,
) -> ProcessGroups:
    """Join the group of ranks that share an expert; return when all of them are there.

    Args:
        rank: this process's number, from 0.
        mesh: the mesh of the group.
        address: host at which rank 0 listens, as the other ranks reach it.
        port: TCP port at which rank 0 listens.
        device: this rank's device.
        timeout_s: bound for the others to come, and for each later communication with them.
        peers: let ranks of tensor parallelism use symmetric memory if their devices can.

    Raises:
        torch.distributed.DistError: the group did not come together in time.
    """
    if mesh.ranks == 1:
        return ProcessGroups.alone(device)
    cuda = device.type == "cuda"
    os.environ["LOCAL_RANK"] = str(device.index or 0) if cuda else "0"
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(mesh.ranks)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")  # a CPU group may run where there is a GPU
    if not cuda:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_towards(address, port))
    import deepspeed  # only now: it reads DS_ACCELERATOR when imported, and a group of one does without it

    accelerator = deepspeed.accelerator.get_accelerator().device_name()
    if accelerator != device.type:
        raise RuntimeError(f"DeepSpeed was imported earlier, for {accelerator!r}; set DS_ACCELERATOR={device.type}")
    # DeepSpeed's own CPU all-reduce works through shared memory: it needs ranks on one host, and a C++ compiler and
    # ninja when first used. An empty table of compatible operators leaves gloo, and saves the probing of all compilers.
    disable_compiled_operators()
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
        init_method=f"tcp://{f'[{address}]' if ':' in address else address}:{port}",
        rank=rank,
        world_size=mesh.ranks,
    )
    if shared_memory_all_reduce() is not None:
        raise RuntimeError("DeepSpeed's shared-memory all-reduce is on although it was disabled; is its version newer?")
    if cuda:
        torch.cuda.set_device(device)
    groups = ProcessGroups(rank, mesh, device, {axis: _join(axis, rank, mesh, timeout_s) for axis in AXES})
    if cuda and groups.tensor.group is not None:
        symmetric_memory.connect(groups.tensor.group, device, timeout_s, peers)
    return groups


def _join(axis: AxisName, rank: int, mesh: Mesh, timeout_s: float) -> Axis:
    """The group along an axis. Every rank takes part in making every group, in one order."""
    found = Axis()
    if mesh.size(axis) > 1:
        for line in mesh.lines(axis):
            # Where one line holds all ranks their own group does: one NCCL communicator, with its buffers, instead of
            # two.
            whole = mesh.size(axis) == mesh.ranks
            group = (
                torch.distributed.group.WORLD
                if whole
                else torch.distributed.new_group(line, timeout=timedelta(seconds=timeout_s))
            )
            if rank in line:
                found = Axis(mesh.size(axis), mesh.index(axis, rank), group)
    return found


def _interface_towards(address: str, port: int) -> str:
    """The network interface whose IP address this host uses to reach `address`.

    Gloo would take the one that the host's name resolves to, which on many machines is the loopback one: ranks on other
    hosts then wait for it in vain.
    """
    import psutil

    family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing: it only looks up the route
        own = ipaddress.ip_address(probe.getsockname()[0])
    loopback = ""
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            with suppress(ValueError):  # link-layer addresses
                ip = ipaddress.ip_address(entry.address.split("%")[0])
                if ip == own:
                    return name
                loopback = name if ip.is_loopback else loopback
    if own.is_loopback and loopback:
        return loopback  # 127.0.0.2 and the like belong to it without being listed
    raise ConfigError(f"rank address has value {address!r}, expected one reached through an interface of this host")
