"""The file of a plan: YAML that `wan-serve up` takes, with comments that say why each number is there."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from serve_app.planning.parts import GB, ProcessMemory
from serve_app.planning.plan import Plan

PATH = "/models/Wan2.2-T2V-A14B-Diffusers"
"""Folder of the model, where none is named."""

_HEAD = """\
proxy_location: HeadOnly
http_options:
  host: 127.0.0.1 # others reach it with auth.mode: keys only
  port: 8000
controller_options:
  runtime_env:
    env_vars:
      # A replica whose rank hangs is replaced at once, not after its longest job.
      RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS: "1"
      # Clients cannot set their own timeout, nor have Serve go on after they have left.
      RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH: serve_app.gateway.proxy:middlewares
applications:
  - name: wan
    route_prefix: null # reached by handle calls only
    import_path: serve_app.app:wan
    args: &config
"""
_TAIL = """\
  - name: gateway
    import_path: serve_app.app:gateway
    route_prefix: /
    args: *config
"""
_WIDTH = 118


def write(plan: Plan, command: str) -> str:
    """Return the text of the file.

    Args:
        plan: whose pick it serves.
        command: the command line that made the plan.
    """
    args = {"model": {"path": PATH}, **plan.pick.args}
    lines = [*_comment(_why(plan, command)), *_HEAD.splitlines()]
    needs = {"encoder": plan.pick.encoder, "denoiser": plan.pick.rank, "decoder": plan.pick.decoder}
    for name, value in args.items():
        if name in needs:
            lines += [f"      {line}" for line in _comment([_sum(needs[name])], _WIDTH - 6)]
        lines += _section({name: value}, 6)
    return "\n".join([*lines, *_TAIL.splitlines(), ""])


def _why(plan: Plan, command: str) -> list[str]:
    wish, pick = plan.wish, plan.pick
    seconds = pick.seconds
    several = ["Several hosts need a store, and a storage, that all of them reach: store.url and storage.url."]
    return [
        f"Made by `{command}`: {wish.hosts} host{'s' if wish.hosts > 1 else ''} with {wish.gpus} x {wish.card.label}, "
        f"for videos of {wish.size}.",
        f"{seconds.total:.0f} s for a video ({seconds.basis}), {pick.per_hour:.1f} videos an hour, "
        f"{pick.per_gpu:.2f} for each GPU.",
        *plan.reasons(),
        *plan.placement(),
        f"The hosts need {pick.host_bytes / GB:.0f} GB of memory beside what loading takes." if pick.host_bytes else "",
        *(several if wish.hosts > 1 else []),
    ]


def _sum(need: ProcessMemory) -> str:
    """Return a sentence on the parts of a process's memory."""
    parts = need.parts or need.host
    where = "Of each GPU" if need.parts else "In host memory"
    listed = ", ".join(f"{part.name} {part.bytes / GB:.1f}" for part in parts if part.bytes >= 0.05 * GB)
    return f"{where}, in GB: {listed}."


def _comment(sentences: list[str], width: int = _WIDTH) -> list[str]:
    return [
        line
        for one in sentences
        if one
        for line in textwrap.wrap(one, width, initial_indent="# ", subsequent_indent="# ")
    ]


def _section(value: dict[str, Any], indent: int) -> list[str]:
    text = yaml.safe_dump(value, sort_keys=False, default_flow_style=False, allow_unicode=True, width=_WIDTH - indent)
    return [" " * indent + line for line in text.splitlines()]
