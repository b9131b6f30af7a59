"""GPU memory of processes that share a GPU."""

from __future__ import annotations

import pytest

from serve_app.config import validate
from serve_app.config.gpu_memory import Taker, fullest, too_much
from serve_app.errors import ConfigError


def taken(*takers: Taker) -> float:
    share, there = fullest(takers)
    assert share == pytest.approx(sum(one.memory_fraction * count for one, count in there.items()))
    return share


def test_whole_gpus_are_shared_with_nobody() -> None:
    assert taken(Taker("rank", 1, 0.9, 8), Taker("encoder", 1, 0.9, 4), Taker("decoder", 2, 0.8, 1, devices=2)) == 0.9
    assert taken(Taker("encoder", 0, 0.9, 4), Taker("rank", 1, 0.5, 1)) == 0.5, "who reserves none has none"


def test_shares_add_up_as_far_as_they_fit_on_a_gpu() -> None:
    rank, encoder, decoder = Taker("rank", 0.8, 0.6, 2), Taker("encoder", 0.2, 0.14, 1), Taker("decoder", 0.2, 0.16, 1)
    assert taken(rank, encoder, decoder) == pytest.approx(0.76), "a rank and the larger one of the others"
    assert taken(Taker("rank", 0.6, 0.6, 2), encoder, decoder) == pytest.approx(0.9)
    assert taken(Taker("encoder", 0.1, 0.1, 4)) == pytest.approx(0.4), "no more than there are"
    assert taken(Taker("encoder", 0.1, 0.1, 40)) == pytest.approx(1.0), "nor than fit"
    assert taken(Taker("encoder", 1 / 3, 0.3, 9)) == pytest.approx(0.9)


def test_a_decoder_takes_memory_of_gpus_of_which_ray_knows_nothing() -> None:
    rank, encoder = Taker("rank", 0.8, 0.6, 2), Taker("encoder", 0.2, 0.14, 1)
    assert taken(rank, encoder, Taker("decoder", 0.2, 0.16, 1, devices=2)) == pytest.approx(0.9)
    assert taken(rank, encoder, Taker("decoder", 0.2, 0.16, 2, devices=2)) == pytest.approx(0.92), "one from next door"
    assert taken(Taker("rank", 1, 0.9, 1), Taker("decoder", 0.5, 0.2, 1, devices=2)) == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("labels", "others", "apart"),
    [
        ({"pool": "a"}, {"pool": "b"}, True),
        ({"pool": "a"}, {"pool": "a"}, False),
        ({"pool": "a"}, {}, False),
        ({"pool": "a"}, {"zone": "b"}, False),
        ({"pool": "!a"}, {"pool": "b"}, False),
        ({"pool": "a"}, {"pool": "in(a, b)"}, False),
    ],
)
def test_hosts_that_differ_by_their_labels_share_no_gpu(
    labels: dict[str, str], others: dict[str, str], apart: bool
) -> None:
    share = taken(Taker("encoder", 0.5, 0.3, 1, labels), Taker("decoder", 0.5, 0.4, 1, others))
    assert share == pytest.approx(0.4 if apart else 0.7)


def test_rounding_is_not_too_much() -> None:
    assert too_much([Taker("encoder", 0.1, 0.1, 10)]) is None
    assert too_much([Taker("encoder", 0.1, 0.11, 10)]) is not None


def test_groups_of_both_experts_count() -> None:
    half = {"rank": {"num_gpus": 0.5}, "memory_fraction": 0.45, "experts": "split"}
    validate({"denoiser": half})
    with pytest.raises(ConfigError, match=r"adds up to 1\.2 on a GPU with 2 x denoiser rank \(0\.6\)"):
        validate({"denoiser": {**half, "memory_fraction": 0.6}})
    validate({"denoiser": {**half, "memory_fraction": 0.6, "device": "cpu"}})
    validate({"denoiser": {**half, "memory_fraction": 0.6, "experts": "together"}})
