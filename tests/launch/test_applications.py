"""A server's applications beside those of others, on a real Serve."""

from __future__ import annotations

import socket
import time

import pytest
from ray import serve

from serve_app.errors import ConfigError, ServeAppError
from serve_app.launch.applications import Applications


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Nothing:
    def __call__(self) -> str:
        return "nothing"


def targets(*names: str) -> list[serve.RunTarget]:
    return [serve.RunTarget(target=Nothing.bind(), name=name, route_prefix=f"/{name}") for name in names]


def there() -> set[str]:
    return {name for name, state in serve.status().applications.items() if state.status != "DELETING"}


def wait_replaced(applications: Applications) -> None:
    """Wait until Serve has put others in the place of these applications, which takes it a moment."""
    for _ in range(300):
        try:
            applications.check_ours()
        except ServeAppError:
            return
        time.sleep(0.1)


@pytest.fixture(scope="module")
def http(ray_cluster):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"host": "127.0.0.1", "port": port}
    serve.shutdown()  # what another module has left listens elsewhere
    serve.start(http_options=options, proxy_location="HeadOnly")
    serve.run(Nothing.bind(), name="other", route_prefix="/other")
    yield options
    serve.shutdown()


def test_a_server_ends_only_what_it_has_deployed(http):
    mine = Applications(targets("wan", "gateway"))
    mine.check_free("here", http, replace=False)
    mine.deploy()
    mine.check_ours()
    assert there() == {"wan", "gateway", "other"}

    later = Applications(targets("wan"))
    with pytest.raises(ServeAppError, match="application") as refused:
        later.check_free("10.0.0.1:6379", http, replace=False)
    for part in ("'wan'", "10.0.0.1:6379", str(http["port"]), "--replace", "--own-ray"):
        assert part in str(refused.value)
    later.check_free("here", http, replace=True)
    later.deploy()
    wait_replaced(mine)
    with pytest.raises(ServeAppError, match="'wan' was deployed anew by somebody else"):
        mine.check_ours()

    mine.delete()
    assert there() == {"wan", "other"}
    later.check_ours()
    serve.delete("wan")
    with pytest.raises(ServeAppError, match="'wan' was deleted by somebody else"):
        later.check_ours()
    later.delete()
    assert there() == {"other"}


@pytest.mark.parametrize(("option", "value"), [("port", 1), ("host", "0.0.0.0")])
def test_another_address_than_that_of_the_running_serve_is_refused(http, option, value):
    with pytest.raises(ConfigError, match=f"http_options.{option} has value {value!r}, expected {http[option]!r}"):
        Applications(targets("wan")).check_free("here", {**http, option: value}, replace=True)
    Applications(targets("wan")).check_free("here", {}, replace=True)


def test_the_route_of_another_application_is_refused(http):
    mine = Applications([serve.RunTarget(target=Nothing.bind(), name="gateway", route_prefix="/other")])
    with pytest.raises(ServeAppError, match="'other' has the route_prefix '/other'"):
        mine.check_free("here", http, replace=True)


def test_a_server_that_deployed_nothing_deletes_nothing(http):
    Applications(targets("other")).delete()
    assert "other" in there()


def test_serve_that_has_ended_is_one_line(http):
    mine = Applications(targets("wan"))
    mine.check_free("here", http, replace=False)
    mine.deploy()
    mine.check_ours()
    serve.shutdown()
    with pytest.raises(ServeAppError, match="Serve has ended"):
        mine.check_ours()
    mine.delete()


def test_serve_ends_with_the_only_server_that_needed_it(ray_cluster, http):
    mine = Applications(targets("wan"))
    mine.check_free("here", http, replace=False)
    serve.start(http_options=http, proxy_location="HeadOnly")
    mine.deploy()
    mine.delete()
    with pytest.raises(serve.exceptions.RayServeException):
        serve.get_app_handle("wan")
