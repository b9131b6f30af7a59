from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.capacity import Need
from serve_app.config import Config, validate
from serve_app.errors import ConfigError
from serve_app.manifests.packing import pack
from serve_app.manifests.pools import pools
from serve_app.manifests.size import Size

GROUP = Need("Denoiser", "denoiser.rank", ({"CPU": 1}, *[{"CPU": 1, "GPU": 0.8}] * 4), "STRICT_PACK")
SHARE = {"resources": {"num_gpus": 0.2}, "memory_fraction": 0.2}
RANKS: dict[str, object] = {
    "parallel": {"guidance": 2, "tensor": 2},
    "rank": {"num_gpus": 0.8, "labels": {"pool": "gpu"}},
    "memory_fraction": 0.6,
}


def config(**options: object) -> Config:
    return validate({"encoder": {"device": "cpu", "resources": {"num_cpus": 6, "labels": {"pool": "cpu"}}}, **options})


def test_ranks_with_shares_have_a_gpu_each_and_decoders_take_the_rest() -> None:
    decoder = Need("Decoder", "decoder.resources", ({"CPU": 1, "GPU": 0.2},), replicas=4)
    two = Need(GROUP.deployment, GROUP.option, GROUP.bundles, GROUP.strategy, replicas=2)
    assert pack([two, decoder], 100, 8).nodes == 1
    assert pack([two, decoder], 100, 4).nodes == 2
    assert pack([two, decoder], 100, 8).cpus == 2 * 5 + 4
    # A fifth decoder of a half finds no GPU that is half free.
    half = Need("Decoder", "decoder.resources", ({"GPU": 0.5},))
    assert pack([two, half], 100, 8).nodes == 2


def test_a_group_for_one_host_is_never_divided() -> None:
    assert pack([Need("Denoiser", "o", ({"GPU": 1},) * 3, "STRICT_PACK", replicas=2)], 9, 4).nodes == 2
    assert pack([Need("Denoiser", "o", ({"GPU": 1},) * 3, "PACK", replicas=2)], 9, 3).nodes == 2
    with pytest.raises(ValueError, match="which no empty node has"):
        pack([GROUP], 100, 2)
    assert pack([Need("Denoiser", "o", ({"GPU": 1},) * 3, "STRICT_SPREAD")], 9, 4).nodes == 3


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from([0.2, 0.4, 0.8, 1, 2]), st.integers(1, 5)), min_size=1, max_size=5),
    st.integers(2, 8),
)
def test_nodes_hold_what_is_placed_and_none_is_for_nothing(wanted: list[tuple[float, int]], gpus: int) -> None:
    needs = [Need(f"D{n}", "o", ({"GPU": amount},), replicas=count) for n, (amount, count) in enumerate(wanted)]
    asked, replicas = sum(amount * count for amount, count in wanted), sum(count for _, count in wanted)
    assert asked / gpus - 1e-6 <= pack(needs, 1, gpus).nodes <= replicas


def test_pools_of_labels() -> None:
    found = pools(config(denoiser={**RANKS, "autoscaling": {"max_replicas": 4}}, decoder=SHARE), Size())
    gpu, cpu = found
    assert (gpu.name, gpu.labels, gpu.gpus, gpu.least, gpu.most) == ("gpu", {"pool": "gpu"}, 8, 1, 2)
    assert set(gpu.deployments) == {"Denoiser", "Decoder"}  # one without labels joins those of its kind
    assert (cpu.name, cpu.gpus, cpu.cpus) == ("cpu", 0, 8) and {"Encoder", "gateway", "dispatcher"} <= set(
        cpu.deployments
    )


def test_a_stage_on_cpus_may_ask_for_the_hosts_of_the_gpus() -> None:
    found = pools(config(denoiser=RANKS, decoder={"device": "cpu", "resources": {"labels": {"pool": "gpu"}}}), Size())
    assert [pool.deployments[:2] for pool in found if pool.gpus] == [["Denoiser", "Decoder"]]


def test_two_kinds_of_gpus_are_two_pools() -> None:
    found = pools(config(denoiser=RANKS, decoder={"resources": {"num_gpus": 1, "labels": {"pool": "80gb"}}}), Size())
    assert {pool.name for pool in found} == {"gpu", "gpu-80gb", "cpu"}


def test_each_pipeline_has_stages_of_its_own() -> None:
    options = config(denoiser=RANKS, decoder=SHARE)
    assert [pools(options, Size(gpus_per_node=4), pipelines)[0].most for pipelines in (1, 2)] == [1, 2]


def test_without_gpus_there_is_one_pool() -> None:
    (pool,) = pools(
        validate(
            {
                "encoder": {"resources": {"num_gpus": 0}},
                "denoiser": {"rank": {"num_gpus": 0}},
                "decoder": {"resources": {"num_gpus": 0}},
            }
        ),
        Size(),
    )
    assert (pool.name, pool.gpus) == ("cpu", 0)


def test_sizes_that_are_given_hold() -> None:
    swap = {**RANKS, "experts": "swap"}
    assert pools(config(denoiser=swap), Size())[0].memory == 16 + 8 * 80
    pool = pools(config(denoiser=RANKS), Size(cpus_per_node=100, memory_per_node=900))[0]
    assert (pool.cpus, pool.memory) == (100, 900)


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({"denoiser": RANKS}, {"gpus_per_node": 2}, "--gpus-per-node has value 2: denoiser.rank asks for"),
        ({"denoiser": RANKS}, {"cpus_per_node": 3}, "--cpus-per-node has value 3: denoiser.rank asks for"),
        ({"denoiser": {"rank": {"labels": {"pool": "in(a, b)"}}}}, {}, "labels has value {pool: in(a, b)}, expected"),
        ({"denoiser": {"rank": {"resources": {"h100": 1}}}}, {}, "the resource 'h100', expected labels"),
    ],
)  # fmt: skip
def test_what_pods_cannot_have(options: dict[str, object], size: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        pools(config(**options), Size(**size))  # type: ignore[arg-type]
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("name", "Wan"), ("name", "x" * 48), ("namespace", "a b"), ("image", "a b"), ("redis", "redis"), ("redis", "r:x")],
)
def test_names_that_kubernetes_does_not_take(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--{option} has value '{value}', expected"):
        Size(**{option: value})  # type: ignore[arg-type]
