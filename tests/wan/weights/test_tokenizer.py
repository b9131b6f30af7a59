"""The tokenizer gives the same ids as SentencePiece, which made its file."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer

from serve_app.errors import CheckpointError
from serve_app.tiny import CHECKPOINT
from serve_app.wan.weights.checkpoint import Checkpoint
from serve_app.wan.weights.tokenizer import MAX_TOKENS, Tokenizer, tokenizer_files, vocabulary_size

WORDS = [
    "a",
    "red",
    "circle",
    "moves",
    "on",
    "star",
    "一个",
    "黄色",
    "的",
    "星星",
    "für",
    "naïve",
    "한국",
    "don't",
    "x-y",
]
TEXTS = [
    "a red circle",
    "뷁 한글",
    "👩\u200d👩\u200d👧 family",
    "soft\u00adhyphen",
    "ﬁ ① ㎏",
    "𠮷  野家",
    "",
    " a\tb ",
    "İ e\u0301",
]


def train(folder: Path, fallback: bool) -> Path:
    """Write a tokenizer's folder as T5's are published, with a vocabulary of few words."""
    folder.mkdir()
    text = folder.parent / "text.txt"
    draw = random.Random(0)
    text.write_text("\n".join(" ".join(draw.choices(WORDS, k=8)) for _ in range(1000)))
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "spiece"),
        vocab_size=420 if fallback else 120,
        hard_vocab_limit=False,
        byte_fallback=fallback,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    kind = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **kind}))
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["bytes", "no bytes"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("tokenizer") / "trained", request.param)


def test_texts_are_read_as_by_sentencepiece(folder: Path) -> None:
    model, ours = SentencePieceProcessor(model_file=str(folder / "spiece.model")), Tokenizer(folder)
    for text in TEXTS:
        assert ours.ids(text) == [*model.encode(text), 1], text
    assert ours.pad_id == 0 and vocabulary_size(folder / "spiece.model") == model.get_piece_size()


def test_what_the_library_drops_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = AutoTokenizer.from_pretrained(folder)
    drops = vocabulary_size(folder / "spiece.model") > 256  # it has the byte fallback
    unknown = library.unk_token_id
    assert unknown in library("뷁").input_ids
    with caplog.at_level(logging.INFO, "serve_app"):
        ours = Tokenizer(folder)
    assert (unknown not in ours.ids("뷁")) == drops
    assert any("the library reads them otherwise" in record.message for record in caplog.records) == drops


def test_without_the_model_file_its_own_json_counts(tmp_path: Path) -> None:
    folder = train(tmp_path / "trained", fallback=True)
    by_sentencepiece = Tokenizer(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["model"]["byte_fallback"] = True
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    (folder / "spiece.model").unlink()
    ours = Tokenizer(folder)
    for text in TEXTS:
        assert ours.ids(text) == by_sentencepiece.ids(text), text


@pytest.mark.parametrize("count", [1, 511, 512, 513, 2000])
def test_as_many_as_an_expert_reads(count: int) -> None:
    """Truncation gives the same ids as the library's."""
    text, folder = "red " * count, CHECKPOINT / "tokenizer"
    library, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    assert ours.cut(ours.ids(text)) == library(text, truncation=True, max_length=MAX_TOKENS).input_ids
    assert not Tokenizer(folder).ids("")[:-1]


def test_the_file_cannot_be_of_another_kind(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    model = copy / "tokenizer" / "spiece.model"
    model.write_bytes(b"nothing of SentencePiece's")
    assert [file.name for file in tokenizer_files(copy / "tokenizer")] == ["tokenizer.json", "spiece.model"]
    with pytest.raises(CheckpointError, match=r"spiece\.model: is not a model of SentencePiece") as error:
        Checkpoint(copy)
    assert "\n" not in str(error.value)
    model.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"spiece\.model: is a pointer of a large-file store"):
        Checkpoint(copy)
    model.unlink()
    path = copy / "tokenizer" / "tokenizer.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "pre_tokenizer": {"type": "Unheard"}}))
    Checkpoint(copy)  # passes here; only loading the tokenizer finds it
    with pytest.raises(CheckpointError, match="tokenizer: cannot be loaded as a tokenizer"):
        Tokenizer(copy / "tokenizer")
