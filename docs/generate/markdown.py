"""Markdown, and JSON schemas as a reader says them."""

from __future__ import annotations

import re
from typing import Any

NOTE = "<!-- Written by docs/generate (`make docs-reference`). Do not edit: change the code or words.yaml. -->"


class Stale(Exception):
    """`words.yaml` and the code do not name the same things."""


def table(rows: Any, head: tuple[str, ...] = ("option", "type", "default", "meaning")) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def sentence(text: str) -> str:
    return " ".join(text.split())


def anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-")


def page(parts: list[str]) -> str:
    first, *rest = [part for part in parts if part]
    return "\n\n".join([first, NOTE, *rest]) + "\n"


def type_name(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return a JSON schema as a reader says it."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        target = definitions.get(name, {})
        return type_name(target, definitions) if "enum" in target else f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        kinds = [type_name(one, definitions) for one in schema["anyOf"]]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{one}`" for one in schema.get("enum", [schema.get("const")]))
    kind = {"boolean": "true, false", "number": "number", "integer": "whole number", "null": "null"}.get(
        schema.get("type", ""), schema.get("type", "any")
    )
    if kind == "array":
        items = schema.get("items", {})
        return f"list of {type_name(items, definitions)}" if items else "list"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"mapping to {type_name(values, definitions)}" if isinstance(values, dict) and values else "mapping"
    bounds = [
        f"{sign} {schema[key]:,}".replace(",", "_")
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    if "minLength" in schema or "maxLength" in schema:
        bounds.append(f"{schema.get('minLength', 0)} to {schema.get('maxLength', '…')} characters")
    return " ".join([kind, ", ".join(bounds)]).strip()


def default_text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value == int(value):
        return f"{int(value)}"
    if isinstance(value, dict | tuple | list) and not value:
        return "empty"
    if isinstance(value, tuple):
        return ", ".join(default_text(one) for one in value)
    return str(value)
