"""`wan-serve manifests`: write a configuration as Kubernetes manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serve_app.launch.shipped import config_file
from serve_app.manifests.size import Size

console = Console(highlight=False)
_DEFAULT = Size()


def manifests(
    config: Annotated[
        Path, typer.Option("--config", callback=config_file, help="A file, or the name of a shipped one.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the manifests.")],
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a GPU node.")] = _DEFAULT.gpus_per_node,
    image: Annotated[str, typer.Option(help="Image of all Pods.")] = _DEFAULT.image,
    name: Annotated[str, typer.Option(help="Name of the RayService; others are named after it.")] = _DEFAULT.name,
    namespace: Annotated[str, typer.Option(help="Namespace of all objects.")] = _DEFAULT.namespace,
    cpus_per_node: Annotated[
        int, typer.Option(min=0, help="CPUs of a Pod with GPUs; 0 is what runs there, and at least 4 for each GPU.")
    ] = _DEFAULT.cpus_per_node,
    memory_per_node: Annotated[
        int,
        typer.Option(
            min=0,
            help="Memory of a Pod with GPUs, in GiB; 0 is 16, and for each GPU 16, or 80 where weights wait there.",
        ),
    ] = _DEFAULT.memory_per_node,
    redis: Annotated[str, typer.Option(help="Redis of the component `redis`, as host:port.")] = _DEFAULT.redis,
) -> None:
    """Write a configuration as manifests for KubeRay: a kustomize base, components and overlays."""
    from serve_app.manifests.folder import files, write
    from serve_app.manifests.source import read

    size = Size(name, namespace, image, gpus_per_node, cpus_per_node, memory_per_node, redis)
    source = read(config)
    texts, pools = files(source, size)
    write(texts, out)
    for note in source.notes:
        console.print(note, soft_wrap=True, markup=False)
    for pool in pools:
        pods = f"{pool.least}" if pool.least == pool.most else f"{pool.least} to {pool.most}"
        amounts = f"{pool.cpus} CPUs, {pool.memory} GiB" + (f", {pool.gpus} GPUs" if pool.gpus else "")
        console.print(f"{pool.name}: {pods} Pods of {amounts}: {', '.join(pool.deployments)}", soft_wrap=True)
    needed = [one.variable + (" (optional)" if one.optional else "") for one in source.secrets]
    console.print(f"the Secret {name}-secrets holds {', '.join(needed)}", soft_wrap=True)
    console.print(f"{out}: {len(texts)} files; next: kubectl apply -k {out}/overlays/production", soft_wrap=True)
