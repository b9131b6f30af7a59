"""Each name that a library keeps to itself is still there and does what it is used for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from serve_app.compat import model
from serve_app.compat import ray as ray_compat


@pytest.fixture
def group(tmp_path: Path) -> Iterator[object]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_set_cuda_allocator() -> None:
    model.set_cuda_allocator("expandable_segments:False")


def test_collectives_begun(group: object) -> None:
    before = model.collectives_begun(group)
    torch.distributed.all_reduce(torch.ones(1))
    assert model.collectives_begun(group) == before + 1


def test_process_group(group: torch.distributed.ProcessGroup) -> None:
    assert model.process_group(group.group_name) is group


def test_linear_gelu() -> None:
    rows, weight, bias = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    out = torch.empty(3, 4)
    found = model.linear_gelu(rows, weight, bias, out)
    assert found is out
    torch.testing.assert_close(found, F.gelu(F.linear(rows, weight, bias)))  # on CUDA alone it is the approximation
    assert torch.equal(model.linear_gelu(rows, weight, bias), found)


def test_enable_symmetric_memory() -> None:
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    assert list(inspect.signature(enable_symm_mem_for_group).parameters) == ["group_name"]


def test_symmetric_workspace() -> None:
    from torch._C._distributed_c10d import _SymmetricMemory
    from torch.distributed._symmetric_memory import get_symm_mem_workspace

    assert list(inspect.signature(get_symm_mem_workspace).parameters)[:2] == ["group_name", "min_size"]
    assert [name for name in model.SYMMETRIC_METHODS if not hasattr(_SymmetricMemory, name)] == []


def test_disable_compiled_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = pytest.importorskip("deepspeed").ops
    monkeypatch.setattr(ops, "__compatible_ops__", ops.__compatible_ops__)  # raises if there is no such name
    model.disable_compiled_operators()
    assert ops.__compatible_ops__ == {}


def test_shared_memory_all_reduce() -> None:
    from deepspeed.comm import comm
    from deepspeed.comm.torch import TorchBackend

    assert hasattr(comm, "cdb")
    assert "self.shm_comm_op" in inspect.getsource(TorchBackend.__init__)


def test_float32_modules() -> None:
    assert {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"} <= model.float32_modules()


def test_flash_attention4_forward() -> None:
    pytest.importorskip("flash_attn.cute", exc_type=ImportError)
    forward = model.flash_attention4_forward()
    assert forward is not None
    assert {"tile_mn", "mma_pv_is_rs", "intra_wg_overlap"} <= set(inspect.signature(forward).parameters)


def test_actor_id() -> None:
    from ray.actor import ActorHandle

    assert hasattr(ActorHandle, "_actor_id") or "_actor_id" in inspect.signature(ActorHandle.__init__).parameters


def test_actor_ready() -> None:
    import ray

    @ray.remote
    class Actor:
        pass

    assert hasattr(Actor.__ray_metadata__.modified_class, "__ray_ready__")  # type: ignore[attr-defined]


def test_serve_controller() -> None:
    from ray.serve._private import constants
    from ray.serve._private.controller import ServeController

    assert constants.SERVE_CONTROLLER_NAME and constants.SERVE_NAMESPACE
    methods = (
        ServeController.__ray_metadata__.modified_class
        if hasattr(ServeController, "__ray_metadata__")
        else (ServeController)
    )
    assert hasattr(methods, "listen_for_change")


def test_replicas_key() -> None:
    from ray.serve._private.common import DeploymentTargetInfo

    _, name = ray_compat.replicas_key("a deployment")
    assert name == "a deployment"
    assert "running_replicas" in inspect.signature(DeploymentTargetInfo).parameters


def test_serve_client() -> None:
    from ray.serve._private.client import ServeControllerClient
    from ray.serve.context import _get_global_client

    assert "raise_if_no_controller_running" in inspect.signature(_get_global_client).parameters
    assert [name for name in ray_compat.SERVE_CLIENT if not hasattr(ServeControllerClient, name)] == []


def test_set_version_and_ingress_name() -> None:
    from ray import serve

    @serve.deployment(name="ingress")
    class Ingress:
        pass

    application = Ingress.bind()  # type: ignore[attr-defined]
    ray_compat.set_version(application, "a mark")
    assert ray_compat.ingress_name(application) == "ingress"
    assert application._bound_deployment.version == "a mark"


def test_bootstrap_address() -> None:
    assert ray_compat.bootstrap_address("10.0.0.1:6379") == "10.0.0.1:6379"


def test_control_addresses() -> None:
    assert all(":" in address for address in ray_compat.control_addresses())


def test_node_ids() -> None:
    assert all(bytes.fromhex(name) for name in ray_compat.node_ids())


def test_last_started_address() -> None:
    address = ray_compat.last_started_address()
    assert address is None or ":" in address


def test_grpc_channel() -> None:
    ray_compat.grpc_channel("127.0.0.1:1", [("grpc.enable_http_proxy", 0)]).close()


def test_dead_processes() -> None:
    from ray._private import node, worker

    assert "_global_node" in vars(worker) and callable(node.Node.dead_processes)
    if worker._global_node is None:
        assert ray_compat.dead_processes() == set()


def test_enable_token_auth() -> None:
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    assert "warn_if_disabled" in inspect.signature(maybe_enable_token_auth_if_token_available).parameters


def test_token_auth_enabled() -> None:
    assert ray_compat.token_auth_enabled() in (True, False)


def test_any_agent_port() -> None:
    from ray._private import parameter

    usual = parameter.RayParams
    with ray_compat.any_agent_port():
        assert parameter.RayParams().dashboard_agent_listen_port == 0
    assert parameter.RayParams is usual


def test_notes() -> None:
    """What they do is seen with a Ray, by `tests/stages/test_axes.py`."""
    from ray.experimental import internal_kv

    parameters = inspect.signature(internal_kv._internal_kv_put).parameters
    assert {"key", "value", "overwrite", "namespace"} <= parameters.keys()
    for function in (internal_kv._internal_kv_get, internal_kv._internal_kv_list, internal_kv._internal_kv_del):
        assert "namespace" in inspect.signature(function).parameters
