from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.model.parity import run_ranks
from benchmarks.model.rank_memory import MB, write_large
from serve_app.errors import CheckpointError, ConfigError
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.weights.checkpoint import Checkpoint
from serve_app.wan.weights.sharded import FORMAT, MANIFEST
from serve_app.wan.weights.writer import prepare
from tests.support.disks import Disk, small_disk

__all__ = ["small_disk"]

ROOT = Path(__file__).parents[3]


def prepare_until(rank: int, mesh: Mesh, port: int, checkpoint: Path, out: Path, until: int) -> None:
    """Prepare, and be killed after so many bytes."""
    done = 0

    def watch(what: str, count: int, total: int) -> None:
        nonlocal done
        done += count
        if done > until:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(Checkpoint(checkpoint), out, 2, "bfloat16", watch=watch)


def contents(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def inodes(out: Path) -> dict[str, int]:
    return {path.name + path.parent.name: path.stat().st_ino for path in out.rglob("rank-*.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """Contents of a folder for two ranks, and the number of bytes that the progress callback was given."""
    out, counted = tmp_path_factory.mktemp("undisturbed"), [0]

    def watch(what: str, count: int, total: int) -> None:
        counted[0] += count
        assert counted[0] <= total

    done = prepare(Checkpoint(checkpoint), out, 2, "bfloat16", watch=watch)
    found = contents(out)
    assert done.written == 4 == len(found) - 1
    assert done.bytes == sum(len(content) for name, content in found.items() if name != MANIFEST)
    return found, counted[0]


@pytest.mark.parametrize(
    "part", [0.6, *(pytest.param(p, marks=pytest.mark.slow) for p in (0.1, 0.65, 0.75, 0.9, 0.999))]
)
def test_killed(checkpoint: Path, undisturbed: tuple[dict[str, bytes], int], tmp_path: Path, part: float) -> None:
    """Kill it while it hashes, in each of the files, and before the last file is renamed."""
    expected, total = undisturbed
    with pytest.raises(RuntimeError, match=rf"\[-{signal.SIGKILL:d}\]"):
        run_ranks(prepare_until, Mesh(), checkpoint, tmp_path, int(part * total))
    left = contents(tmp_path)
    complete = {name for name in left if Path(name).name.startswith("rank-")}
    assert len(complete) < 4
    assert all(left[name] == expected[name] for name in complete)  # nothing incomplete looks complete
    assert set(json.loads(left.get(MANIFEST, b'{"files": {}}'))["files"]) <= complete
    before = inodes(tmp_path)
    done = prepare(Checkpoint(checkpoint), tmp_path, 2, "bfloat16")
    assert (done.written, done.kept) == (4 - len(complete), len(complete))
    assert contents(tmp_path) == expected
    assert before.items() <= inodes(tmp_path).items()  # complete files were not written again


def test_a_file_that_the_manifest_does_not_name(
    checkpoint: Path, undisturbed: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    """Such a file was left by a process that was killed after the renaming, or by somebody else."""
    expected, _ = undisturbed
    prepare(Checkpoint(checkpoint), tmp_path, 2, "bfloat16", experts=("transformer",))
    path = tmp_path / "transformer_2" / "rank-0-of-2.safetensors"
    path.parent.mkdir()
    path.write_bytes(bytes(len(expected["transformer_2/rank-0-of-2.safetensors"])))
    assert prepare(Checkpoint(checkpoint), tmp_path, 2, "bfloat16").written == 2
    assert contents(tmp_path) == expected


def test_nothing_is_left_of_an_error(checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(what: str, count: int, total: int) -> None:
        if what.startswith("transformer_2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(Checkpoint(checkpoint), tmp_path, 2, "bfloat16", watch=interrupt)
    assert {Path(name).name for name in contents(tmp_path)} == {
        MANIFEST,
        "rank-0-of-2.safetensors",
        "rank-1-of-2.safetensors",
    }


def test_a_folder_of_an_older_version_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    prepare(Checkpoint(checkpoint), tmp_path, 2, "bfloat16")
    manifest = tmp_path / MANIFEST
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"manifest\.json: has format 1, expected \d+; .* into an empty folder"):
        prepare(Checkpoint(checkpoint), tmp_path, 2, "bfloat16")
    assert contents(tmp_path) == before


def test_verify_writes_damaged_files_again(
    checkpoint: Path, undisturbed: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    expected, _ = undisturbed
    prepare(Checkpoint(checkpoint), tmp_path, 2, "bfloat16")
    path = tmp_path / "transformer" / "rank-1-of-2.safetensors"
    with path.open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"\0\1\2\3\4")
    assert prepare(Checkpoint(checkpoint), tmp_path, 2, "bfloat16").kept == 4
    done = prepare(Checkpoint(checkpoint), tmp_path, 2, "bfloat16", verify=True)
    assert (done.written, done.kept) == (1, 3)
    assert contents(tmp_path) == expected
    path.unlink()
    assert prepare(Checkpoint(checkpoint), tmp_path, 2, "bfloat16").written == 1
    assert contents(tmp_path) == expected


def test_verify_reads_the_model_again(checkpoint: Path, tmp_path: Path) -> None:
    """Only `verify` notices a change that the sample misses."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    prepare(Checkpoint(copy), tmp_path / "out", 2, "bfloat16")
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 30 * 29)
        file.write(b"\1\2\3")
    assert prepare(Checkpoint(copy), tmp_path / "out", 2, "bfloat16").written == 0
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has other weights than the file that .*manifest"):
        prepare(Checkpoint(copy), tmp_path / "out", 2, "bfloat16", verify=True)


def test_weights_that_do_not_match_write_nothing(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    path = copy / "transformer_2" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["blocks.1.attn1.to_q.bias"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"/transformer_2/\S+: the tensor 'blocks\.1\.attn1\.to_q\.bias' is miss"):
        prepare(Checkpoint(copy), tmp_path / "out", 2, "bfloat16")
    assert not (tmp_path / "out").exists()


def test_a_size_that_does_not_divide(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tensor has value 3, expected a divisor of the model's num_attention_he"):
        prepare(Checkpoint(checkpoint), tmp_path / "out", 3, "bfloat16")
    assert not (tmp_path / "out").exists()


def test_two_at_once(checkpoint: Path, tmp_path: Path) -> None:
    def second(what: str, count: int, total: int) -> None:
        prepare(Checkpoint(checkpoint), tmp_path, 2, "bfloat16")

    with pytest.raises(ConfigError, match=r"OUT has value .*, into which another process is preparing"):
        prepare(Checkpoint(checkpoint), tmp_path, 2, "bfloat16", watch=second)
    assert prepare(Checkpoint(checkpoint), tmp_path, 2, "bfloat16").written == 4


def test_a_disk_that_is_too_small(checkpoint: Path, small_disk: Disk) -> None:
    out = small_disk.folder / "out"
    with pytest.raises(ConfigError, match=r"OUT has value .* with 8 MB free, expected 12 MB for the 4 files to write"):
        prepare(Checkpoint(checkpoint), out, 2, "bfloat16")
    assert contents(small_disk.folder) == {}
    prepare(Checkpoint(checkpoint), out, 2, "bfloat16", experts=("transformer",))  # half of it fits
    with pytest.raises(ConfigError, match=r"with 5 MB free, expected 8 MB for the 2 files"):  # the rest does not
        prepare(Checkpoint(checkpoint), out, 2, "bfloat16")
    assert prepare(Checkpoint(checkpoint), out, 2, "bfloat16", experts=("transformer",)).kept == 2


def test_a_disk_that_others_fill(checkpoint: Path, undisturbed: tuple[dict[str, bytes], int], small_disk: Disk) -> None:
    out = small_disk.folder / "out"

    def fill(what: str, count: int, total: int) -> None:
        if what.startswith("transformer/rank-1"):
            small_disk.fill()

    with pytest.raises(ConfigError, match=r"No space left on device") as error:
        prepare(Checkpoint(checkpoint), out, 2, "bfloat16", experts=("transformer",), watch=fill)
    assert "\n" not in str(error.value) and str(out) in str(error.value)
    small_disk.free()
    assert {Path(name).name for name in contents(out)} == {MANIFEST, "rank-0-of-2.safetensors"}
    done = prepare(Checkpoint(checkpoint), out, 2, "bfloat16", experts=("transformer",))
    assert (done.written, done.kept) == (1, 1)
    name = "transformer/rank-1-of-2.safetensors"
    assert contents(out)[name] == undisturbed[0][name]


@pytest.mark.slow
def test_memory_holds_one_tensor(tmp_path: Path) -> None:
    folder = write_large(tmp_path / "large")
    code = (
        "import sys; from pathlib import Path\n"
        "from benchmarks.usage import measured\n"
        "from serve_app.wan.weights.checkpoint import Checkpoint\n"
        "from serve_app.wan.weights.writer import prepare\n"
        "for number, dtype in enumerate(('float32', 'bfloat16')):\n"
        "    with measured() as usage:\n"
        f"        done = prepare(Checkpoint(Path({str(folder)!r})), Path({str(tmp_path)!r}, dtype), 2, dtype,"
        " experts=('transformer',))\n"
        "    print(usage.growth, done.bytes)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=240, capture_output=True)
    wrote = [list(map(int, line.split())) for line in ended.stdout.decode().splitlines() if line[:1].isdigit()]
    whole = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
    largest = 6 * 1024 * 1024 * 4  # the projection of the timestep, which is not cut
    for (growth, size), itemsize in zip(wrote, (4, 2), strict=True):
        assert size > whole * itemsize / 4 > 6 * largest
        assert growth <= largest + 40 * MB
