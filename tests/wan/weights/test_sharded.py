from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from benchmarks.model.parity import run_ranks
from serve_app.app import wan
from serve_app.errors import CheckpointError, ConfigError
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.transformer.load import ProcessGroups, load_expert
from serve_app.wan.weights.checkpoint import Checkpoint
from serve_app.wan.weights.sharded import MANIFEST, ShardedCheckpoint
from serve_app.wan.weights.writer import prepare
from tests.support.ranks import compare

STEM = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def alone_bf16(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint for one rank, bfloat16."""
    out = tmp_path_factory.mktemp("alone")
    prepare(Checkpoint(checkpoint), out, 1, "bfloat16")
    return out


@pytest.fixture
def out(alone_bf16: Path, tmp_path: Path) -> Path:
    """A copy of `alone_bf16` that a test may damage."""
    return Path(shutil.copytree(alone_bf16, tmp_path / "out"))


def load(checkpoint: Path, out: Path, alone: ProcessGroups, dtype: str = "bfloat16") -> torch.nn.Module:
    folder = Checkpoint(checkpoint)
    sharded = ShardedCheckpoint(out, folder, 1, dtype)
    return load_expert(folder, "transformer", alone, getattr(torch, dtype), alone.device, sharded=sharded)


def refused(checkpoint: Path, out: Path, alone: ProcessGroups, message: str, dtype: str = "bfloat16") -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load(checkpoint, out, alone, dtype)
    assert "\n" not in str(error.value)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_has_the_same_bits_as_by_slices(checkpoint: Path, tmp_path: Path, size: int) -> None:
    folders = {dtype: tmp_path / dtype for dtype in ("float32", "bfloat16")}
    for dtype, out in folders.items():
        assert prepare(Checkpoint(checkpoint), out, size, dtype).written == 2 * size
    run_ranks(compare, Mesh(tensor=size), checkpoint, folders)


def test_the_shards_make_up_the_whole(checkpoint: Path, tmp_path: Path) -> None:
    prepare(Checkpoint(checkpoint), tmp_path, 4, "float32")
    for expert in ("transformer", "transformer_2"):
        shards = [load_file(tmp_path / expert / f"rank-{rank}-of-4.safetensors") for rank in range(4)]
        cuts = set()
        for name, whole in load_file(checkpoint / expert / STEM).items():
            parts = [shard[name] for shard in shards]
            cut = [dim for dim, size in enumerate(whole.shape) if parts[0].shape[dim] != size]
            cuts.add(tuple(cut))
            for part in parts if not cut else [torch.cat(parts, cut[0])]:
                assert torch.equal(part, whole), name
        assert cuts == {(), (0,), (1,)}


def test_the_library_reads_the_files(checkpoint: Path, alone_bf16: Path) -> None:
    theirs = WanTransformer3DModel.from_pretrained(checkpoint / "transformer", dtype=torch.bfloat16).state_dict()
    ours = load_file(alone_bf16 / "transformer" / "rank-0-of-1.safetensors")
    assert set(ours) == set(theirs)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32, torch.bfloat16}
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def test_the_manifest_has_the_hashes(checkpoint: Path, alone_bf16: Path) -> None:
    manifest = json.loads((alone_bf16 / MANIFEST).read_text())
    assert set(manifest["sources"]) == {f"{expert}/{STEM}" for expert in ("transformer", "transformer_2")}
    for folder, entries in ((checkpoint, manifest["sources"]), (alone_bf16, manifest["files"])):
        for name, entry in entries.items():
            content = (folder / name).read_bytes()
            assert (entry["size"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_every_changed_byte_is_noticed(checkpoint: Path, out: Path, alone: ProcessGroups) -> None:
    path = out / "transformer" / "rank-0-of-1.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    size = path.stat().st_size
    for at in (*range(0, 9), header // 2, header - 1, header, *range(header, size, size // 40), size - 1):
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
        what = "header of checksum" if at < header else "tensor .* has checksum"
        refused(checkpoint, out, alone, rf"out/transformer/rank-0-of-1\.safetensors: .*{what}")
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([byte]))
    load(checkpoint, out, alone)


def test_a_file_of_another_rank(checkpoint: Path, tmp_path: Path) -> None:
    """The files of two ranks have the same header and size; only the checksums of their tensors tell them apart."""
    prepare(Checkpoint(checkpoint), tmp_path, 2, "bfloat16")
    folder = tmp_path / "transformer"
    shutil.copy(folder / "rank-0-of-2.safetensors", folder / "rank-1-of-2.safetensors")
    with ShardedCheckpoint(tmp_path, Checkpoint(checkpoint), 2, "bfloat16").weights("transformer", 1) as weights:
        weights.read("proj_out.weight")
        with pytest.raises(CheckpointError, match=r"rank-1-of-2\.safetensors: the tensor 'blocks\.0\.attn1\.to_q\.w"):
            weights.read("blocks.0.attn1.to_q.weight")


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_a_truncated_file(checkpoint: Path, out: Path, alone: ProcessGroups, left: int) -> None:
    path = out / "transformer" / "rank-0-of-1.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(left % size)
    refused(checkpoint, out, alone, rf"rank-0-of-1\.safetensors: has {left % size} bytes, expected {size}")


def test_missing_files(checkpoint: Path, out: Path, alone: ProcessGroups) -> None:
    (out / "transformer" / "rank-0-of-1.safetensors").unlink()
    refused(checkpoint, out, alone, r"transformer/rank-0-of-1\.safetensors: is missing, expected the shard of rank 0")
    (out / MANIFEST).unlink()
    refused(checkpoint, out, alone, r"out/manifest\.json: is missing, expected a folder that `wan-serve prepare` wrote")
    refused(checkpoint, out / "nowhere", alone, r"nowhere/manifest\.json: is missing")


def test_one_expert_only(checkpoint: Path, tmp_path: Path) -> None:
    folder = Checkpoint(checkpoint)
    assert prepare(folder, tmp_path, 1, "bfloat16", experts=("transformer_2",)).written == 1
    sharded = ShardedCheckpoint(tmp_path, folder, 1, "bfloat16")
    sharded.check_shard("transformer_2", 0)
    with pytest.raises(CheckpointError, match=r"transformer/rank-0-of-1\.safetensors: is not in manifest\.json"):
        sharded.check_shard("transformer", 0)
    done = prepare(folder, tmp_path, 1, "bfloat16")
    assert (done.written, done.kept) == (1, 1)
    ShardedCheckpoint(tmp_path, folder, 1, "bfloat16").check_shard("transformer", 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "has format 1, expected 2; prepare the model again, into an empty folder"),
        ({"tensor": 2}, "was prepared with tensor 2, expected 1"),
        ({"dtype": "float32"}, "was prepared with dtype float32, expected bfloat16"),
        ({"revision": "0123456789ab"}, "was prepared with revision 0123456789ab, expected .*, that of .*checkpoint"),
        ({"files": []}, "files: Input should be a valid dictionary"),
        ({"files": {"transformer/rank-0-of-1.safetensors": {}}}, r"files\.transformer.*: Field required"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
)
def test_a_manifest_of_something_else(
    checkpoint: Path, out: Path, alone: ProcessGroups, changes: dict[str, Any], message: str
) -> None:
    edit(out / MANIFEST, **changes)
    refused(checkpoint, out, alone, rf"out/manifest\.json: {message}")
    with pytest.raises(CheckpointError, match=message):  # nor does `prepare` write into the folder
        prepare(Checkpoint(checkpoint), out, 1, "bfloat16")


@pytest.mark.parametrize("content", ["", "[1]", "{", "\x00"])
def test_a_manifest_that_is_none(checkpoint: Path, out: Path, alone: ProcessGroups, content: str) -> None:
    (out / MANIFEST).write_text(content)
    refused(checkpoint, out, alone, r"manifest\.json: (cannot be read as JSON|has format None)")


def test_checksums_cannot_be_left_out(checkpoint: Path, out: Path, alone: ProcessGroups) -> None:
    files = json.loads((out / MANIFEST).read_text())["files"]
    del files["transformer/rank-0-of-1.safetensors"]["tensors"]["proj_out.weight"]
    edit(out / MANIFEST, files=files)
    refused(checkpoint, out, alone, r"manifest\.json: names other tensors than .*rank-0-of-1\.safetensors has")


def test_weights_that_were_trained_on(checkpoint: Path, out: Path, alone: ProcessGroups, tmp_path: Path) -> None:
    """Weights of the same names, shapes and sizes have the same revision; the sample tells them apart."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "tuned"))
    path = copy / "transformer" / STEM
    save_file({name: tensor * 1.001 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert Checkpoint(copy).revision == Checkpoint(checkpoint).revision
    refused(copy, out, alone, rf"tuned/transformer/{STEM}: has other weights than the file that .*manifest\.json")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("scheduler/scheduler_config.json", {"flow_shift": 5.0}),
        ("model_index.json", {"boundary_ratio": 0.9, "_diffusers_version": "0.43.0"}),
        ("transformer/config.json", {"_diffusers_version": "0.43.0", "rope_max_seq_len": 1024}),
        ("vae/config.json", {"dropout": 0.1}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 1024}),
    ],
)
def test_an_edit_that_shards_do_not_depend_on(
    checkpoint: Path, out: Path, alone: ProcessGroups, tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "edited"))
    edit(copy / file, **changes)
    assert Checkpoint(copy).revision != Checkpoint(checkpoint).revision
    load(copy, out, alone)
    assert prepare(Checkpoint(copy), out, 1, "bfloat16").written == 0


def test_another_model_with_the_same_sizes(checkpoint: Path, out: Path, alone: ProcessGroups, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    edit(copy / "transformer" / "config.json", num_layers=1)
    path = copy / "transformer" / STEM
    save_file({name: tensor for name, tensor in load_file(path).items() if ".1." not in name}, path)
    refused(copy, out, alone, r"was prepared with revision \w+, expected \w+, that of .*other")


def test_a_manifest_of_an_older_version(checkpoint: Path, out: Path) -> None:
    """The manifest of an older version has the revision of the whole folder."""
    edit(out / MANIFEST, revision=Checkpoint(checkpoint).revision)
    ShardedCheckpoint(out, Checkpoint(checkpoint), 1, "bfloat16")


def test_other_modules_in_float32(
    checkpoint: Path, out: Path, alone: ProcessGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of diffusers may keep other modules in float32."""
    monkeypatch.setattr(WanTransformer3DModel, "_keep_in_fp32_modules", ["time_embedder", "norm1", "norm2", "norm3"])
    refused(
        checkpoint,
        out,
        alone,
        r"rank-0-of-1\.safetensors: the tensor '.*scale_shift_table' is torch.float32, expected torch.bfloat16",
    )


def test_the_deployment_is_refused_before_it_starts(checkpoint: Path, out: Path) -> None:
    args: dict[str, Any] = {
        "model": {"path": str(checkpoint), "sharded": str(out)},
        "denoiser": {"parallel": {"tensor": 1}},
    }
    wan(args)
    with pytest.raises(ConfigError, match=r"model\.sharded has value .* was prepared with tensor 1, expected 2"):
        wan({**args, "denoiser": {"parallel": {"tensor": 2}}})
    (out / "transformer_2" / "rank-0-of-1.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"transformer_2/rank-0-of-1\.safetensors: is missing"):
        wan(args)
    picked = {**args, "denoiser": {"parallel": {"ranks": 1}}}
    with pytest.raises(ConfigError, match=r"denoiser\.parallel\.ranks has value 1 and model\.sharded is given"):
        wan(picked)


def test_checking_needs_no_torch(checkpoint: Path, alone_bf16: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from serve_app.wan.weights.checkpoint import Checkpoint\n"
        "from serve_app.wan.weights.sharded import ShardedCheckpoint\n"
        f"checkpoint = Checkpoint(Path({str(checkpoint)!r}))\n"
        f"ShardedCheckpoint(Path({str(alone_bf16)!r}), checkpoint, 1, 'bfloat16').check_shard('transformer', 0)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_rank_uses_it(checkpoint: Path, out: Path) -> None:
    from serve_app.config import validate
    from serve_app.engine.rank import Rank

    config = validate(
        {
            "model": {"path": str(checkpoint), "sharded": str(out)},
            "denoiser": {"parallel": {"tensor": 1}, "checkpoint_s": 0, "device": "cpu"},
        }
    )
    Rank(config, 0).load("", 0, Mesh())
    path = out / "transformer_2" / "rank-0-of-1.safetensors"
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(bytes([path.read_bytes()[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"transformer_2/rank-0-of-1\.safetensors: the tensor"):
        Rank(config, 0).load("", 0, Mesh())
