"""Names that libraries keep to themselves, and that the service cannot do without; one function for each.

Each function says which library's name it uses, the version it was tested with, and what is lost without it.
`tests/test_compat.py` has a test for each, which fails first and by name when an upgrade removes the name.

Knows nothing of the service. Libraries are imported when a function is called, since few processes need all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# --- torch 2.13 ---


def set_cuda_allocator(settings: str) -> None:
    """Set options of the CUDA allocator in a running process.

    Uses `torch._C._accelerator_setAllocatorSettings`. Without it the options have to be in the environment of every
    process that uses CUDA before it imports torch.

    Args:
        settings: as in `PYTORCH_ALLOC_CONF`.
    """
    import torch

    torch._C._accelerator_setAllocatorSettings(settings)


def collectives_begun(group: Any) -> int:
    """Return the number of collectives that this rank has begun in a process group.

    Uses `ProcessGroup._get_sequence_number_for_group` of torch. Without it ranks that got out of step are noticed only
    when a collective times out.
    """
    return int(group._get_sequence_number_for_group())


def process_group(name: str) -> Any:
    """Return the process group of a name.

    Uses `torch.distributed.distributed_c10d._resolve_process_group`. Without it an operator of torch, which takes no
    process group as an argument, needs a table of its own.
    """
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type,unused-ignore]


def linear_gelu(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return GELU of a linear layer, computed by the kernel of the matrix product.

    On CUDA alone it is the tanh approximation.

    Uses `torch._addmm_activation`. Without it GELU is a kernel of its own, which reads and writes the widest tensor of
    a block once more.

    Args:
        rows: `[rows, features in]`.
        weight: `[features out, features in]`.
        bias: `[features out]`.
        out: where to put the result, `[rows, features out]`.
    """
    import torch

    result: torch.Tensor = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True, out=out)
    return result


def enable_symmetric_memory(group_name: str) -> None:
    """Let the ranks of a process group allocate memory that all of them can access.

    Uses `torch.distributed._symmetric_memory.enable_symm_mem_for_group`. Without it ranks that share weights exchange
    by NCCL alone, whose kernels take multiprocessors from the products (`denoiser.symmetric_memory: false`).
    """
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group_name)  # type: ignore[arg-type,unused-ignore]


def symmetric_workspace(group_name: str, size: int) -> Any:
    """Return the symmetric memory of a process group, of `size` bytes at least; all ranks call this.

    Uses `torch.distributed._symmetric_memory.get_symm_mem_workspace`, and of what it returns `SYMMETRIC_METHODS`.
    Without it see `enable_symmetric_memory`.
    """
    from torch.distributed import _symmetric_memory

    return _symmetric_memory.get_symm_mem_workspace(group_name, size)  # type: ignore[arg-type,unused-ignore]


SYMMETRIC_METHODS = (
    "rank",
    "world_size",
    "buffer_size",
    "barrier",
    "put_signal",
    "wait_signal",
    "stream_write_value32",
    "get_buffer",
    "get_signal_pad",
)
"""What is used of torch's `_SymmetricMemory`, the class of what `symmetric_workspace` returns."""


# --- DeepSpeed 0.19.8 ---


def disable_compiled_operators() -> None:
    """Keep DeepSpeed from compiling its own operators, such as the CPU all-reduce through shared memory.

    Uses `deepspeed.ops.__compatible_ops__`. Without it DeepSpeed probes for compilers at start, and its all-reduce
    needs all ranks on one host, a C++ compiler and ninja.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def shared_memory_all_reduce() -> Any | None:
    """Return DeepSpeed's all-reduce through shared memory, None where it is off; after `init_distributed`.

    Uses `deepspeed.comm.comm.cdb.shm_comm_op`. Without it nobody notices that `disable_compiled_operators` has no
    effect any more.
    """
    import deepspeed

    return deepspeed.comm.comm.cdb.shm_comm_op


# --- diffusers 0.42.1 ---


def float32_modules() -> set[str]:
    """Return the names of the modules of a Wan transformer that diffusers keeps in float32 whatever the dtype.

    Uses `WanTransformer3DModel._keep_in_fp32_modules`. Without it the list has to be copied, and results differ from
    diffusers' as soon as its list changes.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    return set(WanTransformer3DModel._keep_in_fp32_modules)


# --- FlashAttention-4 4.0.0b36 ---


def flash_attention4_forward() -> Callable[..., Any] | None:
    """Return the forward pass of FlashAttention-4 that takes tile sizes, None in a release without it.

    Uses `flash_attn.cute.interface._flash_attn_fwd`. Without it attention is 1 to 2 % slower.

    Raises:
        ImportError: the package is not installed.
    """
    from flash_attn.cute import interface  # type: ignore[import-not-found,unused-ignore]

    forward: Callable[..., Any] | None = getattr(interface, "_flash_attn_fwd", None)
    return forward


# --- Ray 2.60: actors ---


def actor_id(handle: Any) -> str:
    """Return the id of the actor behind a handle, in hexadecimal digits.

    Uses `ActorHandle._actor_id`. Without it two handles of one process cannot be told to be of the same one.
    """
    return str(handle._actor_id.hex())


def actor_ready(handle: Any) -> Any:
    """Ask an actor whether it lives. Returns an awaitable reference, which raises `ActorDiedError` if it does not.

    Uses the method `__ray_ready__` that Ray gives to every actor. Without it the actor's class needs such a method.
    """
    return handle.__ray_ready__.remote()


# --- Ray 2.60: Serve ---


def serve_controller() -> Any:
    """Return the handle of Serve's controller.

    Uses `ray.serve._private.constants`. Without it a replica does not learn that Serve is about to stop it.

    Raises:
        ValueError: there is no controller at this moment.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)


def replicas_key(deployment_id: Any) -> tuple[Any, Any]:
    """Return the key under which Serve's controller tells of changes in the replicas of a deployment.

    Uses `ray.serve._private.long_poll.LongPollNamespace`. Without it see `serve_controller`.
    """
    from ray.serve._private.long_poll import LongPollNamespace

    return LongPollNamespace.DEPLOYMENT_TARGETS, deployment_id


def serve_client(*, needed: bool = True) -> Any:
    """Return the client of the Serve instance on the Ray that this process has joined.

    Uses `ray.serve.context._get_global_client`, and of what it returns `SERVE_CLIENT`. Without it only `serve.status`
    is left, which tells neither routes nor versions nor where the proxy listens.

    Args:
        needed: raise where there is no Serve; else return None.

    Raises:
        RayServeException: there is no Serve, or it has ended.
    """
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=needed)


SERVE_CLIENT = ("http_config", "get_serve_details", "list_serve_statuses", "get_deployment_info", "delete_apps")
"""What is used of the client that `serve_client` returns."""


def set_version(application: Any, version: str) -> None:
    """Give the ingress deployment of a Serve application a version, which the controller keeps and tells.

    Uses `Application._bound_deployment` and `Deployment._version`. Without it a server cannot tell its own applications
    from those that somebody else has deployed since under the same name.
    """
    application._bound_deployment._version = version


def ingress_name(application: Any) -> str:
    """Return the name of the ingress deployment of a Serve application.

    Uses `Application._bound_deployment`. Without it see `set_version`.
    """
    return str(application._bound_deployment.name)


# --- Ray 2.60: finding and joining a Ray ---


def bootstrap_address(wish: str) -> str | None:
    """Return the `host:port` that Ray makes of a value of `RAY_ADDRESS`.

    Uses `ray._private.services.canonicalize_bootstrap_address`. Without it a wrong name of a host is noticed
    only by the timeout of `ray.init`.

    Raises:
        OSError: the host is not known.
        ValueError: it is no address.
    """
    from ray._private import services

    address: str | None = services.canonicalize_bootstrap_address(wish)
    return address


def control_addresses() -> set[str]:
    """Return the `host:port` of the control process of each Ray of which a node runs on this machine.

    Uses `ray._private.services.find_gcs_addresses` and its cache. Without it a Ray that runs here is found only if
    `RAY_ADDRESS` names it.
    """
    from ray._private import services

    services.find_gcs_addresses.cache_clear()
    return set(services.find_gcs_addresses())


def node_ids() -> set[str]:
    """Return the ids of all Ray nodes that run on this machine, in hexadecimal digits.

    Uses `ray._private.services.find_node_ids`. Without it a Ray without a node here is noticed only by the timeout of
    `ray.init`.
    """
    from ray._private import services

    return set(services.find_node_ids())


def last_started_address() -> str | None:
    """Return the address that the last `ray start` on this machine has noted, None where `ray stop` has cleared it.

    Uses `ray._private.utils.read_ray_address`. Without it see `control_addresses`.
    """
    from ray._private.utils import read_ray_address

    address: str | None = read_ray_address()
    return address


def grpc_channel(address: str, options: list[tuple[str, Any]]) -> Any:
    """Return a gRPC channel to a Ray process, with the cluster's TLS and access token.

    Uses `ray._private.grpc_utils.init_grpc_channel`. Without it a Ray that needs a token or TLS cannot be asked before
    `ray.init` waits for it.
    """
    from ray._private.grpc_utils import init_grpc_channel

    return init_grpc_channel(address, options)


def dead_processes() -> set[str]:
    """Return the kinds of processes, such as `gcs_server`, that have died of the Ray that this process started.

    Uses `ray._private.worker._global_node`. Without it a server would go on waiting for a Ray that has ended.
    """
    from ray._private import worker

    node = worker._global_node
    return set() if node is None else {kind for kind, _ in node.dead_processes()}


def enable_token_auth() -> None:
    """Use this machine's access token for Ray if there is one, and say nothing where there is none.

    Uses `ray._private.authentication`. Without it a Ray that needs a token cannot be asked before `ray.init`.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def token_auth_enabled() -> bool:
    """Tell whether this process uses an access token for Ray.

    Uses `ray._private.authentication`. Without it users are not told what another shell has to export.
    """
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


@contextmanager
def any_agent_port() -> Iterator[None]:
    """Let a Ray that is started meanwhile choose any free port for its agent.

    Uses `ray._private.parameter.RayParams`. Without it the agent of a second Ray on a machine takes no jobs, since it
    cannot have the usual port: `ray start` has an option for it, `ray.init` has none.
    """
    import functools

    from ray._private import parameter

    with_usual_port = parameter.RayParams
    parameter.RayParams = functools.partial(with_usual_port, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = with_usual_port
