"""The page of routes and fields, from the OpenAPI of the gateway."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docs.generate.markdown import Stale, anchor, cell, default_text, page, sentence, table, type_name
from serve_app.config import Config, validate
from serve_app.gateway.app import create_app
from serve_app.jobs.store import JobStore
from serve_app.parameters import EVERY, Parameter
from serve_app.storage import Storage


def application() -> Any:
    """Return the FastAPI application of a server with keys; nothing of it is started."""

    async def nothing() -> None:
        return None

    config = validate({"auth": {"mode": "keys"}, "storage": {"url": "/tmp"}})
    return create_app(config, JobStore("sqlite:////nowhere/jobs.db"), Storage(config.storage_options), nothing, nothing)


def api_page(words: dict[str, Any]) -> str:
    fields = words["fields"]
    app = application()
    openapi = app.openapi()
    schemas: dict[str, Any] = openapi["components"]["schemas"]
    scopes = _scopes(app)
    parts = [
        "# The API",
        "Routes, fields, ranges and status codes. [Use the HTTP API](../howto/http-api.md) shows how; "
        "[errors](errors.md) explains every code. A running server has the same as `/openapi.json`.",
        "Where keys are needed, send `Authorization: Bearer wan_…`. *Scope* is what the key must have. Times are Unix "
        "times in seconds.",
        "## Routes",
    ]
    common = _common(openapi)
    rows = []
    details: list[str] = []
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            name = f"{method.upper()} {path}"
            text = operation.get("description") or words["routes"].get(name)
            if text is None:
                raise Stale(f"{name} has no docstring in the code and no sentence in words.yaml")
            scope = scopes.get((method.upper(), path), "none")
            rows.append((f"[`{name}`](#{anchor(name)})", scope, cell(text)))
            details += [f"### {name}", sentence(text), *_operation(name, operation, schemas, common, words)]
    parts += [table(rows, ("route", "scope", "what it does")), "## Errors of most routes"]
    parts.append(
        "These answers have the body [ErrorEnvelope](#errorenvelope). Each route below lists what else it answers."
    )
    parts.append(
        table(
            ((status, _codes(status, "", words), cell(common[status]["description"])) for status in sorted(common)),
            ("status", "codes", "when"),
        )
    )
    parts += [*details, "## Objects"]
    bodies = [*_bodies(openapi)]
    for title, schema in (*bodies, *sorted(schemas.items())):
        if title in ("HTTPValidationError", "ValidationError") or ((title, schema) in bodies and title in schemas):
            continue
        if "properties" not in schema:
            continue
        ranges = request_fields() if title == "CreateVideo" else fields.get(title, {})
        if unknown := set(ranges) - set(schema["properties"]):
            raise Stale(f"words.yaml: fields: {title}: {', '.join(sorted(unknown))}: no such fields")
        parts += [f"### {title}", sentence(schema.get("description", "")), _fields(schema, schemas, ranges)]
    return page(parts)


def _scopes(app: Any) -> dict[tuple[str, str], str]:
    names = {"Reader": "`read`", "Creator": "`create`", "AnyCaller": "any"}
    found = {}
    for route in _routes(app.routes):
        if getattr(route, "endpoint", None) is not None:
            hints = getattr(route.endpoint, "__annotations__", {})
            for method in getattr(route, "methods", None) or ():
                found[method, route.path.replace(":path}", "}")] = names.get(str(hints.get("who")), "none")
    return found


def _routes(routes: Any) -> Iterator[Any]:
    """Yield all routes; newer versions of FastAPI keep those of a router together."""
    for route in routes:
        inner = getattr(getattr(route, "original_router", None), "routes", None) or getattr(route, "routes", None)
        if inner:
            yield from _routes(inner)
        else:
            yield route


def _common(openapi: dict[str, Any]) -> dict[str, Any]:
    """Return the error answers that most routes share, by status."""
    operations = [one for methods in openapi["paths"].values() for one in methods.values()]
    found: dict[str, list[Any]] = {}
    for operation in operations:
        for status, answer in operation["responses"].items():
            if status >= "400" and status != "422":
                found.setdefault(status, []).append(answer)
    most = {status: max(answers, key=answers.count) for status, answers in found.items()}
    return {status: one for status, one in most.items() if found[status].count(one) > len(operations) // 2}


def _codes(status: str, route: str, words: dict[str, Any]) -> str:
    """Return the codes that come with a status: those of a route alone, or with no route those of all."""
    mine = [
        f"`{one['code']}`"
        for one in words["api_errors"]
        if str(one["status"]) == status
        and ("routes" not in one if not route else any(route.endswith(end) for end in one.get("routes", ())))
    ]
    return ", ".join(mine)


def _operation(
    name: str, operation: dict[str, Any], schemas: dict[str, Any], common: dict[str, Any], words: dict[str, Any]
) -> Iterator[str]:
    parameters = []
    for one in operation.get("parameters", []):
        meaning = one.get("description") or words["parameters"].get(one["name"])
        if meaning is None:
            raise Stale(f"words.yaml: parameters: lacks {one['name']}")
        default = default_text(one["schema"]["default"]) if "default" in one["schema"] else ""
        where = one["in"] + (", required" if one.get("required") else "")
        parameters.append((f"`{one['name']}`", where, type_name(one["schema"], schemas), default, cell(meaning)))
    if parameters:
        yield table(parameters, ("parameter", "in", "type", "default", "meaning"))
    if body := operation.get("requestBody"):
        kinds = ", ".join(f"`{kind}`" for kind in body["content"])
        schema = next(iter(body["content"].values()))["schema"]
        yield f"Body ({kinds}): {_link(schema, schemas)}"
    answers = {one: answer for one, answer in operation["responses"].items() if one != "422"}  # FastAPI's; 400 here
    rows = [
        (status, _codes(status, name, words) or _answer(answer, schemas), cell(answer.get("description", "")))
        for status, answer in sorted(answers.items())
        if answer != common.get(status) or _codes(status, name, words)
    ]
    yield table(rows, ("status", "body, or codes of an error", "when"))
    if shared := [status for status, answer in sorted(answers.items()) if answer == common.get(status)]:
        yield f"Errors as of most routes: {', '.join(shared)}."


def _answer(answer: dict[str, Any], schemas: dict[str, Any]) -> str:
    shown = []
    for kind, content in answer.get("content", {}).items():
        schema = content.get("schema", {})
        shown.append(_link(schema, schemas) if schema else f"`{kind}`")
    return ", ".join(dict.fromkeys(shown)) or "none"


def _link(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_link(one, schemas) for one in schema["anyOf"] if one.get("type") != "null")
    title = schema["$ref"].rsplit("/", 1)[1] if "$ref" in schema else schema.get("title", "")
    if title in schemas or schema.get("properties"):
        return f"[{title}](#{title.lower()})"
    return type_name(schema, schemas)


def _bodies(openapi: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the bodies that are described where they are used, and not among the components."""
    known = set(openapi["components"]["schemas"])
    for methods in openapi["paths"].values():
        for operation in methods.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                schema = content["schema"]
                if "properties" in schema and schema["title"] not in known:
                    known.add(schema["title"])
                    yield schema["title"], schema


def _fields(schema: dict[str, Any], schemas: dict[str, Any], ranges: dict[str, str]) -> str:
    definitions = {**schemas, **schema.get("$defs", {})}
    rows = []
    for name, one in schema["properties"].items():
        kind = type_name(one, definitions) + ("; required" if name in schema.get("required", []) and ranges else "")
        meaning = " ".join(filter(None, (one.get("description", ""), _filled(ranges.get(name, "")))))
        rows.append((f"`{name}`", kind, cell(meaning)))
    return table(rows, ("field", "type", "meaning and range" if ranges else "meaning"))


def request_fields() -> dict[str, str]:
    """Return the range and the default of each field of a request."""
    return {name: " ".join(filter(None, (_range(one), one.note, _default(one)))) for name, one in EVERY.items()}


def _range(one: Parameter) -> str:
    if one.kind is str:
        return f"Up to {{limits.{one.limit}}} characters (`limits.{one.limit}`)." if one.limit else ""
    most = f"{{limits.{one.limit}}} (`limits.{one.limit}`)" if one.limit else one.most
    besides = f", or {one.besides}" if one.besides else ""
    if one.least is not None:
        return f"{one.least} to {most}{besides}." if most is not None else f"At least {one.least}."
    if one.above is not None:
        return f"Above {one.above}, at most {most}." if most is not None else f"Above {one.above}."
    return ""


def _default(one: Parameter) -> str:
    if not one.configurable or one.default is None:
        return ""
    return f"Default `defaults.{one.name}`." if one.kind is str else f"Default {{defaults.{one.name}}}."


def _filled(text: str) -> str:
    """Return a text with `{limits.pixels}` and the like replaced by the default of that option."""

    def value(match: re.Match[str]) -> str:
        found: Any = Config()
        for part in match[1].split("."):
            found = getattr(found, part)
        return str(found)

    return re.sub(r"\{([a-z_.0-9]+)\}", value, text)
