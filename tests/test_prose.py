"""Docstrings begin with their subject or with what is done, so that they are read once."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPENINGS = {
    "as", "beyond", "how", "of", "so", "that", "those", "until", "what", "where", "whether", "who", "whose",
}  # fmt: skip
"""First words that leave the reader without a subject."""


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring, those below attributes included."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for before, statement in zip([None, *node.body], node.body, strict=False):
            described = before is None or isinstance(before, ast.Assign | ast.AnnAssign)
            value = statement.value if isinstance(statement, ast.Expr) and described else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


def test_no_docstring_begins_without_a_subject() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text.strip().splitlines()[0]}"
        for folder in ("benchmarks", "cluster", "serve_app")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line, text in docstrings(ast.parse(file.read_text()))
        if text.split()[:1] and text.split()[0].strip("`*,.:;").lower() in OPENINGS
    ]
    assert not found, "\n".join(found)
