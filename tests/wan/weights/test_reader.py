from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.errors import CheckpointError
from serve_app.wan.weights.reader import Weights

STEM = "diffusion_pytorch_model"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(6, 8),
        "half": torch.randn(8, 4).bfloat16(),
        "cube": torch.randn(2, 6, 4),
        "vector": torch.randn(12),
        "scalar": torch.tensor(3.5),
        "counts": torch.arange(10),
    }


@pytest.fixture
def weights(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Weights:
    save_file(tensors, tmp_path / f"{STEM}.safetensors", metadata={"format": "pt"})
    return Weights(tmp_path)


def test_whole_tensors(weights: Weights, tensors: dict[str, torch.Tensor]) -> None:
    assert weights.names() == set(tensors)
    for name, tensor in tensors.items():
        assert weights.shape(name) == tuple(tensor.shape)
        read = weights.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_slices_along_every_dimension(weights: Weights, tensors: dict[str, torch.Tensor]) -> None:
    for name in ("matrix", "half", "cube", "vector"):
        for dim, size in enumerate(tensors[name].shape):
            for start, stop in ((0, size // 2), (size // 2, size), (1, size), (0, 0)):
                expected = tensors[name].narrow(dim, start, stop - start)
                assert torch.equal(weights.read(name, dim, start, stop), expected), (name, dim, start, stop)


@pytest.mark.parametrize("size", [8, 48, 1 << 20])
def test_conversion_while_reading(
    weights: Weights, tensors: dict[str, torch.Tensor], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "serve_app.wan.weights.reader._BUFFER", size
    )  # smaller than a row, than a tensor, larger than both
    for name, dtype in (("matrix", torch.bfloat16), ("cube", torch.float16), ("half", torch.float32)):
        for dim, count in enumerate(tensors[name].shape):
            for start, stop in ((0, count // 2), (1, count), (0, count), (0, 0)):
                expected = tensors[name].narrow(dim, start, stop - start).to(dtype)
                read = weights.read(name, dim, start, stop, dtype)
                assert read.dtype == dtype
                assert torch.equal(read, expected), (name, dim, start, stop)
    assert torch.equal(weights.read("scalar", dtype=torch.float64), tensors["scalar"].double())


def test_threads_that_read_and_convert_at_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {str(index): torch.randn(1 << 18) for index in range(16)}
    save_file(tensors, tmp_path / f"{STEM}.safetensors")
    with Weights(tmp_path) as weights, ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            read = threads.map(lambda name: weights.read(name, dtype=torch.bfloat16), tensors)
            assert all(map(torch.equal, read, (tensor.bfloat16() for tensor in tensors.values())))


def test_a_slice_outside_is_refused(weights: Weights) -> None:
    with pytest.raises(IndexError, match="slice 4:7 is outside of dimension 0, which has 6 entries"):
        weights.read("matrix", 0, 4, 7)


def test_many_files(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    files = {name: f"{STEM}-0000{i}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for name, file in files.items():
        save_file({name: tensors[name]}, tmp_path / file)
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    with Weights(tmp_path) as weights:
        for name, tensor in tensors.items():
            assert torch.equal(weights.read(name), tensor)


def test_only_the_slice_is_read(tmp_path: Path) -> None:
    save_file({"large": torch.randn(1024, 4096)}, tmp_path / f"{STEM}.safetensors")
    weights = Weights(tmp_path)
    for dim in (0, 1):
        before = bytes_read()
        weights.read("large", dim, 0, weights.shape("large")[dim] // 8)
        assert 0 <= bytes_read() - before - (1024 * 4096 * 4 // 8) < 100_000


def test_the_checkpoint_as_safetensors_reads_it(checkpoint: Path) -> None:
    folder = checkpoint / "transformer"
    expected = load_file(folder / f"{STEM}.safetensors")
    with Weights(folder) as weights:
        assert weights.names() == set(expected)
        assert all(torch.equal(weights.read(name), tensor) for name, tensor in expected.items())


def test_reading_into_given_memory(weights: Weights, tensors: dict[str, torch.Tensor]) -> None:
    for name, dtype in (("matrix", torch.float32), ("matrix", torch.bfloat16), ("half", torch.bfloat16)):
        out = torch.full((2, tensors[name].shape[1]), 7.0, dtype=dtype)
        assert weights.read(name, 0, 1, 3, dtype, out=out).data_ptr() == out.data_ptr()
        assert torch.equal(out, tensors[name][1:3].to(dtype))


def test_files_that_change_or_cannot_be_read_are_named(weights: Weights, tmp_path: Path) -> None:
    file = tmp_path / f"{STEM}.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match=rf"^{file}: ended at byte {len(whole) - 8}, expected 8 more"):
        for name in weights.names():
            weights.read(name)
    weights.close()
    file.unlink()
    file.mkdir()  # can be opened, not read
    with pytest.raises(CheckpointError, match=rf"^{file}: cannot be read at byte \d+: Is a directory"):
        weights.read("matrix")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", (1 << 60).to_bytes(8, "little") + b"{}"])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / f"{STEM}.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        Weights(tmp_path)


def test_a_header_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / f"{STEM}.safetensors").write_bytes((4).to_bytes(8, "little") + b"nope")
    with pytest.raises(CheckpointError, match="has a header that cannot be read"):
        Weights(tmp_path)


def bytes_read() -> int:
    """Return the number of bytes that this process has read from files so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])
