"""The tokenizer of a model folder: checks of its files, and token ids of texts equal to those of its own model file.

Checking needs neither torch nor transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from serve_app.errors import CheckpointError, one_line
from serve_app.logs import get_logger
from serve_app.wan.weights.files import read_bytes, read_json

logger = get_logger(__name__)

MAX_TOKENS = 512
"""Number of text tokens that an expert reads; shorter texts are padded with zeros."""

_SENTENCEPIECE = ("spiece.model", "tokenizer.model")
_FILES = ("tokenizer.json", *_SENTENCEPIECE)
_CLASSES = ("T5Tokenizer", "T5TokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast")
# Texts that tell readers apart: scripts that few vocabularies cover, signs without width, characters that normalisers
# rewrite.
_PROBES = (
    "a red circle, moving: 3.5 cm!",
    "一个黄色的星星在深蓝色背景上弹跳",
    "빨간 동그라미가 오른쪽으로 움직인다 뷁",
    "👩\u200d👩\u200d👧 and 🏴\u200d☠\ufe0f",
    "soft\u00adhyphen, zero\u200bwidth",
    "𠮷 ﬁ ① ㎏ Ａ１ İ e\u0301 ẞ",
    "สวัสดี مرحبا שלום नमस्ते",
)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the vocabulary files of a tokenizer's folder, in the order in which the library prefers them.

    Raises:
        CheckpointError: the folder has none, or a file is damaged or of another kind.
    """
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            read_json(folder / name)
    path = folder / "tokenizer_config.json"
    found = read_json(path).get("tokenizer_class", _CLASSES[0])
    if found not in _CLASSES:
        raise CheckpointError(f"{path}: tokenizer_class is {found!r}, expected one of {', '.join(_CLASSES)}")
    files = [folder / name for name in _FILES if (folder / name).exists() or (folder / name).is_symlink()]
    if not files:
        raise CheckpointError(f"{folder / _FILES[0]}: is missing, expected one of {', '.join(_FILES)}")
    return files


def vocabulary_size(file: Path) -> int:
    """Return the number of token ids of a file of `tokenizer_files`: one more than the highest.

    Raises:
        CheckpointError: the file is damaged or of another kind.
    """
    read_bytes(file, 64)
    status = file.stat()
    return _vocabulary_size(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)  # the file of umt5-xxl is 16 MB of JSON
def _vocabulary_size(file: Path, size: int, changed: int) -> int:
    if file.name in _SENTENCEPIECE:
        return int(_sentencepiece(file).get_piece_size())
    content = read_json(file)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):  # BPE
            ids = [int(number) for number in vocabulary.values()]
        else:  # Unigram: each token with its log probability
            ids = [number for number, (_, score) in enumerate(vocabulary) if float(score) < math.inf]
        ids += [int(token["id"]) for token in content.get("added_tokens") or []]
        return 1 + max(ids)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = one_line(error)
        raise CheckpointError(f"{file}: has no vocabulary that can be read ({reason}), expected a tokenizer") from None


class Tokenizer:
    """Tokenizer whose ids equal those of the folder's own model file.

    transformers builds its tokenizer anew from such a file, and may leave something out: version 5 drops the byte
    fallback of T5, by which a character outside of the vocabulary becomes its bytes. So some probe texts are read by
    both transformers and the library that made the file. If they differ, that library reads all texts.

    Args:
        folder: holds the tokenizer's files.

    Attributes:
        pad_id: id of the padding token.

    Raises:
        CheckpointError: the files are damaged, or the library cannot load them.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        file = _authority(tokenizer_files(folder))
        vocabulary_size(file)
        try:
            library: Any = AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            raise CheckpointError(f"{folder}: cannot be loaded as a tokenizer: {one_line(error)}") from error
        for role in ("pad", "eos"):
            if getattr(library, f"{role}_token_id") is None:
                raise CheckpointError(f"{folder / 'tokenizer_config.json'}: names no {role}_token")
        self.pad_id = int(library.pad_token_id)
        self._eos = int(library.eos_token_id)
        self._ids: Callable[[str], list[int]] = lambda text: library(text, verbose=False).input_ids
        own = _reader(file, self._eos)
        if wrong := next((probe for probe in _PROBES if self._ids(probe) != own(probe)), None):
            # Only if needed, because special tokens in a text are read differently then.
            self._ids = own
            read = library.convert_ids_to_tokens(library(wrong, verbose=False).input_ids)
            logger.info(
                "the tokenizer's own file reads texts, since the library reads them otherwise",
                extra={"file": str(file), "text": wrong, "library": " ".join(read)},
            )

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text, with the end token."""
        return self._ids(text)

    def cut(self, ids: list[int]) -> list[int]:
        """Return at most `MAX_TOKENS` of these ids; the last one is the end token."""
        return ids if len(ids) <= MAX_TOKENS else [*ids[: MAX_TOKENS - 1], self._eos]


def _authority(files: list[Path]) -> Path:
    """Return the file whose ids count: that of SentencePiece, which the model was trained with, if it is there."""
    return next((file for file in files if file.name in _SENTENCEPIECE), files[0])


def _reader(file: Path, eos: int) -> Callable[[str], list[int]]:
    """Return a function from text to token ids, by the library that made the file."""
    if file.name in _SENTENCEPIECE:
        model = _sentencepiece(file)
        return lambda text: [*model.encode(text), eos]
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises plain exceptions
        raise CheckpointError(f"{file}: cannot be loaded as a tokenizer: {one_line(error)}") from None
    backend.no_padding()
    backend.no_truncation()
    return lambda text: list(backend.encode(text).ids)


def _sentencepiece(file: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{file}: is not a model of SentencePiece: {one_line(error)}") from None
