"""Wire forms of requests to ranks and of their answers."""

from __future__ import annotations

import json

import pytest

from serve_app.engine.messages import StepRequest, StepResult


@pytest.mark.parametrize(
    "message",
    [
        StepRequest(["a", "b"], ["c"], {"a": "samples/a"}),
        StepRequest(["a"]),
        StepResult(0.25, {"b": "not finite"}),
        StepResult(0.25, {}),
    ],
)
def test_a_message_comes_back_from_its_wire_form_which_is_plain(message: StepRequest | StepResult) -> None:
    wire = message.to_wire()
    assert isinstance(wire, list) and json.loads(json.dumps(wire)) == wire
    assert type(message).from_wire(wire) == message
