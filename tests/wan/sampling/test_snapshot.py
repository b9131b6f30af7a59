from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from benchmarks.model.parity import CASES
from serve_app.errors import StateError
from serve_app.request import Params
from serve_app.wan.parallel.process_groups import ProcessGroups
from serve_app.wan.sampling.sample import Sample
from serve_app.wan.sampling.sampler import advance, denoise
from serve_app.wan.sampling.snapshot import from_bytes, to_bytes
from serve_app.wan.text import Embedding
from serve_app.wan.transformer.load import load_expert
from serve_app.wan.weights.checkpoint import Checkpoint, Expert

BASE = next(iter(CASES.values()))
SMALL: dict[str, Any] = {"width": 16, "height": 16, "num_frames": 1}
CPU = torch.device("cpu")
FLOAT, HALF = torch.float32, torch.bfloat16

Models = dict[torch.dtype, dict[Expert, torch.nn.Module]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(checkpoint: Path) -> Checkpoint:
    return Checkpoint(checkpoint)


@pytest.fixture(scope="module")
def models(checkpoint: Path, alone: ProcessGroups) -> Models:
    folder = Checkpoint(checkpoint)
    return {
        dtype: {expert: load_expert(folder, expert, alone, dtype, CPU) for expert in folder.experts}
        for dtype in (FLOAT, HALF)
    }


def text(tokens: int, seed: int = 0) -> Embedding:
    values = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed))
    return Embedding(values, tokens, False)


def start(folder: Checkpoint, dtype: torch.dtype = FLOAT, tokens: int = 7, **changes: object) -> Sample:
    params = Params(**{**BASE.model_dump(), **changes})
    negative = text(3, 1) if params.guided else None
    return Sample.start(params, folder, text(tokens), negative, CPU, dtype, name="job-1")


def steps(sample: Sample, count: int) -> Sample:
    for _ in range(count):
        sample.apply(torch.sin(sample.latents))
    return sample


def plain(value: Any) -> Any:
    """The value in a form that `==` can compare: tensors with dtype and strides; names that are None left out."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.stride(), value.tolist())
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items() if entry is not None}
    return [plain(entry) for entry in value] if isinstance(value, list) else value


def repacked(data: bytes, **changes: str) -> bytes:
    """The bytes with some of the header's metadata changed."""
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return save(load(data), {**metadata, **changes})


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("guidance", "order"), [(4.0, 2), (1.0, 2), (4.0, 3)], ids=["guided", "unguided", "third order"]
)
def test_resumed_at_any_step_the_end_is_the_same(
    folder: Checkpoint, models: Models, dtype: torch.dtype, guidance: float, order: int
) -> None:
    folder.scheduler_config = {**folder.scheduler_config, "solver_order": order}
    sample = start(folder, dtype, guidance_scale=guidance)
    saved = [to_bytes(sample, folder.revision)]
    undisturbed = denoise(models[dtype], sample, lambda s: saved.append(to_bytes(s, folder.revision)))
    assert len(saved) == sample.steps + 1 == 9
    assert 0 < sample.boundary_step < sample.steps - 1  # some of them are on either side of the change of experts
    for step, data in enumerate(saved):
        resumed = from_bytes(data, folder, CPU, dtype)
        assert resumed.step == step
        assert torch.equal(denoise(models[dtype], resumed), undisturbed)


def test_moved_after_every_step(folder: Checkpoint, models: Models) -> None:
    undisturbed = denoise(models[HALF], start(folder, HALF))
    sample = start(folder, HALF)
    while not sample.finished:
        sample = from_bytes(to_bytes(sample, folder.revision), folder, CPU, HALF)
        advance(models[HALF][sample.expert], [sample], 8192)
    assert torch.equal(sample.latents, undisturbed)


def test_nothing_is_lost(folder: Checkpoint) -> None:
    for count in (0, 1, 4, 8):
        sample = steps(start(folder, flow_shift=0.1 + 0.2, seed=2**63 - 1, prompt='蓝色 "☂"\n'), count)
        again = from_bytes(to_bytes(sample, folder.revision), folder, CPU, FLOAT)
        for name in ("params", "step", "boundary", "tokens", "name", "finished"):
            assert getattr(again, name) == getattr(sample, name)
        for name in ("latents", "positive", "negative"):
            assert torch.equal(getattr(again, name), getattr(sample, name))
        # All that the scheduler holds, so that a release of diffusers which carries more is noticed here.
        assert plain(vars(again.scheduler)) == plain(vars(sample.scheduler))


def test_later_steps_leave_the_bytes_alone(folder: Checkpoint) -> None:
    sample = steps(start(folder), 3)
    data = to_bytes(sample, folder.revision)
    first = from_bytes(data, folder, CPU, FLOAT)
    steps(first, 2)
    steps(sample, 2)
    assert torch.equal(steps(from_bytes(data, folder, CPU, FLOAT), 2).latents, sample.latents)
    assert torch.equal(first.latents, sample.latents)


def test_padding_is_not_stored(folder: Checkpoint) -> None:
    tensors = load(to_bytes(start(folder, HALF), folder.revision))
    assert tensors["positive"].shape == (7, 64)
    assert tensors["negative"].shape == (3, 64)
    assert tensors["positive"].dtype == HALF
    assert load(to_bytes(start(folder, tokens=512), folder.revision))["positive"].shape == (512, 64)


def test_zeros_that_belong_to_the_text_are_restored(folder: Checkpoint) -> None:
    for tokens, last in ((7, 0.0), (7, -0.0), (1, 0.0), (512, 0.0)):
        sample = start(folder)
        sample.positive[0, :] = 0.0
        sample.positive[0, : tokens - 1] = 1.0
        sample.positive[0, tokens - 1] = last
        again = from_bytes(to_bytes(sample, folder.revision), folder, CPU, FLOAT)
        assert torch.equal(again.positive.view(torch.int32), sample.positive.view(torch.int32))  # also the zeros' signs


def test_every_damaged_byte_is_noticed(folder: Checkpoint) -> None:
    data = to_bytes(steps(start(folder, tokens=1, guidance_scale=1.0, **SMALL), 1), folder.revision)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(StateError, match=r"^saved sample: .*expected"):
            from_bytes(bytes(damaged), folder, CPU, FLOAT)


def test_truncated(folder: Checkpoint) -> None:
    data = to_bytes(steps(start(folder, **SMALL), 2), folder.revision)
    for length in (*range(0, len(data), 61), len(data) - 1):
        with pytest.raises(StateError, match=f"{length} bytes .* expected a whole safetensors file"):
            from_bytes(data[:length], folder, CPU, FLOAT)


def test_foreign_bytes(folder: Checkpoint) -> None:
    noise = random.Random(0)
    pickled = io.BytesIO()
    torch.save({"latents": torch.zeros(2)}, pickled)
    header = b'{"__metadata__":null}'
    for data in (
        *(noise.randbytes(size) for size in (1, 8, 100, 10_000)),
        pickle.dumps([1]),
        pickled.getvalue(),
        b"[" * 100_000,
        save({"weight": torch.zeros(2)}),
        len(header).to_bytes(8, "little") + header,
    ):
        with pytest.raises(StateError, match=r"^saved sample: .*expected"):
            from_bytes(data, folder, CPU, FLOAT)


def test_another_version_says_so_first(folder: Checkpoint) -> None:
    data = repacked(to_bytes(start(folder), "another"), version="0", state="{}")
    with pytest.raises(StateError, match=r"^saved sample: format version is 0, expected 1$"):
        from_bytes(data, folder, CPU, FLOAT)


def test_another_checkpoint_or_dtype(folder: Checkpoint) -> None:
    with pytest.raises(StateError, match=f"checkpoint revision is 0123456789ab, expected {folder.revision}"):
        from_bytes(to_bytes(start(folder), "0123456789ab"), folder, CPU, FLOAT)
    with pytest.raises(StateError, match="dtype is float32, expected bfloat16"):
        from_bytes(to_bytes(start(folder), folder.revision), folder, CPU, HALF)


def test_changed_header(folder: Checkpoint) -> None:
    with pytest.raises(StateError, match=r"sha256 is .*, expected"):
        from_bytes(repacked(to_bytes(start(folder), folder.revision), state="{}"), folder, CPU, FLOAT)


def test_fields_of_another_release(folder: Checkpoint) -> None:
    sample = start(folder)
    sample.params = Params.model_construct(**sample.params.model_dump(exclude={"flow_shift"}))  # type: ignore[assignment]
    with pytest.raises(StateError, match=r"params\.flow_shift: Field required, expected the fields of this release"):
        from_bytes(to_bytes(sample, folder.revision), folder, CPU, FLOAT)


def test_tensors_that_do_not_fit(folder: Checkpoint) -> None:
    def refused(sample: Sample, message: str) -> None:
        with pytest.raises(StateError, match=message):
            from_bytes(to_bytes(sample, folder.revision), folder, CPU, FLOAT)

    sample = start(folder)
    sample.latents = torch.zeros(1, 16, 3, 8, 10)
    refused(sample, r"latents is float32 \[1, 16, 3, 8, 10\], expected float32 \[1, 16, 3, 8, 8\]")
    sample = start(folder)
    sample.latents = sample.latents.double()
    refused(sample, r"latents is float64 .*, expected float32")
    sample = steps(start(folder), 2)
    sample.scheduler.model_outputs[0] = torch.zeros(1, 16, 3, 8, 10)
    refused(sample, r"model_outputs\.0 is float32 \[1, 16, 3, 8, 10\], expected")
    sample = start(folder)
    sample.positive = torch.ones(1, 512, 32)
    refused(sample, r"positive is float32 \[512, 32\], expected float32 \[512, 64\]")
    sample = start(folder)
    sample.positive = torch.ones(1, 513, 64)
    refused(sample, r"positive is float32 \[513, 64\], expected float32 \[512, 64\]")
    sample = start(folder)
    sample.negative = None
    refused(sample, r"embeddings is \['positive'\], expected \['negative', 'positive'\]")
    sample = steps(start(folder), 2)
    sample.step = 1
    refused(sample, r"tensors is .*'model_outputs\.0', .* expected \['last_sample', 'latents', 'model_outputs\.1'\]")
    sample.step = 9
    refused(sample, "step is 9, expected 0 to 8")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(folder: Checkpoint, poison: float) -> None:
    sample = steps(start(folder), 2)
    held = {
        "latents": sample.latents,
        "positive": sample.positive,
        "negative": sample.negative,
        "last_sample": sample.scheduler.last_sample,
        r"model_outputs\.0": sample.scheduler.model_outputs[0],
    }
    for name, tensor in held.items():
        assert tensor is not None
        place = tensor.view(-1)[:1]
        kept = place.clone()
        place.fill_(poison)
        with pytest.raises(StateError, match=f"^saved sample: {name} holds NaN or infinity, expected finite numbers$"):
            from_bytes(to_bytes(sample, folder.revision), folder, CPU, FLOAT)
        place.copy_(kept)
    assert from_bytes(to_bytes(sample, folder.revision), folder, CPU, FLOAT).step == 2
