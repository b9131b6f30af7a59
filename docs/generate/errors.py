"""The page of error codes: which there are says the source, what they mean `words.yaml`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.generate.markdown import Stale, page, table

SOURCE = Path(__file__).resolve().parents[2] / "serve_app"


def codes() -> tuple[set[tuple[int, str]], set[str]]:
    """Return the codes that the source names: those of HTTP answers with their status, and those of failed videos."""
    answers: set[tuple[int, str]] = set()
    jobs: set[str] = set()
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            said = [[*_words(argument)] for argument in node.args]
            status = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if called == "ApiError" and isinstance(status, int) and len(said) > 1:
                answers |= {(status, word) for word in said[1]}
            elif called in ("OverLimit", "too_much") and said:
                answers |= {(429, word) for word in said[0]}
            elif called == "JobFailed" and said:
                jobs |= {*said[0]}
            elif called in ("fail", "_fail"):
                jobs |= {word for words in said[1:-1] for word in words}
    return answers, jobs


def _words(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch("[a-z][a-z_]+", node.value):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from _words(node.body)
        yield from _words(node.orelse)


def errors_page(answers: list[dict[str, Any]], jobs: list[dict[str, str]]) -> str:
    found_answers, found_jobs = codes()
    told = {(one["status"], one["code"]) for one in answers}
    if missing := found_answers - told:
        raise Stale(f"words.yaml: api_errors lacks {sorted(missing)}")
    names = {one["code"] for one in jobs}
    if missing_jobs := found_jobs - names:
        raise Stale(f"words.yaml: job_errors lacks {sorted(missing_jobs)}")
    source = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    if gone := [code for code in (*names, *(one["code"] for one in answers)) if f'"{code}"' not in source]:
        raise Stale(f"words.yaml: {', '.join(gone)}: no longer in the code")
    parts = [
        "# Errors",
        "## Answers of the API",
        'Every error has the body `{"error": {"message", "type", "param", "code"}}`. `message` names the value and '
        "what was expected; `param` names the field; `code` is a stable word for programs. The header `x-should-retry` "
        "says whether the same request may succeed later, and `Retry-After` when.",
        table(
            ((str(one["status"]), f"`{one['code']}`", one["meaning"], one["do"]) for one in answers),
            ("status", "code", "meaning", "what to do"),
        ),
        "## Why a video failed",
        "A failed video has `error.code` and `error.message`. While another attempt is made, `last_error` says why the "
        "one before failed. *Tried again* says whether the service itself makes another attempt.",
        table(
            ((f"`{one['code']}`", one["meaning"], one["retried"]) for one in jobs), ("code", "meaning", "tried again")
        ),
    ]
    return page(parts)
