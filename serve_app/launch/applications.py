"""The applications of one server on a Serve instance, which others may share."""

from __future__ import annotations

import time
import uuid
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve_app.compat.ray import ingress_name, serve_client, set_version
from serve_app.errors import ConfigError, ServeAppError

# Shorter than the time that a guard gives its server to stop.
_DELETED_S = 20
_GONE = "NOT_STARTED"


class Applications:
    """The applications that a server deploys, told apart from those that somebody else has deployed since.

    Each deployment carries the server's mark as its version. Serve keeps it in the controller, and whoever deploys
    the application anew replaces it.

    Args:
        targets: the applications, as Serve deploys them.
    """

    def __init__(self, targets: list[serve.RunTarget]) -> None:
        self._targets = targets
        self._mark = uuid.uuid4().hex
        self._serve_was_there = False
        self._deploying = False
        for target in targets:
            set_version(target.target, self._mark)

    def check_free(self, ray_address: str, http: dict[str, Any], *, replace: bool) -> bool:
        """Check that a running Serve, if there is one, can take these applications. Called before anything starts.

        Args:
            ray_address: the Ray that this process has joined, for messages.
            http: the file's `http_options`.
            replace: applications of the same names may be replaced.

        Returns:
            True if Serve runs there.

        Raises:
            ServeAppError: it runs applications of these names, or others at the same routes, or listens elsewhere.
        """
        client = serve_client(needed=False)
        self._serve_was_there = client is not None
        if client is None:
            return False
        details = client.get_serve_details()
        there, host, port = details["applications"], client.http_config.host, client.http_config.port
        url = f"http://{host}:{port}"
        where = f"on the Ray at {ray_address}, {url}"
        routes = {target.name: target.route_prefix for target in self._targets}
        if not replace and (same := sorted(there.keys() & routes)):
            names = " and ".join(repr(name) for name in same)
            raise ServeAppError(
                f"applications {names} run already {where}; replace them with --replace, or serve beside them with "
                "--own-ray and another --port"
            )
        for name, detail in there.items():
            route = detail["route_prefix"]
            if name not in routes and route is not None and route in routes.values():
                raise ServeAppError(
                    f"application {name!r} has the route_prefix {route!r} {where}, expected it to be free; serve "
                    "beside it with --own-ray and another --port"
                )
        for option, value in (("port", port), ("host", host)):
            if http.get(option) not in (None, value):
                raise ConfigError(
                    f"http_options.{option} has value {http[option]!r}, expected {value!r}, since the Serve on the Ray "
                    f"at {ray_address} listens on {url}; or serve beside it with --own-ray"
                )
        return True

    def deploy(self) -> None:
        """Deploy the applications, without waiting until they run."""
        self._deploying = True
        serve.run_many(self._targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def check_ours(self) -> None:
        """Check that all applications run and are still this server's.

        Raises:
            ServeAppError: one is gone, or somebody else has deployed it since.
        """
        try:
            client = serve_client()
            there = {one.name: one.app_status.status.value for one in client.list_serve_statuses()}
            for target in self._targets:
                if there.get(target.name, _GONE) in (_GONE, "DELETING"):
                    raise ServeAppError(f"application {target.name!r} was deleted by somebody else: nothing is served")
                if not self._is_ours(client, target):
                    raise ServeAppError(
                        f"application {target.name!r} was deployed anew by somebody else, who serves it now"
                    )
        except (RayError, RayServeException) as error:
            raise ServeAppError(f"Serve has ended, and the applications with it: {type(error).__name__}") from None

    def delete(self, only: set[str] | None = None) -> None:
        """Delete the applications that are still this server's. End Serve too if it was started here and is empty then.

        Args:
            only: names of the applications to delete; None means all.
        """
        if not self._deploying:
            return
        try:
            client = serve_client()
            there = {one.name for one in client.list_serve_statuses()}
            ours = [one.name for one in self._targets if one.name in there and self._is_ours(client, one)]
            client.delete_apps([name for name in ours if only is None or name in only], blocking=False)
            deadline = time.monotonic() + _DELETED_S
            while time.monotonic() < deadline:
                there = {one.name for one in client.list_serve_statuses()}
                if not there.intersection(ours if only is None else only):
                    break
                time.sleep(0.1)
            if only is None and not there and not self._serve_was_there:
                serve.shutdown()
        except (RayError, RayServeException):
            return  # Serve has ended by itself

    def _is_ours(self, client: Any, target: serve.RunTarget) -> bool:
        try:
            info, _ = client.get_deployment_info(ingress_name(target.target), target.name)
        except ray.exceptions.RayTaskError:
            return True  # Serve makes an application's deployments a moment after it
        return bool(info.version == self._mark)
