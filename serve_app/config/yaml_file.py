"""A YAML file as plain values, with the line of each.

Knows nothing of options. Of two equal keys PyYAML silently takes the last; here they are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from serve_app.errors import ConfigError


class YamlFile:
    """A YAML file that was read.

    Attributes:
        content: its values; None if it is empty.

    Raises:
        ConfigError: the file cannot be read, or is not YAML; the message has the line if it is known.
    """

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8-sig")
            self._root = yaml.compose(text, Loader=_Loader)
            self.content: Any = yaml.load(text, Loader=_Loader)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: is not YAML: {_told(error)}") from None
        except RecursionError:
            raise ConfigError(f"{path}: is nested too deeply, expected a few levels") from None

    def line(self, place: Sequence[object]) -> int:
        """Return the line, counted from 1, of the key or item at a place, such as `("applications", 0, "args")`.

        If the file has no such place, the line is that of the nearest place above it.
        """
        node, line = self._root, 1
        for name in place:
            found = _child(node, name)
            if found is None:
                break
            line, node = found
        return line


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses two equal keys, and scalars such as an impossible date."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Checked before the keys of `<<` are merged in: those may be equal to keys of the mapping.
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                mark = key.start_mark
                if (name := (key.tag, key.value)) in lines:
                    problem = f"the key {key.value!r} is there already, on line {lines[name]}"
                    raise yaml.constructor.ConstructorError(None, None, problem, mark)
                lines[name] = mark.line + 1
        super().flatten_mapping(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a date with a thirteenth month
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


def _child(node: yaml.Node | None, name: object) -> tuple[int, yaml.Node] | None:
    """Return the line and the node of one entry; None if there is none."""
    if isinstance(node, yaml.SequenceNode) and isinstance(name, int) and name < len(node.value):
        item = node.value[name]
        return item.start_mark.line + 1, item
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == str(name):
                return key.start_mark.line + 1, value
        for key, value in node.value:
            if key.value == "<<" and (found := _child(value, name)) is not None:
                return found
    return None


def _told(error: yaml.YAMLError) -> str:
    """Describe a mistake in YAML by its line and the problem there."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())
