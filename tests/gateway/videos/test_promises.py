"""What a server promises when it accepts a video, over HTTP, and what it refuses because it could not keep it."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import update

from serve_app.config import AdmissionConfig
from serve_app.db.tables import Job
from tests.gateway.conftest import Server


@pytest.fixture
async def known(server: Server, held: asyncio.Event, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server on which a video takes ten seconds, as far as it knows, and on which the next ones do not end."""
    for name in ("_PACE_S", "_FORECAST_S"):
        monkeypatch.setattr(f"serve_app.jobs.outlook.{name}", 0)
    held.set()
    done = await server.completed()
    assert (await server.http.get("/v1/models")).json()["data"][0]["estimates"] is None
    async with server.store.database.write() as session:
        ended = update(Job).where(Job.id == done["id"])
        await session.execute(ended.values(created_at=990, started_at=1000, completed_at=1010, predicted_s=16))
    held.clear()
    return server


async def test_a_deadline_that_cannot_be_met(known: Server) -> None:
    body = {"prompt": "a red circle moves right", "deadline_s": 5}
    answer = await known.http.post("/v1/videos", json=body)
    assert answer.status_code == 422 and answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("deadline_infeasible", "deadline_s")
    assert error["earliest_s"] in (10, 11)
    assert (await known.http.post("/v1/videos", json={**body, "deadline_s": 12})).status_code == 200


async def test_a_wait_beyond_the_limit(known: Server) -> None:
    limits = AdmissionConfig.model_validate({"max_wait_s": {"standard": 8}, "check_deadlines": False})
    object.__setattr__(known.config, "admission", limits)
    assert (await known.create(deadline_s=5))["seconds_left"] == 10
    answer = await known.http.post("/v1/videos", json={"prompt": "a red circle moves right"})
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "wait_too_long"
    assert 1 <= int(answer.headers["retry-after"]) <= 10
    assert (await known.create(priority="batch"))["status"] == "queued"


async def test_models_tell_how_good_estimates_are(known: Server) -> None:
    (model,) = (await known.http.get("/v1/models")).json()["data"]
    assert model["estimates"] == {"videos": 1, "median_error": 0.2, "p90_error": 0.2, "p90_factor": 1.0}


async def test_less_openly(known: Server, held: asyncio.Event) -> None:
    await known.store.set_degrade("3")
    body = {"prompt": "a red circle moves right", "size": "256x256", "seed": 7}
    for degrade in ("always", {"min_size": 7}, {"min_pixels": 5}, 3):
        answer = await known.http.post("/v1/videos", json={**body, "degrade": degrade})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "degrade"
    held.set()
    whole = await known.completed(size="256x256", seed=7)
    assert (whole["size"], whole["degraded"], whole["requested_size"]) == ("256x256", False, None)
    less = await known.completed(size="256x256", seed=7, degrade={"min_size": "128x128", "min_steps": 2})
    assert (less["size"], less["num_inference_steps"], less["degraded"]) == ("128x128", 2, True)
    assert (less["requested_size"], less["requested_steps"]) == ("256x256", 4)
    assert "256x256" in less["warnings"][0]
    form = {**body, "degrade": '{"min_size": "128x128"}'}
    sent = {name: (None, str(value)) for name, value in form.items()}
    made = (await known.http.post("/v1/videos", files=sent)).json()
    assert (await known.ended(made["id"]))["size"] == "128x128"
