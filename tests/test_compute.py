from __future__ import annotations

import gc
import os

import pytest
import torch

from serve_app.compute import is_out_of_memory, pick_device, pick_devices, see_own_first, settle
from serve_app.errors import ConfigError


def test_a_refused_allocation_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_devices_that_are_not_there_are_one_line() -> None:
    assert pick_devices("cpu", 1) == [torch.device("cpu")]
    with pytest.raises(ConfigError, match=r"^decoder.devices has value 2, expected at most 0, the GPUs it sees$"):
        pick_devices("cpu", 2)


@pytest.mark.parametrize(
    ("visible", "own", "expected"),
    [
        (None, [], [0, 1]),
        (None, ["2"], [2, 3]),
        (None, ["3"], [3, 0]),
        ("4,5,6,7", ["5"], [1, 2]),
        ("0,1", ["0", "1"], [0, 1]),
    ],
)
def test_devices_begin_with_the_own_one(
    visible: str | None, own: list[str], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len((visible or "0,1,2,3").split(",")))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert pick_devices("cuda", 2, own) == [torch.device("cuda", index) for index in expected]


@pytest.mark.parametrize(
    ("visible", "own", "expected"),
    [
        (None, ["2"], "2,0,1,3"),
        (None, ["0"], "0,1,2,3"),
        ("4,5,6", ["5"], "5,4,6"),
        ("4,5", [], "4,5"),
        (None, [], None),
    ],
)
def test_a_process_may_see_its_own_device_first(
    visible: str | None, own: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    see_own_first(own, 4)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected


@pytest.mark.parametrize(("wanted", "expected"), [("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_a_cuda_device_has_an_index(wanted: str, expected: str) -> None:
    # Memory limits are refused for one without.
    assert pick_device(wanted) == torch.device(expected)


def test_what_was_there_before_is_no_work_for_the_collector() -> None:
    gc.unfreeze()
    settle()
    try:
        frozen = gc.get_freeze_count()
        assert frozen > 10_000 and len(gc.get_objects()) < frozen / 100
    finally:
        gc.unfreeze()
