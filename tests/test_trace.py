from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.model.trace import milliseconds, read, span_ms


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two streams: a product and a copy beside it, a wait, and attention half beside a norm. Microseconds."""
    events = [
        ("kernel", "flash_fwd", 4000, 2000),
        ("kernel", "nvjet_sm90_tst", 1000, 1000),
        ("gpu_memcpy", "Memcpy PtoP (Device -> Device)", 1500, 2000),
        ("kernel", "c10d::symmetric_memory::wait_signal_kernel(unsigned int**)", 2000, 1500),
        ("kernel", "triton_red_fused_flash", 5000, 1500),
        ("kernel", "ncclDevKernel_AllReduce", 6500, 500),
        ("kernel", "elementwise", 7000, 500),
        ("cpu_op", "aten::mm", 0, 9000),
    ]
    file = tmp_path / "trace.json.gz"
    with gzip.open(file, "wt") as stream:
        keys = ("cat", "name", "ts", "dur")
        json.dump({"traceEvents": [{"ph": "M"}, *(dict(zip(keys, one, strict=True)) for one in events)]}, stream)
    return file


def test_what_a_pass_consists_of(trace: Path) -> None:
    kernels = read(trace)
    assert span_ms(kernels) == 6.5
    assert milliseconds(kernels) == {
        "norms and elementwise": 2.0,
        "attention": 2.0,
        "matrix products": 1.0,
        "copies": 2.0,
        "waiting": 1.5,
        "collectives": 0.5,
        "idle": 2.0 + 0.5,
    }


def test_a_pass_without_kernels() -> None:
    assert span_ms([]) == 0 and not any(milliseconds([]).values())
