"""Which demands are refused because no host of a cluster could meet them."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.capacity import Host, impossible, needs
from serve_app.config import validate

LAPTOP = Host({"CPU": 2, "memory": 8e9, "node:10.0.0.1": 1, "object_store_memory": 2e9})
GPUS = Host({"CPU": 32, "GPU": 8}, {"pool": "h200"})
NONE = {"num_cpus": 0.1, "num_gpus": 0}
CPUS: dict[str, Any] = {
    "encoder": {"resources": NONE},
    "denoiser": {"rank": NONE, "coordinator_cpus": 0.1},
    "decoder": {"resources": NONE},
}


def refused(change: dict[str, Any], *hosts: Host) -> list[str]:
    """Return what is said of a deployment on CPUs with sections changed."""
    args = {name: {**section, **change.get(name, {})} for name, section in CPUS.items()}
    return impossible(needs(validate({**change, **args})), hosts)


@pytest.mark.parametrize(
    ("change", "hosts", "said"),
    [
        (
            {"encoder": {"resources": {"num_gpus": 1}}},
            [LAPTOP],
            "encoder.resources asks for 1 CPU, 1 GPU on one host, ",
        ),
        ({"encoder": {"resources": {"num_cpus": 64}}}, [LAPTOP], "and no host has that (2 CPU)"),
        ({"decoder": {"resources": {**NONE, "resources": {"nvme": 1}}}}, [LAPTOP, GPUS], "0.1 CPU, 1 nvme on one host"),
        (
            {"decoder": {"resources": {**NONE, "labels": {"pool": "codec"}}}},
            [LAPTOP, GPUS],
            "0.1 CPU on one host with the labels {pool: codec}, and no host has that (2 CPU; 32 CPU, 8 GPU)",
        ),
        ({"denoiser": {"rank": {"num_gpus": 1}}}, [LAPTOP], "denoiser.rank asks for 1 CPU, 1 GPU on one host"),
        (
            {"denoiser": {"rank": {"num_gpus": 1}, "parallel": {"tensor": 10}}},
            [GPUS, GPUS],
            "ask for 10.1 CPU, 10 GPU on one host, as denoiser.placement STRICT_PACK has it, and no host has that "
            "(2 x 32 CPU, 8 GPU)",
        ),
        (
            {"denoiser": {"placement": "STRICT_SPREAD", "rank": NONE, "parallel": {"tensor": 2}}},
            [LAPTOP, GPUS],
            "STRICT_SPREAD asks for 3 hosts, one for each rank and one for the coordinator, and there are 2",
        ),
        (
            {"denoiser": {"rank": {"num_gpus": 1}, "autoscaling": {"min_replicas": 9, "max_replicas": 9}}},
            [GPUS],
            "all deployments together ask for 9 GPU, and the cluster has 8 GPU: 9 x Denoiser (1)",
        ),
        ({"gateway": {"num_cpus": 3}}, [LAPTOP], "gateway asks for 3 CPU on one host"),
        ({"pipeline": {"num_cpus": 3}}, [LAPTOP], "pipeline asks for 3 CPU on one host"),
        ({"dispatcher": {"num_cpus": 3}}, [LAPTOP], "dispatcher asks for 3 CPU on one host"),
        ({}, [], "and no host has that (no host)"),
    ],
)
def test_what_no_host_has(change: dict[str, Any], hosts: list[Host], said: str) -> None:
    assert said in "\n".join(refused(change, *hosts))


@pytest.mark.parametrize(
    ("change", "hosts"),
    [
        ({}, [LAPTOP]),
        ({"encoder": {"resources": {"num_gpus": 1, "labels": {"pool": "in(a100, h200)"}}}}, [LAPTOP, GPUS]),
        ({"encoder": {"resources": {**NONE, "labels": {"pool": "!h200"}}}}, [LAPTOP]),
        ({"denoiser": {"rank": {"num_gpus": 1}, "parallel": {"tensor": 8}}}, [GPUS]),
        ({"denoiser": {"placement": "PACK", "rank": {"num_gpus": 1}, "parallel": {"tensor": 10}}}, [GPUS, GPUS]),
        ({"denoiser": {"placement": "STRICT_SPREAD", "parallel": {"tensor": 2}, **CPUS["denoiser"]}}, [GPUS] * 3),
        ({"decoder": {"resources": {"num_gpus": 0.3}, "memory_fraction": 0.1}}, [GPUS]),
    ],
)
def test_what_may_be_possible(change: dict[str, Any], hosts: list[Host]) -> None:
    assert refused(change, *hosts) == []


def test_a_finisher_that_is_not_there_yet_needs_nothing_but_a_host_that_could_have_it() -> None:
    finisher = {"resources": {"num_cpus": 1, "labels": {"pool": "cpu"}}}
    (line,) = refused({"finisher": finisher}, LAPTOP)
    assert "finisher.resources asks for 1 CPU on one host with the labels {pool: cpu}, and no host has that" in line
    (line,) = refused({"gateway": {"num_cpus": 1.9}}, LAPTOP)
    assert "Finisher" not in line


def test_the_model_at_its_size_on_one_gpu() -> None:
    """Each of the three stages would find the GPU, and together they do not."""
    (line,) = impossible(needs(validate({})), [Host({"CPU": 64, "GPU": 1})])
    assert "together ask for 3 GPU, and the cluster has 1 GPU: 1 x Encoder (1), 1 x Denoiser (1), 1 x Decoder" in line


def test_only_the_applications_of_the_file_count() -> None:
    assert [need.deployment for need in needs(validate({}), pipeline=False)] == ["gateway", "dispatcher"]
    split = validate(
        {"denoiser": {"experts": "split", "low_noise_autoscaling": {"min_replicas": 2, "max_replicas": 2}}}
    )
    found = {need.deployment: need.replicas for need in needs(split, gateway=False)}
    stages = {"Encoder": 1, "HighNoiseDenoiser": 1, "LowNoiseDenoiser": 2, "Decoder": 1, "Pipeline": 1}
    assert found == {**stages, "Finisher": 0}
    without = validate({"finisher": {"enabled": False}})
    assert "Finisher" not in {need.deployment for need in needs(without)}
