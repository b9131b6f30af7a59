"""A sample's way to a group, by Serve's own comparison of queues."""

from __future__ import annotations

from typing import Any

from ray.serve.config import RequestRouterConfig

from serve_app.stages.router import EmptiestGroup


async def test_all_groups_are_compared() -> None:
    router: Any = object.__new__(EmptiestGroup)
    groups: list[Any] = [object() for _ in range(5)]
    (rank,) = await router.choose_replicas(list(groups))
    assert len(rank) == 5 and set(map(id, rank)) == set(map(id, groups))
    assert await router.choose_replicas([]) == []
    firsts = {id((await router.choose_replicas(list(groups)))[0][0]) for _ in range(200)}
    assert len(firsts) == 5  # equal ones take turns by chance


def test_serve_finds_it() -> None:
    config = RequestRouterConfig(request_router_class="serve_app.stages.router:EmptiestGroup")
    assert config.get_request_router_class() is EmptiestGroup
