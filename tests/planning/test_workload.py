"""Choosing a device by time and money, against the arithmetic done by hand."""

from __future__ import annotations

import math

import pytest
from tests.fakes import GIB, decoder_shape, fake_device

from pantheraml.errors import DeviceError
from pantheraml.planning.cost import UTILISATION, flops_per_token
from pantheraml.planning.memory import estimate_memory
from pantheraml.planning.workload import Profile, Workload, choose, estimate


def profile(
    kind: str,
    flops: float | None,
    usd: float | None = None,
    *,
    host: float | None = None,
    launch: float | None = None,
    memory_gib: int = 80,
    index: int = 0,
) -> Profile:
    return Profile(
        device=fake_device(kind, index, memory_bytes=memory_gib * GIB),
        free_bytes=memory_gib * GIB,
        flops_per_s=flops,
        flops_source="told by the test",
        host_bytes_per_s=host,
        launch_s=launch,
        usd_per_hour=usd,
        price_source="told by the test",
    )


FAST, CHEAP = profile("cuda", 4e14, 8.0), profile("xpu", 1e14, 1.0)


def test_time_and_cost_are_the_sum_of_their_parts() -> None:
    work = Workload(flops=2e15, transfer_bytes=10**10, launches=1000, utilization=0.5)
    found = estimate(work, profile("cuda", 4e14, 7.2, host=2e10, launch=1e-5))
    assert found.time_s == pytest.approx(2e15 / (4e14 * 0.5) + 10**10 / 2e10 + 1000 * 1e-5)  # 10 + 0.5 + 0.01 s
    assert found.cost_usd == pytest.approx(7.2 * 10.51 / 3600)
    unknown = estimate(work, profile("cuda", None, 7.2))
    assert unknown.time_s is None and unknown.cost_usd is None
    assert estimate(work, profile("cuda", 4e14)).cost_usd is None


def test_the_objective_decides() -> None:
    work = Workload(flops=4e17)  # 1000 s and 2.22 dollars, or 4000 s and 1.11 dollars
    assert choose(work, [CHEAP, FAST], "time").device.kind == "cuda"
    assert choose(work, [FAST, CHEAP], "cost").device.kind == "xpu"
    assert choose(work, [CHEAP, FAST], "balanced").device.kind == "cuda"  # 2222 against 4444 dollar-seconds
    chosen = choose(work, [FAST, CHEAP], "cost")
    assert chosen.time_s == pytest.approx(4000) and chosen.cost_usd == pytest.approx(4000 / 3600)
    assert "the least cost of 2 devices" in chosen.why and len(chosen.estimates) == 2


def test_a_budget_leaves_out_what_costs_more_or_has_no_price() -> None:
    work = Workload(flops=4e17)
    assert choose(work, [FAST, CHEAP], "time", budget_usd=2).device.kind == "xpu"
    assert choose(work, [profile("tpu", 9e14), CHEAP], "time", budget_usd=2).device.kind == "xpu"
    with pytest.raises(DeviceError, match="no device can take this work") as caught:
        choose(work, [FAST, profile("tpu", 9e14)], "time", budget_usd=1)
    assert "cuda:0: costs $2.222, over the budget of $1; tpu:0: its price is not known" in caught.value.why


def test_size_decides_between_a_near_and_a_fast_device() -> None:
    near, far = profile("cpu", 1e12, host=math.inf), profile("cuda", 4e14, host=1e10, launch=1e-5)
    small, large = Workload(flops=1e9, transfer_bytes=10**8), Workload(flops=1e15, transfer_bytes=10**8)
    assert choose(small, [far, near]).device.kind == "cpu"  # 1 ms against 10 ms for the copy
    assert choose(large, [near, far]).device.kind == "cuda"  # 1000 s against 2.5 s


def test_what_does_not_fit_or_is_not_known_is_left_out_with_its_reason() -> None:
    work = Workload(flops=1e15, memory_bytes=40 * GIB)
    chosen = choose(work, [profile("cuda", 4e14, memory_gib=48), profile("xpu", 1e12, memory_gib=80), profile("cpu", None)])
    assert chosen.device.kind == "xpu"
    reasons = {each.device.kind: each.excluded for each in chosen.estimates}
    assert reasons == {
        "cuda": "needs 40.0 GiB, and 38.4 GiB may be filled",
        "xpu": None,
        "cpu": "its speed is not known (told by the test)",
    }


def test_a_training_run_is_tokens_times_flops_at_the_speed_of_a_step() -> None:
    shape = decoder_shape()
    memory = estimate_memory(
        shape,
        trainable_parameters=shape.lora_parameters(16),
        base_bytes_each=2,
        micro_tokens=4096,
        row_tokens=2048,
        levels=("keep",) * shape.layers,
        attention="sdpa",
        compute_bytes_each=2,
        lora_rank=16,
    )
    work = Workload.training(shape, memory, tokens=1000, row_tokens=2048, lora_rank=16)
    assert work.flops == 1000 * flops_per_token(shape, row_tokens=2048, levels=(), lora_rank=16)
    assert (work.memory_bytes, work.utilization) == (memory.total_bytes, UTILISATION)


def test_an_objective_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="objective is time, cost or balanced"):
        choose(Workload(flops=1.0), [FAST], "speed")


def test_a_part_whose_speed_nobody_knows_is_not_nothing() -> None:
    unmeasured = profile("cuda", 4e14)
    assert estimate(Workload(flops=1e9, transfer_bytes=10**14), unmeasured).time_s is None
    assert estimate(Workload(flops=1e9, launches=1), unmeasured).time_s is None
    assert estimate(Workload(flops=1e9), unmeasured).time_s == pytest.approx(2.5e-6)
    chosen = choose(Workload(flops=1e9, transfer_bytes=10**14), [unmeasured, profile("cpu", 1e12, host=math.inf)])
    assert chosen.device.kind == "cpu" and chosen.why.startswith("the only one that can take it; speed:")
    assert "how fast data moves to it is not known" in (chosen.estimates[0].excluded or "")


@pytest.mark.parametrize(
    "wrong", [{"flops": -1.0}, {"flops": math.nan}, {"flops": 1.0, "utilization": 0.0}, {"flops": 1.0, "transfer_bytes": -1}]
)
def test_amounts_that_are_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="finite amounts"):
        Workload(**wrong)
