"""A parameter is declared once, and everything that shows parameters follows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from serve_app import parameters
from serve_app.config import Config, Limits
from serve_app.parameters import EVERY, PARAMETERS

# One more field in the text of `serve_app/parameters.py`, and then whoever shows parameters.
ONE_MORE = """
import json, sys
from pathlib import Path
from types import ModuleType

path = Path(sys.argv[1])
before = "    boundary_ratio: float | None = parameter("
text = path.read_text(encoding="utf-8")
assert text.count(before) == 1
added = '''    sharpness: float | N = parameter(
        "How sharp edges are.", default=1.5, least=0, most=9, flags=("--sharp",), synonyms=("crispness",)
    )
'''
module, bare = ModuleType("serve_app.parameters"), ModuleType("serve_app")
bare.__path__ = [str(path.parent)]  # what it imports shall not import the whole package, and so itself
sys.modules.update({"serve_app.parameters": module, "serve_app": bare})
exec(compile(text.replace(before, added + before), str(path), "exec"), module.__dict__)
del sys.modules["serve_app"]

import yaml

from docs.generate.__main__ import REFERENCE
from docs.generate.api import api_page, application
from docs.generate.cli import cli_page
from docs.generate.options import options_page
from serve_app.config import validate
from serve_app.errors import ServeAppError
from serve_app.request import parse, resolve

def refusal(*arguments):
    try:
        resolve(parse({"prompt": "a", **dict([arguments])}), validate({}))
    except ServeAppError as error:
        return str(error)

openapi, words = application().openapi(), yaml.safe_load((REFERENCE / "words.yaml").read_text(encoding="utf-8"))
body = openapi["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"]
print(json.dumps({
    "default": resolve(parse({"prompt": "a"}), validate({"defaults": {"sharpness": 2.5}})).sharpness,
    "given": resolve(parse({"prompt": "a", "sharpness": 3.0}), validate({})).sharpness,
    "range": refusal("sharpness", 10.0),
    "synonym": refusal("crispness", 1),
    "body": body["properties"]["sharpness"],
    "video": openapi["components"]["schemas"]["Video"]["properties"]["sharpness"],
    "cli": [line for line in cli_page().splitlines() if "sharpness" in line],
    "api page": [line for line in api_page(words).splitlines() if "`sharpness`" in line],
    "options page": [line for line in options_page(words["options"]).splitlines() if "sharpness" in line],
}))
"""


def test_one_more_parameter_is_one_declaration() -> None:
    command = [sys.executable, "-c", ONE_MORE, str(Path(parameters.__file__))]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert (found["default"], found["given"]) == (2.5, 3.0)
    assert found["range"] == "'sharpness' is 10.0, expected 0 to 9."
    assert found["synonym"] == "Unknown field 'crispness', did you mean 'sharpness'?"
    assert found["body"]["description"] == found["video"]["description"] == "How sharp edges are."
    assert found["cli"] == ["| `--sharp`, `--sharpness` | number |  | How sharp edges are. |"]
    assert found["api page"] == [
        "| `sharpness` | number or null | How sharp edges are. 0 to 9. Default 1.5. |",
        "| `sharpness` | number | How sharp edges are. |",
    ]
    assert found["options page"] == ["| `defaults.sharpness` | number ≥ 0, ≤ 9 | 1.5 | How sharp edges are. |"]


def test_limits_are_options() -> None:
    assert {one.limit for one in EVERY.values() if one.limit} < Limits.model_fields.keys()


def test_synonyms_name_one_parameter() -> None:
    synonyms = [*EVERY, *(name for one in EVERY.values() for name in one.synonyms)]
    assert len(synonyms) == len(set(synonyms))


def test_every_number_has_a_range() -> None:
    numbers = [one for one in PARAMETERS.values() if one.kind is not str]
    assert all(one.least is not None and (one.most is not None or one.limit) for one in numbers)
    for one in numbers:
        if one.configurable and one.default is not None:
            most = getattr(Config().limits, one.limit) if one.limit else one.most
            assert one.least <= one.default <= most, one.name
