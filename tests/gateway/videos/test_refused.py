"""Create requests that are refused: wrong fields, bodies and files."""

from __future__ import annotations

import json
from typing import Any

from tests.gateway.conftest import Server
from tests.support.databases import count_queued

BAD: list[tuple[dict[str, Any], str | None]] = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "  \n"}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "x" * 4001}, "prompt"),
    ({"prompt": "a\0b"}, "prompt"),
    ({"prompt": "x", "negative_prompt": "y" * 4001}, "negative_prompt"),
    ({"prompt": "x", "colour": "red"}, "colour"),
    ({"prompt": "x", "model": "sora-2"}, "model"),
    ({"prompt": "x", "size": "big"}, "size"),
    ({"prompt": "x", "size": 128}, "size"),
    ({"prompt": "x", "size": "100x128"}, "size"),
    ({"prompt": "x", "size": "0x0"}, "size"),
    ({"prompt": "x", "size": "1024x1024"}, "size"),
    ({"prompt": "x", "size": "128x128", "width": 128}, "size"),
    ({"prompt": "x", "width": 100}, "width"),
    ({"prompt": "x", "width": 16 * 10**4000, "height": 16 * 10**4000}, "width"),
    ({"prompt": "x", "num_frames": 10**4000}, "num_frames"),
    ({"prompt": "x", "\ud800": 1}, None),
    ({"prompt": "x", "c" * 5000: 1}, "c" * 80),
    ({"prompt": "x", "height": -16}, "height"),
    ({"prompt": "x", "width": "128"}, "width"),
    ({"prompt": "x", "width": 128.5}, "width"),
    ({"prompt": "x", "width": True}, "width"),
    ({"prompt": "x", "num_frames": 32}, "num_frames"),
    ({"prompt": "x", "num_frames": 85}, "num_frames"),
    ({"prompt": "x", "num_frames": 0}, "num_frames"),
    ({"prompt": "x", "num_frames": 33, "seconds": "2"}, "seconds"),
    ({"prompt": "x", "seconds": "60"}, "seconds"),
    ({"prompt": "x", "seconds": "soon"}, "seconds"),
    ({"prompt": "x", "seconds": "nan"}, "seconds"),
    ({"prompt": "x", "seconds": "-1"}, "seconds"),
    ({"prompt": "x", "seconds": True}, "seconds"),
    ({"prompt": "x", "seconds": [4]}, "seconds"),
    ({"prompt": "x", "fps": 0}, "fps"),
    ({"prompt": "x", "fps": 0, "seconds": 2}, "fps"),
    ({"prompt": "x", "fps": 61}, "fps"),
    ({"prompt": "x", "fps": -5, "seconds": 2}, "fps"),
    ({"prompt": "x", "fps": 10**400, "seconds": 2}, "fps"),
    ({"prompt": "x", "num_inference_steps": 101}, "num_inference_steps"),
    ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps"),
    ({"prompt": "x", "seed": -2}, "seed"),
    ({"prompt": "x", "seed": 2**63}, "seed"),
    ({"prompt": "x", "seed": 10**400}, "seed"),
    ({"prompt": "x", "guidance_scale": 101}, "guidance_scale"),
    ({"prompt": "x", "guidance_scale": "high"}, "guidance_scale"),
    ({"prompt": "x", "guidance_scale_2": -1}, "guidance_scale_2"),
    ({"prompt": "x", "flow_shift": 0}, "flow_shift"),
    ({"prompt": "x", "boundary_ratio": 1.5}, "boundary_ratio"),
    ({"prompt": "x", "input_reference": "data:"}, "input_reference"),
    ({"prompt": "x", "priority": "high"}, "priority"),
    ({"prompt": "x", "priority": 1}, "priority"),
    ({"prompt": "x", "deadline_s": 0}, "deadline_s"),
    ({"prompt": "x", "deadline_s": -1}, "deadline_s"),
    ({"prompt": "x", "deadline_s": 1e300}, "deadline_s"),
    ({"prompt": "x", "deadline_s": 10**400}, "deadline_s"),
    ({"prompt": "x", "deadline_s": "60"}, "deadline_s"),
]


async def test_bad_fields(server: Server) -> None:
    for fields, param in BAD:
        case = str(fields)[:80]
        body = json.dumps(fields)
        answer = await server.http.post("/v1/videos", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (case, answer.text)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["param"], error["type"]) == (param, "invalid_request_error"), (case, error)
        assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 400, case
        assert answer.headers["x-should-retry"] == "false"
    assert await count_queued(server.store) == 0 and server.pipeline.jobs == []


async def test_bad_bodies(server: Server) -> None:
    for content, kind in (
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b"[" * 40_000, "application/json"),
        (b'{"prompt": "\xff"}', "application/json"),
        (b'{"prompt": "\\ud800"}', "application/json"),
        (b'{"prompt": "x", "guidance_scale": NaN}', "application/json"),
        (b'{"prompt": "x", "flow_shift": 1e999}', "application/json"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "application/json"),
        (b"prompt", "text/plain"),
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x"),
        (b"prompt", "multipart/form-data"),
        (b"prompt=a&prompt=b", "application/x-www-form-urlencoded"),
    ):
        answer = await server.http.post("/v1/videos", content=content, headers={"content-type": kind})
        assert answer.status_code == 400, (content[:80], answer.text)
        assert answer.json()["error"]["message"], content[:80]
    assert await count_queued(server.store) == 0


async def test_a_file_instead_of_text(server: Server) -> None:
    reference = await server.http.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": b"png"})
    assert (reference.status_code, reference.json()["error"]["code"]) == (400, "unsupported")
    prompt = await server.http.post("/v1/videos", files={"prompt": b"x"})
    assert (prompt.status_code, prompt.json()["error"]["param"]) == (400, "prompt")
