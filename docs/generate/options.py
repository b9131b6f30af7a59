"""The page of options, from the configuration's tree."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from docs.generate.markdown import Stale, cell, default_text, page, sentence, table, type_name
from serve_app.config import Config


def options_page(sentences: dict[str, str]) -> str:
    used: set[str] = set()
    parts = [
        "# Options",
        "A YAML file names two Serve applications that share one `args`: this tree. `wan-serve check FILE` refuses "
        "unknown keys and values that cannot work, in one line each. Defaults are those published for Wan2.2-T2V-A14B. "
        "[Options to know](../deploy.md#options-to-know) are the ones that deployments change most.",
    ]
    plain: list[str] = []
    sections: list[str] = []
    for name, field in Config.model_fields.items():
        (sections if _section(field.annotation) else plain).append(name)
    whole = Config()
    parts.append(table(_rows(Config, whole, "", sentences, used, only=plain)))
    for name in sections:
        kind = _section(Config.model_fields[name].annotation)
        assert kind is not None
        value = getattr(whole, name)
        parts.append(f"## {name}")
        parts.append(sentence(inspect.getdoc(kind) or ""))
        if value is None:
            parts.append(cell(_meaning(Config, name, name, sentences, used)))
        parts.append(table(_rows(kind, value, f"{name}.", sentences, used)))
    if unknown := set(sentences) - used:
        raise Stale(f"words.yaml: options: {', '.join(sorted(unknown))}: no such options")
    return page(parts)


def _rows(
    kind: type[BaseModel],
    value: Any,
    prefix: str,
    sentences: dict[str, str],
    used: set[str],
    only: list[str] | None = None,
) -> Iterator[tuple[str, ...]]:
    """Yield a row for each option of a section, nested ones with dotted names."""
    schema = kind.model_json_schema()
    for name, field in kind.model_fields.items():
        if only is not None and name not in only:
            continue
        mapping = get_origin(field.annotation) is dict
        inner = None if mapping else _section(field.annotation)
        default = getattr(value, name) if value is not None else field.get_default(call_default_factory=True)
        if inner is not None and isinstance(default, inner):
            yield from _rows(inner, default, f"{prefix}{name}.", sentences, used)
            continue
        required = value is None and field.is_required()
        of = schema["properties"][name]
        shown = f"like {_owner_name(inner)}, or null" if inner else type_name(of, schema.get("$defs", {}))
        if mapping:  # what its values look like is told where requests are
            shown = shown.replace("](#", "](api.md#")
        yield (
            f"`{prefix}{name}`",
            shown,
            "required" if required else default_text(default),
            cell(_meaning(kind, name, f"{prefix}{name}", sentences, used)),
        )


def _owner_name(kind: type[BaseModel]) -> str:
    return f"`{kind.__name__.lower()}`"


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that an annotation names, also as `Section | None`."""
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None


def _meaning(kind: type[BaseModel], name: str, option: str, sentences: dict[str, str], used: set[str]) -> str:
    field = kind.model_fields[name]
    pattern = next((one for one in sentences if fnmatchcase(option, one)), None)
    used |= {one for one in sentences if fnmatchcase(option, one)}
    found = field.description or next((text for one in kind.__mro__ if (text := _docstrings(one).get(name))), None)
    if found is None and pattern is None:
        raise Stale(f"option {option} has no docstring in the code and no sentence in words.yaml")
    return found or sentences[pattern or ""]


@cache
def _docstrings(kind: type) -> dict[str, str]:
    """Return the string that follows each attribute in the source of a class."""
    if not issubclass(kind, BaseModel) or kind is BaseModel:
        return {}
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[node.target.id] = after.value.value
    return found
