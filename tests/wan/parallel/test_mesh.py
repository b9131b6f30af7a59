from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import ConfigError
from serve_app.wan.cost import work_bytes
from serve_app.wan.parallel.mesh import AXES, Mesh, default_mesh

A14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
GIB = 2**30
sizes = st.integers(1, 4)


def shared(gib: float) -> Callable[[int], float]:
    """Bytes of a rank, if nothing is on more than one of them."""
    return lambda tensor: gib * GIB / tensor


@given(sizes, sizes, sizes)
def test_every_rank_is_in_one_line_of_an_axis_at_its_index(guidance: int, sequence: int, tensor: int) -> None:
    mesh = Mesh(guidance, sequence, tensor)
    places = [tuple(mesh.index(axis, rank) for axis in AXES) for rank in range(mesh.ranks)]
    assert len(set(places)) == mesh.ranks
    for axis in AXES:
        lines = mesh.lines(axis)
        assert sorted(rank for line in lines for rank in line) == list(range(mesh.ranks))
        for line in lines:
            assert [mesh.index(axis, rank) for rank in line] == list(range(mesh.size(axis)))
            assert all(len({mesh.index(other, rank) for rank in line}) == 1 for other in AXES if other != axis)


def test_ranks_that_share_weights_are_neighbours() -> None:
    assert Mesh(guidance=2, sequence=2, tensor=2).lines("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        (Mesh(tensor=3), {}, "tensor has value 3, expected a divisor of the model's num_attention_heads, 40"),
        (Mesh(tensor=8), {"ffn_dim": 260}, "tensor has value 8, expected a divisor of the model's ffn_dim, 260"),
        (Mesh(sequence=4, tensor=4), {}, "sequence has value 4, expected a divisor of the heads of a rank, 10"),
    ],
)
def test_a_mesh_that_does_not_fit(mesh: Mesh, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"denoiser\.parallel\.{message}"):
        mesh.check_fits(A14B | changes)


@pytest.mark.parametrize(
    ("ranks", "weights_gib", "device_gib", "expected"),
    [
        (1, 57, 140, Mesh()),
        (2, 57, 140, Mesh(guidance=2)),
        (2, 57, 54, Mesh(tensor=2)),  # both halves of guidance would need all weights
        (4, 57, 140, Mesh(guidance=2, sequence=2)),
        (4, 57, 48, Mesh(guidance=2, tensor=2)),
        (4, 57, 24, Mesh(tensor=4)),
        (8, 57, 48, Mesh(guidance=2, sequence=2, tensor=2)),
        (5, 57, 80, Mesh(sequence=5)),
        (2, 570, 80, Mesh(tensor=2)),  # does not fit at all
    ],
)
def test_the_mesh_that_is_picked(ranks: int, weights_gib: float, device_gib: float, expected: Mesh) -> None:
    mesh, why = default_mesh(ranks, A14B, shared(weights_gib), device_gib * GIB)
    assert mesh == expected, why
    assert f"{weights_gib:.1f} GiB of weights, {weights_gib / expected.tensor:.1f} a rank, " in why
    assert ("do not fit" in why) == (weights_gib / expected.tensor > device_gib)


def test_a_step_needs_room_beside_the_weights() -> None:
    work = functools.partial(work_bytes, A14B, 75_600, 2, compiled=True)
    mesh, why = default_mesh(2, A14B, shared(57), 60 * GIB, work)
    assert mesh == Mesh(tensor=2)
    assert "57.0 GiB of weights, 28.5 a rank, beside 5.5 for a step, fit into the 60.0 GiB" in why
    assert default_mesh(2, A14B, shared(57), 64 * GIB, work)[0] == Mesh(guidance=2)


def test_what_every_rank_has_whole_counts() -> None:
    def weight_bytes(tensor: int) -> float:
        return (48 / tensor + 9) * GIB

    mesh, why = default_mesh(4, A14B, weight_bytes, 30 * GIB)
    assert mesh == Mesh(tensor=4) and "57.0 GiB of weights, 21.0 a rank, " in why and "fit into" in why
    assert default_mesh(4, A14B, weight_bytes, 34 * GIB)[0] == Mesh(guidance=2, tensor=2)
    assert "do not fit" in default_mesh(4, A14B, weight_bytes, 20 * GIB)[1]


def test_ranks_that_cannot_share_the_model() -> None:
    with pytest.raises(ConfigError, match=r"denoiser\.parallel\.ranks has value 3, expected one that the model's 40"):
        default_mesh(3, A14B, shared(57), 140 * GIB)


@given(st.sampled_from([1, 2, 4, 5, 8, 10, 16, 20]), st.floats(1, 200), st.floats(16, 200))
def test_a_picked_mesh_has_the_ranks_and_fits_where_one_does(ranks: int, weights: float, device: float) -> None:
    mesh, _ = default_mesh(ranks, A14B, shared(weights), device * GIB)
    mesh.check_fits(A14B)
    assert mesh.ranks == ranks
    if weights / mesh.tensor >= device:  # then no other would have: all the others have less of it
        smallest = max(t for t in range(1, ranks + 1) if ranks % t == 0 and 40 % t == 0 and 13824 % t == 0)
        assert weights / smallest >= device
