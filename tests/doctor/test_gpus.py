"""The answers of `nvidia-smi`, which a script gives here in its place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.doctor import gpus
from serve_app.doctor.gpus import Gpu, GpusSick

ROWS = """0, NVIDIA H200, 570.133.20, 34, 0, 16, 16, Not Active
1, NVIDIA H200, 570.133.20, 91, 2, 8, 16, Active
2, NVIDIA L4, 570.133.20, [N/A], [N/A], [N/A], [N/A], Not Active
"""
REMAPPED = """00000000:18:00.0, No, No
00000000:2A:00.0, Yes, No
00000000:3A:00.0, No, No
"""
LINKS = """GPU 0: NVIDIA H200 (UUID: GPU-6c41)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
GPU 1: NVIDIA H200 (UUID: GPU-0b57)
\t Link 0: 26.562 GB/s
\t Link 1: <inactive>
"""
Install = Callable[[str], None]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that puts a script called nvidia-smi first on the PATH."""

    def install(script: str) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


def test_what_it_says(nvidia_smi: Install, tmp_path: Path) -> None:
    for name, text in (("rows", ROWS), ("remapped", REMAPPED), ("links", LINKS)):
        (tmp_path / name).write_text(text)
    nvidia_smi(
        f'case "$1" in --query-gpu=*) cat {tmp_path}/rows ;; --query-remapped*) cat {tmp_path}/remapped ;; '
        f"nvlink) cat {tmp_path}/links ;; *) exit 2 ;; esac"
    )
    well, sick, small = gpus.gpus()
    assert well == Gpu(0, "NVIDIA H200", "570.133.20", 34, 0, False, (16, 16), False, (2, 2))
    assert sick == Gpu(1, "NVIDIA H200", "570.133.20", 91, 2, True, (8, 16), True, (1, 2))
    assert small == Gpu(2, "NVIDIA L4", "570.133.20")


def test_gpus_without_links_or_remapping(nvidia_smi: Install, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text(ROWS)
    nvidia_smi(f'case "$1" in --query-gpu=*) cat {tmp_path}/rows ;; *) echo "not supported" >&2; exit 3 ;; esac')
    assert [(gpu.links, gpu.remapping) for gpu in gpus.gpus()] == [((0, 0), False)] * 3


def test_a_driver_that_fails_or_hangs(nvidia_smi: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi('echo "Unable to determine the device handle for GPU0: Unknown Error"; exit 15')
    with pytest.raises(GpusSick, match="nvidia-smi ended with 15: Unable to determine the device handle for GPU0"):
        gpus.gpus()
    nvidia_smi('echo "No devices were found"')
    with pytest.raises(GpusSick, match="nvidia-smi says 'No devices were found'"):
        gpus.gpus()
    monkeypatch.setattr(gpus, "_ANSWER_S", 0.2)
    nvidia_smi("exec sleep 60")
    with pytest.raises(GpusSick, match="does not answer within"):
        gpus.gpus()


def test_a_host_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.gpus() == []
