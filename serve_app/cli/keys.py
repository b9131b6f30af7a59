"""`wan-serve keys`: API keys in the database of a configuration. Works whether or not a server runs."""

from __future__ import annotations

import time
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

from serve_app.cli.store import ConfigFile, with_store
from serve_app.cli.table import one_cell, print_table
from serve_app.errors import ConfigError

keys = typer.Typer(no_args_is_help=True, help="API keys for `auth: {mode: keys}`.")
console = Console(highlight=False)

_NAMES = ("requests_per_minute", "queued_jobs", "running_jobs", "gpu_seconds_per_day", "queued_tflop")

KeyId = Annotated[str, typer.Argument(metavar="ID", help="A key's id, as `list` shows it.")]
Requests = Annotated[int | None, typer.Option(min=0, help="HTTP calls per minute; 0 is no limit.")]
Queued = Annotated[int | None, typer.Option(min=0, help="Waiting jobs; 0 is no limit.")]
Running = Annotated[int | None, typer.Option(min=0, help="Jobs that run at once; more have to wait. 0 is no limit.")]
GpuSeconds = Annotated[
    float | None, typer.Option(min=0, help="Seconds of denoising x ranks in 24 hours; 0 is no limit.")
]
Tflop = Annotated[float | None, typer.Option(min=0, help="TFLOP of waiting jobs together; 0 is no limit.")]

Degrade = Annotated[
    str | None,
    typer.Option(
        metavar="never|WIDTHxHEIGHT[,STEPS]", help="What its requests agree to under load if they do not say."
    ),
]


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, or what it is for.")],
    config: ConfigFile,
    scopes: Annotated[
        str, typer.Option(help="Some of create, read and admin; `admin` sees everybody's videos.")
    ] = "create,read",
    requests_per_minute: Requests = None,
    queued_jobs: Queued = None,
    running_jobs: Running = None,
    gpu_seconds_per_day: GpuSeconds = None,
    queued_tflop: Tflop = None,
    degrade: Degrade = None,
) -> None:
    """Create a key and print it. It is shown only this once."""
    from serve_app.accounts.keys import KeyLimits, Scope
    from serve_app.config import load_file

    chosen: list[Any] = [scope.strip() for scope in scopes.split(",")]
    if not set(chosen) <= set(get_args(Scope)) or not {"create", "read"} & set(chosen):
        raise ConfigError(f"--scopes has value {scopes!r}, expected some of create, read, admin, one of the first two")
    limits_given = (requests_per_minute, queued_jobs, running_jobs, gpu_seconds_per_day, queued_tflop)
    given = dict(zip(_NAMES, limits_given, strict=True))
    limits: Any = {name: value or None for name, value in given.items()}
    floor = _floor(degrade)
    key, text = with_store(config, lambda store: store.keys.create(name, chosen, KeyLimits(**limits), floor), make=True)
    # The key alone on stdout, for scripts.
    aside = Console(stderr=True, highlight=False)
    aside.print(f"key {key.id} of {name}; it is shown only now:", markup=False)
    print(text)
    if load_file(config)[1].auth.mode == "none":
        aside.print(
            f"nobody asks for it: auth.mode has value 'none' in {config}, and `auth: {{mode: keys}}` asks for keys",
            markup=False,
            soft_wrap=True,
        )


@keys.command("list")
def list_keys(config: ConfigFile) -> None:
    """List all keys, with their limits and the GPU-seconds of their last 24 hours."""
    rows = []
    for key, used in with_store(config, lambda store: store.keys.list()):
        made = time.strftime("%Y-%m-%d", time.gmtime(key.created_at))
        limits = "; ".join(f"{name} {getattr(key, name):g}" for name in _NAMES if getattr(key, name) is not None)
        if key.degrade is not None:
            limits += ("; " if limits else "") + "degrade " + ",".join(str(value) for value in key.degrade.values())
        state = "valid" if key.revoked_at is None else "revoked"
        rows.append((key.id, made, state, ",".join(key.scopes), f"{used:.0f}", f"[{limits}]", one_cell(key.name)))
    print_table(("ID", "MADE", "STATE", "SCOPES", "GPU-S", "LIMITS", "NAME"), rows)


@keys.command()
def revoke(key_id: KeyId, config: ConfigFile) -> None:
    """Revoke a key, from the next request on. Its videos stay."""
    if not with_store(config, lambda store: store.keys.revoke(key_id)):
        raise _unknown(key_id)
    console.print(f"{key_id}: revoked", markup=False)


@keys.command()
def limit(
    key_id: KeyId,
    config: ConfigFile,
    requests_per_minute: Requests = None,
    queued_jobs: Queued = None,
    running_jobs: Running = None,
    gpu_seconds_per_day: GpuSeconds = None,
    queued_tflop: Tflop = None,
    degrade: Degrade = None,
) -> None:
    """Change limits of a key, from the next request on. A limit that is not given stays as it is."""
    limits_given = (requests_per_minute, queued_jobs, running_jobs, gpu_seconds_per_day, queued_tflop)
    given = dict(zip(_NAMES, limits_given, strict=True))
    changes: dict[str, Any] = {name: value or None for name, value in given.items() if value is not None}
    if degrade is not None:
        changes["degrade"] = _floor(degrade)
    if not changes:
        raise ConfigError(f"no limit is given, expected one of --{', --'.join((*_NAMES, 'degrade')).replace('_', '-')}")
    if with_store(config, lambda store: store.keys.limit(key_id, changes)) is None:
        raise _unknown(key_id)
    shown = ((name, "none" if value is None else value) for name, value in changes.items())
    console.print(f"{key_id}: " + ", ".join(f"{n} {v:g}" if isinstance(v, float) else f"{n} {v}" for n, v in shown))


def _floor(said: str | None) -> dict[str, Any] | None:
    """Return what a key's requests agree to, as a request spells it."""
    from serve_app.degrade import NEVER, Floor
    from serve_app.errors import InvalidRequest

    if said in (None, NEVER):
        return None
    assert said is not None
    size, _, steps = said.partition(",")
    try:
        floor = Floor.parse({"min_size": size, **({"min_steps": int(steps)} if steps else {})})
    except (InvalidRequest, ValueError):
        raise ConfigError(f"--degrade has value {said!r}, expected never, or e.g. 832x480 or 832x480,20") from None
    return None if floor is None else floor.to_json()


def _unknown(key_id: str) -> ConfigError:
    return ConfigError(f"ID has value {key_id!r}, expected that of a key (`wan-serve keys list` shows them)")
