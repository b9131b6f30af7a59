"""The memory of the plan is within 5 % of every row that was measured on H100s and H200s."""

from __future__ import annotations

import pytest

from serve_app.config import Config
from serve_app.planning.memory import Size, decoder_need
from tests.support.memory_rows import (
    MODEL,
    OF_DECODES,
    OF_RANKS,
    ROWS,
    SIZES,
    Line,
    decode,
    more_then,
    peaks,
    predicted,
    reserved,
    sizes_of,
)

NEAR = 0.05
LEFT_OUT = {
    ("2026-11-27-a14b-shared-tokens-4xh200", "swap", "reserved GB"): "the file says that it may come from loading",
}
"""Numbers that the model does not give, and why."""


def ids(line: Line) -> str:
    return line.key


@pytest.mark.parametrize("line", OF_RANKS, ids=ids)
def test_peaks_of_ranks(line: Line) -> None:
    found = peaks(line)
    assert found
    for _, ours, measured in found:
        assert ours == pytest.approx(measured, rel=NEAR)


@pytest.mark.parametrize("line", [line for line in OF_RANKS if "reserved GB" in line.cells], ids=ids)
def test_what_the_allocator_holds(line: Line) -> None:
    if (line.file, line.cells["case"], "reserved GB") in LEFT_OUT:
        pytest.skip(LEFT_OUT[line.file, line.cells["case"], "reserved GB"])
    ours, measured = reserved(line)
    assert ours == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("line", [line for line in OF_RANKS if "weights GB" in line.cells], ids=ids)
def test_weights_on_the_device(line: Line) -> None:
    found = predicted(line, sizes_of(line)[0])
    (weights,) = line.numbers("weights GB")
    assert (found.weights - more_then(line)) / 1e9 == pytest.approx(weights, abs=0.1, rel=0.005)


@pytest.mark.parametrize("line", OF_DECODES, ids=ids)
def test_peaks_of_decodes(line: Line) -> None:
    ours, measured = decode(line)
    assert ours == pytest.approx(measured, rel=NEAR)


def test_all_tables_are_read() -> None:
    """If a file of results gets new columns for memory, or is not read at all, the tests above say nothing of it."""
    files = {line.file for line in ROWS}
    assert len(OF_RANKS) >= 45 and len(OF_DECODES) >= 15
    assert {file for file in files if "h100" in file} and len(files) >= 9


def test_the_decoder_takes_as_many_tiles_as_fit() -> None:
    size = Size(1280, 720, 81)
    assert size == SIZES["1280x720"]
    whole = decoder_need(Config(), MODEL, size).total
    halves = decoder_need(Config(), MODEL, size, bound=9e9).total
    least = decoder_need(Config(), MODEL, size, bound=0).total
    assert whole == pytest.approx(26.8e9, rel=0.01) and halves < 0.55 * whole and least < 1.5e9
