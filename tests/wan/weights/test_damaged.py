"""Damaged model folders, which libraries would load or fail on late, are refused at once in a line with the file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from benchmarks.model import dummy_checkpoint as dummy_checkpoint
from serve_app.errors import CheckpointError
from serve_app.wan.text import TextEncoder
from serve_app.wan.vae.decoder import VideoDecoder
from serve_app.wan.weights.checkpoint import Checkpoint
from serve_app.wan.weights.files import check_loading, read_header
from serve_app.wan.weights.tensors import TextConfig

Tensors = dict[str, torch.Tensor]
WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "transformer_2": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}
JSON = (
    "model_index.json",
    "transformer/config.json",
    "scheduler/scheduler_config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json",
)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 57\n"


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def file_of(folder: Path, component: str) -> Path:
    return folder / component / f"{WEIGHTS[component]}.safetensors"


def rewrite(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(file)), file, {"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        Checkpoint(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def renamed(tensors: Tensors) -> Tensors:
    return {f"x.{name}": tensor for name, tensor in tensors.items()}


def one_fewer(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != sorted(tensors)[3]}


def one_more(tensors: Tensors) -> Tensors:
    return {**tensors, "stray.weight": torch.ones(1)}


def one_cut(tensors: Tensors) -> Tensors:
    name = sorted(tensors)[3]
    return {**tensors, name: tensors[name][:1].repeat(2, *[1] * (tensors[name].ndim - 1))[: tensors[name].shape[0] + 1]}


def whole_numbers(tensors: Tensors) -> Tensors:
    name = sorted(tensors)[3]
    return {**tensors, name: tensors[name].to(torch.int8)}


@pytest.mark.parametrize("component", list(WEIGHTS))
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed, "is missing, expected by config.json (and "),
        (one_fewer, "is missing, expected by config.json"),
        (one_more, "the tensor 'stray.weight' is not expected by config.json"),
        (one_cut, "has shape ("),
        (whole_numbers, "is of type I8, expected one of F64"),
    ],
)
def test_tensors_that_do_not_fit(copy: Path, component: str, change: Callable[[Tensors], Tensors], said: str) -> None:
    file = file_of(copy, component)
    rewrite(file, change)
    line = refusal(copy)
    assert said in line and line.startswith(str(file))


@pytest.mark.parametrize("component", list(WEIGHTS))
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda data: POINTER, "is a pointer of a large-file store"),
        (lambda data: b"", "is not a safetensors file"),
        (lambda data: data[:-100], "it was not copied completely"),
        (lambda data: data[:5000], "it was not copied completely"),
        (lambda data: data[:1000], "it was not copied completely"),
        (lambda data: data + b"x", "bytes, expected"),
        (lambda data: b"<!DOCTYPE html><html>Sign in to download</html>", "is not a safetensors file"),
        (lambda data: data[:8] + b"\xff" * 9 + data[17:], "has a header that cannot be read"),
    ],
    ids=["pointer", "empty", "cut", "cut early", "cut in its header", "too long", "web page", "no text"],
)
def test_damaged_weights(copy: Path, component: str, content: Callable[[bytes], bytes], said: str) -> None:
    file = file_of(copy, component)
    file.write_bytes(content(file.read_bytes()))
    line = refusal(copy)
    assert line.startswith(str(file)) and said in line


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty, expected JSON"),
        (b" \n", "is empty, expected JSON"),
        (b'{"a": ', "cannot be read as JSON"),
        (b"[1]", "holds a list, expected an object"),
        (b'{"a": "\xe9"}', "is not UTF-8"),
        ("{}".encode("utf-16"), "is not UTF-8"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (POINTER, "is a pointer of a large-file store"),
    ],
    ids=["empty", "blank", "cut", "list", "latin1", "utf16", "deep", "pointer"],
)
def test_damaged_json(copy: Path, name: str, content: bytes, said: str) -> None:
    (copy / name).write_bytes(content)
    line = refusal(copy)
    assert line.startswith(str(copy / name)) and said in line


@pytest.mark.parametrize("name", [*JSON, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_what_is_no_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    (copy / name).mkdir()
    assert f"{copy / name}: is a folder or device, expected a file" in refusal(copy)
    (copy / name).rmdir()
    (copy / name).symlink_to("../../blobs/0123")  # as in the cache of the hub
    assert f"{copy / name}: is a link to ../../blobs/0123, which is missing" in refusal(copy)
    (copy / name).unlink()
    os.mkfifo(copy / name)  # nobody ever writes to it
    assert "is a folder or device" in refusal(copy)


def test_an_empty_vocabulary(copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer.json"
    for model in ({"type": "Unigram", "vocab": []}, {"type": "Unigram", "vocab": {}}, {"vocab": ["a"]}, [], None):
        path.write_text(json.dumps({"model": model}))
        assert f"{path}: has no vocabulary that can be read" in refusal(copy)


def sharded(folder: Path, component: str) -> tuple[Path, list[str]]:
    """Cut a component's weights into two files with an index, as libraries write them."""
    file = file_of(folder, component)
    tensors, stem = load_file(file), WEIGHTS[component]
    names, files = sorted(tensors), [f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    halves = {files[0]: names[: len(names) // 2], files[1]: names[len(names) // 2 :]}
    for name, held in halves.items():
        save_file({one: tensors[one] for one in held}, file.with_name(name), {"format": "pt"})
    file.unlink()
    index = file.with_name(f"{stem}.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {one: name for name in files for one in halves[name]}}))
    return index, files


@pytest.mark.parametrize("component", list(WEIGHTS))
def test_shards(copy: Path, component: str) -> None:
    whole = file_of(copy, component).read_bytes()
    index, files = sharded(copy, component)
    Checkpoint(copy)
    said = json.loads(index.read_text())
    first, places = sorted(said["weight_map"])[0], said["weight_map"]

    index.write_text(json.dumps({"weight_map": {**places, "y": files[0]}}))
    assert f"{files[0]}: lacks the tensor 'y', which {index.name} places there" in refusal(copy)
    index.write_text(json.dumps({"weight_map": {**places, first: files[1]}}))
    assert f"{files[1]}: lacks the tensor {first!r}" in refusal(copy)
    index.write_text(json.dumps({"weight_map": {name: file for name, file in places.items() if name != first}}))
    assert f"{files[0]}: holds the tensor {first!r}, which {index.name} does not name" in refusal(copy)
    for wrong in ({"weight_map": []}, {"weight_map": {"a": 1}}, {}):
        index.write_text(json.dumps(wrong))
        assert f"{index}: is not a safetensors index" in refusal(copy)
    index.write_text(json.dumps({"weight_map": {"a": "/etc/passwd"}}))
    assert f"{index}: names the file '/etc/passwd'" in refusal(copy)
    index.write_bytes(POINTER)
    assert f"{index}: is a pointer" in refusal(copy)
    index.write_text(json.dumps(said))

    rewrite(copy / component / files[1], lambda tensors: {**tensors, first: torch.ones(1)})
    assert f"holds the tensor {first!r}, expected it once" in refusal(copy)
    (copy / component / files[1]).unlink()
    assert f"{files[1]}: is missing, expected the weights of `{component}`" in refusal(copy)
    file_of(copy, component).write_bytes(whole)
    assert f"is there beside {index.name}" in refusal(copy)


def test_a_header_that_lies(tmp_path: Path) -> None:
    def file(header: str, data: bytes = b"") -> Path:
        path = tmp_path / "one.safetensors"
        path.write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode() + data)
        return path

    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    assert read_header(file(f'{{"a": {entry}}}', bytes(4)))["a"].shape == (1,)
    for header, said in (
        (f'{{"a": {entry}, "a": {entry}}}', "a name is there twice"),
        (f'{{"a": {entry}, "b": {entry}}}', "'b' begins at byte"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "has 4 bytes, expected 8 for F32"),
        ('{"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}', "has type F4, expected one of F64"),
        ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}', "cannot be read"),
        ('{"a": {"dtype": "F32", "shape": [1]}}', "cannot be read"),
        ('{"a": 1}', "cannot be read"),
        ("[]", "cannot be read"),
        ("{", "is not a safetensors file"),
    ):
        with pytest.raises(CheckpointError, match=said):
            read_header(file(header, bytes(4)))


def test_what_may_be_left_over_or_named_otherwise(copy: Path) -> None:
    """Files may hold the decoder of a whole UMT5, and the embeddings under the encoder's name for them."""

    def whole(tensors: Tensors) -> Tensors:
        shared = tensors.pop("shared.weight")
        more = {"lm_head.weight": shared.clone(), "decoder.final_layer_norm.weight": torch.ones(64)}
        return {**tensors, **more, "encoder.embed_tokens.weight": shared}

    before = TextEncoder(Checkpoint(copy), torch.device("cpu"), torch.float32).encode(["a red circle"])[0].tensor
    rewrite(file_of(copy, "text_encoder"), whole)
    after = TextEncoder(Checkpoint(copy), torch.device("cpu"), torch.float32).encode(["a red circle"])[0].tensor
    assert torch.equal(before, after)
    rewrite(file_of(copy, "text_encoder"), lambda t: {**t, "shared.weight": t["encoder.embed_tokens.weight"].clone()})
    Checkpoint(copy)


def test_loaders_look_again(copy: Path) -> None:
    """Loading checks the report of its library, since the folder may have changed since it was checked."""
    found, cpu = Checkpoint(copy), torch.device("cpu")
    rewrite(file_of(copy, "text_encoder"), renamed)
    with pytest.raises(CheckpointError, match=r"text_encoder: the tensor '\S+' is missing"):
        TextEncoder(found, cpu, torch.float32)
    rewrite(file_of(copy, "vae"), one_more)
    with pytest.raises(CheckpointError, match=r"vae: the tensor 'stray\.weight' is unexpected"):
        VideoDecoder(found, cpu, torch.float32)
    _, loading = UMT5EncoderModel.from_pretrained(copy / "text_encoder", output_loading_info=True)
    with pytest.raises(CheckpointError, match="is missing when it is loaded"):
        check_loading(copy / "text_encoder", loading, TextConfig.is_ignored)
    _, loading = AutoencoderKLWan.from_pretrained(copy / "vae", output_loading_info=True)
    check_loading(copy / "vae", loading, lambda name: name == "stray.weight")


def test_a14b_is_checked_without_torch(tmp_path: Path) -> None:
    dummy_checkpoint.write(tmp_path / "a14b")
    code = (
        "import sys; from pathlib import Path; from serve_app.wan.weights.checkpoint import Checkpoint;"
        f"found = Checkpoint(Path({str(tmp_path / 'a14b')!r})); print(found.side, found.frames);"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["16384", "4093"]
