"""Gateway and dispatcher as deployments of a real Ray, with PostgreSQL and RabbitMQ between them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aio_pika

from serve_app.config import Config, Defaults, StoreConfig
from serve_app.config import DispatcherConfig as Options
from serve_app.config import QueueConfig as QueueOptions
from tests.gateway.test_serve import Pipeline, make, serve
from tests.support.brokers import SERVER, queue_options
from tests.support.fakes import until

__all__ = ["queue_options"]


async def test_jobs_run_through_both(
    ray_cluster: str, postgres_url: str, queue_options: QueueOptions, tmp_path: Path
) -> None:
    from ray.serve.context import _get_global_client

    from serve_app.dispatch.deployment import DispatcherDeployment
    from serve_app.gateway.ingress import Gateway

    config = Config(
        home=str(tmp_path),
        defaults=Defaults(width=64, height=64, num_frames=9, num_inference_steps=4),
        store=StoreConfig(url=postgres_url),
        queue=queue_options,
        dispatcher=Options(pipeline="fake", poll_s=0.2, retry_s=0.1, late_outputs_s=0.5),
    )
    small = {"num_cpus": 0.1}
    serve.run(Pipeline.bind(config.storage_url), name="fake", route_prefix=None)
    dispatcher = DispatcherDeployment.options(ray_actor_options=small).bind(config)
    serve.run(Gateway.options(ray_actor_options=small).bind(config, dispatcher), name="gateway", route_prefix="/")
    try:
        url = f"http://127.0.0.1:{_get_global_client().http_config.port}"
        async with await aio_pika.connect(SERVER) as connection:
            channel = await connection.channel()

            async def listening() -> bool:
                queue = await channel.declare_queue(queue_options.name, passive=True)
                return queue.declaration_result.consumer_count == 1

            await until(listening)
            for prompt in ("one", "lose a rank"):
                assert (await asyncio.to_thread(make, url, prompt))["status"] == "completed"

            async def empty() -> bool:
                queue = await channel.declare_queue(queue_options.name, passive=True)
                return queue.declaration_result.message_count == 0

            await until(empty)
    finally:
        for application in ("gateway", "fake"):
            serve.delete(application)
