"""The line on a deployment that finds no place on a real cluster."""

from __future__ import annotations

import threading
import time

import pytest
import ray
from ray import serve

from serve_app.capacity import Need
from serve_app.errors import ConfigError, ServeAppError
from serve_app.launch.startup import Startup
from serve_app.shortage import refuse_the_impossible, shortages


def test_what_no_host_has_is_refused(ray_cluster: str) -> None:
    """The Ray of the tests counts 16 CPUs on its one host."""
    refuse_the_impossible([Need("Short", "short", ({"CPU": 16},))])
    for amounts, labels, said in (
        ({"CPU": 64}, {}, r"short asks for 64 CPU on one host, and no host has that \(16 CPU"),
        ({"CPU": 1, "nvme": 1}, {}, "short asks for 1 CPU, 1 nvme on one host, and no host has that"),
        ({"CPU": 1}, {"pool": "h200"}, r"with the labels {pool: h200}, and no host has that"),
    ):
        with pytest.raises(ConfigError, match=said):
            refuse_the_impossible([Need("Short", "short", (amounts,), labels=labels)])
    assert len(shortages([Need("A", "a", ({"CPU": 10},)), Need("B", "b", ({"CPU": 10},))])) == 1


@ray.remote(num_cpus=10)
class Holder:
    def there(self) -> bool:
        return True


@serve.deployment(ray_actor_options={"num_cpus": 12})
class Short:
    pass


@serve.deployment
class Broken:
    def __init__(self) -> None:
        raise ValueError("no such thing")


def deploy(application: serve.Application, name: str) -> None:
    target = serve.RunTarget(target=application, name=name, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


@pytest.mark.slow
def test_what_is_taken_is_said_and_waited_for(ray_cluster: str) -> None:
    holder = Holder.remote()
    assert ray.get(holder.there.remote())
    said: list[str] = []
    deploy(Short.bind(), "short")
    waiting = threading.Thread(
        target=Startup(["short"], None, [Need("Short", "short", ({"CPU": 12},))], said.append).wait, args=[300]
    )
    waiting.start()
    while not said and waiting.is_alive():  # half a minute, in which Serve looks for a place
        time.sleep(0.2)
    assert said[0].startswith("Short has no process yet: it asks for 12 CPU; the cluster has 16 CPU")
    assert said[0].rpartition("free: ")[2] == "6 CPU"
    ray.kill(holder)
    waiting.join()
    assert said[-1] == "Short is ready"
    serve.delete("short")


def test_what_cannot_start_ends_the_waiting(ray_cluster: str) -> None:
    options = Broken.options(max_constructor_retry_count=1, ray_actor_options={"num_cpus": 0})
    deploy(options.bind(), "broken")
    with pytest.raises(ServeAppError, match=r"application 'broken' did not start: .*no such thing"):
        Startup(["broken"], None, [], print).wait(300)
    serve.delete("broken")
