from __future__ import annotations

import math
import re
from datetime import date

import pytest

from pantheraml.hardware.catalog import CATALOG, Entry, lookup
from pantheraml.recipe.kinds import KINDS

GIB = 1 << 30
MIB = 1 << 20
NAMES = [entry.name for entry in CATALOG]


@pytest.fixture(params=CATALOG, ids=NAMES)
def entry(request) -> Entry:
    return request.param


def named(name: str) -> Entry:
    (found,) = (entry for entry in CATALOG if entry.name == name)
    return found


# What drivers, JAX and the environment of a TPU call the devices.
@pytest.mark.parametrize(
    ("kind", "driver_says", "name"),
    [
        ("cuda", "NVIDIA B200", "NVIDIA B200 SXM"),
        ("cuda", "NVIDIA H200", "NVIDIA H200 SXM"),
        ("cuda", "NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM"),
        ("cuda", "NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("cuda", "NVIDIA H100 NVL", "NVIDIA H100 NVL"),
        ("cuda", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 SXM 40 GB"),
        ("cuda", "A100-SXM4-40GB", "NVIDIA A100 SXM 40 GB"),  # before driver 470 the vendor was not said
        ("cuda", "NVIDIA A100-SXM4-80GB", "NVIDIA A100 SXM 80 GB"),
        ("cuda", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 PCIe 40 GB"),
        ("cuda", "NVIDIA A100 80GB PCIe", "NVIDIA A100 PCIe 80 GB"),
        ("cuda", "NVIDIA L4", "NVIDIA L4"),
        ("cuda", "NVIDIA L40S", "NVIDIA L40S"),
        ("cuda", "NVIDIA A10", "NVIDIA A10"),
        ("cuda", "NVIDIA A10G", "NVIDIA A10G"),
        ("cuda", "Tesla T4", "NVIDIA T4"),
        ("cuda", "Tesla V100-SXM2-16GB", "NVIDIA V100 SXM2 16 GB"),
        ("cuda", "Tesla V100-SXM2-32GB", "NVIDIA V100 SXM2 32 GB"),
        ("cuda", "Tesla V100-PCIE-16GB", "NVIDIA V100 PCIe 16 GB"),
        ("cuda", "Tesla V100-PCIE-32GB", "NVIDIA V100 PCIe 32 GB"),
        ("cuda", "Tesla P100-PCIE-16GB", "NVIDIA P100 PCIe 16 GB"),
        ("cuda", "NVIDIA GeForce RTX 5090", "NVIDIA GeForce RTX 5090"),
        ("cuda", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("cuda", "NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 3090"),
        ("cuda", "NVIDIA RTX 6000 Ada Generation", "NVIDIA RTX 6000 Ada"),
        ("cuda", "AMD Instinct MI325X", "AMD Instinct MI325X"),
        ("cuda", "AMD Instinct MI300X", "AMD Instinct MI300X"),
        ("cuda", "AMD Instinct MI250X", "AMD Instinct MI250X (one die of two)"),
        ("cuda", "AMD Instinct MI210", "AMD Instinct MI210"),
        ("xpu", "Intel(R) Data Center GPU Max 1550", "Intel Data Center GPU Max 1550"),
        ("xpu", "Intel(R) Data Center GPU Max 1100", "Intel Data Center GPU Max 1100"),
        ("xpu", "Intel(R) Arc(TM) B580 Graphics", "Intel Arc B580"),
        ("xpu", "Intel(R) Arc(TM) A770 Graphics", "Intel Arc A770 16 GB"),
        ("xpu", "Intel® Arc™ A770 Graphics", "Intel Arc A770 16 GB"),
        ("tpu", "TPU v2", "Google TPU v2"),
        ("tpu", "v2-8", "Google TPU v2"),
        ("tpu", "TPU v3", "Google TPU v3"),
        ("tpu", "TPU v4", "Google TPU v4"),
        ("tpu", "v4-8", "Google TPU v4"),
        ("tpu", "TPU v5 lite", "Google TPU v5e"),
        ("tpu", "TPU v5e", "Google TPU v5e"),
        ("tpu", "v5litepod-8", "Google TPU v5e"),
        ("tpu", "TPU v5", "Google TPU v5p"),
        ("tpu", "TPU v5p", "Google TPU v5p"),
        ("tpu", "v5p-8", "Google TPU v5p"),
        ("tpu", "TPU v6 lite", "Google TPU v6e (Trillium)"),
        ("tpu", "TPU v6e", "Google TPU v6e (Trillium)"),
        ("tpu", "v6e-4", "Google TPU v6e (Trillium)"),
        ("tpu", "TPU7x", "Google TPU7x (Ironwood)"),
    ],
)
def test_names_as_drivers_report_them(kind, driver_says, name):
    found = lookup(kind, driver_says)
    assert found is not None
    assert found.name == name


def test_every_entry_can_be_found(entry):
    assert lookup(entry.kind, entry.names[0], entry.memory_bytes) is entry


@pytest.mark.parametrize(
    ("kind", "driver_says"),
    [
        ("cuda", "NVIDIA GeForce RTX 4090 Laptop GPU"),
        ("cuda", "NVIDIA GeForce RTX 4090 D"),
        ("cuda", "NVIDIA GeForce RTX 3090 Ti"),
        ("cuda", "NVIDIA GeForce RTX 5090 D"),
        ("cuda", "Quadro RTX 6000"),
        ("cuda", "NVIDIA RTX PRO 6000 Blackwell Server Edition"),
        ("cuda", "NVIDIA RTX 5000 Ada Generation"),
        ("cuda", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
        ("cuda", "NVIDIA A100-SXM4-40GB MIG 3g.20gb"),
        ("cuda", "NVIDIA H100"),  # which of three is not said
        ("cuda", "NVIDIA H200 NVL"),
        ("cuda", "NVIDIA H20"),
        ("cuda", "NVIDIA H800"),
        ("cuda", "NVIDIA GH200 120GB"),
        ("cuda", "NVIDIA GB200"),
        ("cuda", "NVIDIA A100X"),
        ("cuda", "NVIDIA A800-SXM4-80GB"),
        ("cuda", "NVIDIA A10-24Q"),  # a virtual GPU
        ("cuda", "NVIDIA A10M"),
        ("cuda", "NVIDIA A1000"),
        ("cuda", "NVIDIA L40"),
        ("cuda", "NVIDIA T400"),
        ("cuda", "Tesla V100S-PCIE-32GB"),
        ("cuda", "Tesla V100-SXM3-32GB"),
        ("cuda", "Tesla P100-PCIE-12GB"),
        ("cuda", "AMD Instinct MI300A"),
        ("cuda", "AMD Instinct MI250X/MI250"),  # which of two is not said
        ("cuda", "AMD Instinct MI250"),
        ("xpu", "Intel(R) Arc(TM) A770M Graphics"),
        ("xpu", "Intel(R) Arc(TM) B570 Graphics"),
        ("xpu", "Intel(R) Arc(TM) Graphics"),
        ("xpu", "Intel(R) Data Center GPU Max 1450"),
        ("tpu", "TPU v4 lite"),
        ("tpu", "TPU v5litepod"),
        ("tpu", "v8-8"),
        ("tpu", "cpu"),
        ("cuda", "AMD EPYC 9474F 48-Core Processor"),
        ("cuda", "made up"),
        ("cuda", ""),
        # The right name under the wrong kind: the same letters mean another device.
        ("xpu", "NVIDIA L4"),
        ("cuda", "TPU v4"),
        ("cuda", "v4-8"),
        ("cpu", "NVIDIA H100 PCIe"),
        ("made up", "NVIDIA H100 PCIe"),
    ],
)
def test_lookalikes_and_strangers_have_no_entry(kind, driver_says):
    assert lookup(kind, driver_says) is None


# memory.total of nvidia-smi, total_memory of torch and bytes_limit of JAX, on real devices.
@pytest.mark.parametrize(
    ("kind", "driver_says", "reported_bytes"),
    [
        ("cuda", "NVIDIA H100 80GB HBM3", 81559 * MIB),
        ("cuda", "NVIDIA H200", 143771 * MIB),
        ("cuda", "NVIDIA B200", 183359 * MIB),
        ("cuda", "NVIDIA A100-SXM4-40GB", 42405855232),
        ("cuda", "NVIDIA GeForce RTX 4090", 24564 * MIB),
        ("cuda", "NVIDIA GeForce RTX 5090", 32607 * MIB),
        ("cuda", "NVIDIA L4", 23034 * MIB),
        ("cuda", "NVIDIA L40S", 46068 * MIB),
        ("cuda", "NVIDIA A10", 23028 * MIB),
        ("cuda", "NVIDIA RTX 6000 Ada Generation", 49140 * MIB),
        ("cuda", "Tesla T4", 15360 * MIB),
        ("cuda", "AMD Instinct MI300X VF", 196288 * MIB),
        ("tpu", "TPU v5 lite", int(15.75 * GIB)),
        ("tpu", "TPU v5p", int(95.74 * GIB)),
    ],
)
def test_the_memory_that_drivers_report_belongs_to_the_entry(kind, driver_says, reported_bytes):
    assert lookup(kind, driver_says, reported_bytes) is lookup(kind, driver_says) is not None


@pytest.mark.parametrize(
    ("kind", "driver_says", "reported_bytes"),
    [
        ("cuda", "AMD Instinct MI300X", 24 * GIB),  # one of eight partitions, under the same name
        ("cuda", "NVIDIA A10", 12 * GIB),
        ("xpu", "Intel(R) Arc(TM) A770 Graphics", 8 * GIB),  # the smaller model, under the same name
        ("cuda", "NVIDIA L4", 48 * GIB),
        ("tpu", "TPU v5e", 8 * GIB),  # has one core, so no half
    ],
)
def test_a_part_of_a_device_has_no_entry(kind, driver_says, reported_bytes):
    assert lookup(kind, driver_says) is not None
    assert lookup(kind, driver_says, reported_bytes) is None


def test_a_half_that_is_a_device_has_half_of_everything():
    whole = lookup("xpu", "Intel(R) Data Center GPU Max 1550", 128 * GIB)
    half = lookup("xpu", "Intel(R) Data Center GPU Max 1550", 64 * GIB)
    assert whole is not None and half is not None
    assert half.memory_bytes * 2 == whole.memory_bytes
    assert half.bandwidth_bytes_per_s is not None
    assert half.bandwidth_bytes_per_s * 2 == whole.bandwidth_bytes_per_s
    assert {dtype: rate * 2 for dtype, rate in half.flops.items()} == whole.flops


def test_a_core_of_a_tpu_chip_gets_its_share():
    core, chip = lookup("tpu", "TPU v3", 16 * GIB), lookup("tpu", "TPU v3", 32 * GIB)
    assert core is not None and chip is not None
    assert (core.cores, chip.cores, core.memory_bytes) == (1, 2, 16 * GIB)
    assert core.bandwidth_bytes_per_s == pytest.approx((chip.bandwidth_bytes_per_s or 0) / 2)
    assert core.flops == {dtype: flops / 2 for dtype, flops in chip.flops.items()}
    assert core.usd_per_hour == pytest.approx((chip.usd_per_hour or 0) / 2)


# --- the figures ---


def test_every_figure_has_a_source_and_a_day(entry):
    assert entry.kind in KINDS
    assert len(entry.source) > 20
    assert date(2020, 1, 1) <= date.fromisoformat(entry.date) <= date(2026, 11, 21)
    if entry.flops:
        assert re.search(r"https://\S+\.\S+", entry.source)


def test_a_price_never_stands_alone(entry):
    given = (entry.usd_per_hour, entry.price_source, entry.price_date)
    assert all(each is None for each in given) or all(each is not None for each in given)
    if entry.usd_per_hour is not None:
        assert 0.1 < entry.usd_per_hour < 20
        assert entry.price_source and re.search(r"https://\S+\.\S+", entry.price_source)
        assert entry.price_date and date(2024, 1, 1) <= date.fromisoformat(entry.price_date) <= date(2026, 11, 21)


def test_units_are_sane(entry):
    assert 4e9 <= entry.memory_bytes <= 400e9
    assert set(entry.flops) <= {"float32", "tf32", "bfloat16", "float16", "fp8", "int8"}
    assert all(1e12 < rate < 1e16 for rate in entry.flops.values())
    if entry.bandwidth_bytes_per_s is None:
        return
    assert 1e11 < entry.bandwidth_bytes_per_s < 1e13
    # Reading the whole memory takes 5 to 100 ms on every device that is sold.
    assert 0.005 < entry.memory_bytes / entry.bandwidth_bytes_per_s < 0.1
    for rate in entry.flops.values():
        assert 1 < rate / entry.bandwidth_bytes_per_s < 2000


def test_names_are_not_shared_but_by_a_device_and_its_half():
    seen: dict[tuple[str, str], Entry] = {}
    for entry in CATALOG:
        for name in entry.names:
            other = seen.setdefault((entry.kind, name), entry)
            assert other is entry or other.memory_bytes == 2 * entry.memory_bytes
    assert len(set(NAMES)) == len(NAMES)


def test_no_rate_is_the_doubled_one_of_sparse_matrices(entry):
    """Half the bits are computed once, twice or four times as fast; a sparse figure among dense ones breaks the row."""
    flops = entry.flops
    for wide, narrow in (("tf32", "bfloat16"), ("bfloat16", "float16"), ("bfloat16", "fp8"), ("bfloat16", "int8"), ("float16", "int8")):
        if wide in flops and narrow in flops:
            ratio = flops[narrow] / flops[wide]
            steps = {("bfloat16", "float16"): (1,), ("tf32", "bfloat16"): (2,), ("bfloat16", "fp8"): (1, 2)}.get((wide, narrow), (1, 2, 4))
            assert any(math.isclose(ratio, step, rel_tol=0.03) for step in steps), (wide, narrow, ratio)


# Peak = engines x multiply-adds a clock x 2 x clock, from the architecture papers; vendors round, hence 1 %.
@pytest.mark.parametrize(
    ("name", "dtype", "engines", "multiply_adds", "clock_hz"),
    [
        ("NVIDIA H100 SXM", "bfloat16", 528, 512, 1.83e9),
        ("NVIDIA H200 SXM", "bfloat16", 528, 512, 1.83e9),
        ("NVIDIA H100 PCIe", "bfloat16", 456, 512, 1.62e9),
        ("NVIDIA A100 SXM 80 GB", "bfloat16", 432, 256, 1.41e9),
        ("NVIDIA A100 SXM 80 GB", "float32", 6912, 1, 1.41e9),
        ("NVIDIA V100 SXM2 16 GB", "float16", 640, 64, 1.53e9),
        ("NVIDIA T4", "float16", 320, 64, 1.59e9),
        ("NVIDIA P100 PCIe 16 GB", "float32", 3584, 1, 1.303e9),
        ("NVIDIA A10", "bfloat16", 288, 128, 1.695e9),
        ("NVIDIA L4", "float32", 7424, 1, 2.04e9),
        ("NVIDIA GeForce RTX 3090", "bfloat16", 328, 64, 1.695e9),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 512, 64, 2.52e9),
        ("NVIDIA GeForce RTX 4090", "int8", 512, 256, 2.52e9),
        ("NVIDIA GeForce RTX 5090", "float32", 21760, 1, 2.407e9),
        ("NVIDIA GeForce RTX 5090", "bfloat16", 680, 64, 2.407e9),
        ("NVIDIA RTX 6000 Ada", "float32", 18176, 1, 2.505e9),
        ("AMD Instinct MI300X", "bfloat16", 1216, 256, 2.1e9),
        ("AMD Instinct MI250X (one die of two)", "bfloat16", 440, 128, 1.7e9),
        ("AMD Instinct MI210", "bfloat16", 416, 128, 1.7e9),
        ("Intel Data Center GPU Max 1550", "bfloat16", 1024, 256, 1.6e9),
        ("Intel Data Center GPU Max 1550", "float32", 1024, 16, 1.6e9),
        ("Intel Arc B580", "float32", 2560, 1, 2.67e9),
        ("Intel Arc B580", "bfloat16", 160, 128, 2.67e9),
        ("Google TPU v4", "bfloat16", 8 * 128 * 128, 1, 1.05e9),
        ("Google TPU v3", "bfloat16", 4 * 128 * 128, 1, 0.94e9),
        ("Google TPU v2", "bfloat16", 2 * 128 * 128, 1, 0.7e9),
        ("Google TPU v5e", "bfloat16", 4 * 128 * 128, 1, 1.5e9),
        ("Google TPU v5p", "bfloat16", 8 * 128 * 128, 1, 1.75e9),
    ],
)
def test_peaks_follow_from_the_chip(name, dtype, engines, multiply_adds, clock_hz):
    assert named(name).flops[dtype] == pytest.approx(engines * multiply_adds * 2 * clock_hz, rel=0.01)


# Another reader: the table inside JAX (jax/_src/pallas/mosaic/tpu_info.py), times the cores of a chip; it rounds to three digits.
@pytest.mark.parametrize(
    ("name", "dtype", "jax_says"),
    [
        ("Google TPU v4", "bfloat16", 2.75e14),
        ("Google TPU v5e", "bfloat16", 1.97e14),
        ("Google TPU v5e", "int8", 3.94e14),
        ("Google TPU v5p", "bfloat16", 4.59e14),
        ("Google TPU v6e (Trillium)", "bfloat16", 9.20e14),
        ("Google TPU v6e (Trillium)", "int8", 1.84e15),
        ("Google TPU v6e (Trillium)", "fp8", 9.20e14),
        ("Google TPU7x (Ironwood)", "bfloat16", 2.31e15),
        ("Google TPU7x (Ironwood)", "fp8", 4.60e15),
    ],
)
def test_peaks_of_tpus_agree_with_jax(name, dtype, jax_says):
    assert named(name).flops[dtype] == pytest.approx(jax_says, rel=0.005)


# Bandwidth = bus width x transfers a second and pin.
@pytest.mark.parametrize(
    ("name", "bus_bits", "transfers_per_s"),
    [
        ("NVIDIA A100 SXM 40 GB", 5120, 2.43e9),
        ("NVIDIA A100 SXM 80 GB", 5120, 3.186e9),
        ("NVIDIA H100 SXM", 5120, 5.24e9),
        ("NVIDIA V100 SXM2 16 GB", 4096, 1.754e9),
        ("NVIDIA P100 PCIe 16 GB", 4096, 1.43e9),
        ("NVIDIA T4", 256, 10e9),
        ("NVIDIA L4", 192, 12.5e9),
        ("NVIDIA L40S", 384, 18e9),
        ("NVIDIA A10", 384, 12.5e9),
        ("NVIDIA GeForce RTX 3090", 384, 19.5e9),
        ("NVIDIA GeForce RTX 4090", 384, 21e9),
        ("NVIDIA GeForce RTX 5090", 512, 28e9),
        ("NVIDIA RTX 6000 Ada", 384, 20e9),
        ("AMD Instinct MI300X", 8192, 5.2e9),
        ("AMD Instinct MI250X (one die of two)", 4096, 3.2e9),
        ("AMD Instinct MI210", 4096, 3.2e9),
        ("Intel Data Center GPU Max 1550", 8192, 3.2e9),
        ("Intel Arc B580", 192, 19e9),
        ("Intel Arc A770 16 GB", 256, 17.5e9),
    ],
)
def test_bandwidth_follows_from_the_memory(name, bus_bits, transfers_per_s):
    assert named(name).bandwidth_bytes_per_s == pytest.approx(bus_bits / 8 * transfers_per_s, rel=0.025)


@pytest.mark.parametrize(
    ("name", "memory_gb", "cores"),
    [
        ("Google TPU v4", 32, 2),
        ("Google TPU v5e", 16, 1),
        ("Google TPU v5p", 95, 2),
        ("Google TPU v6e (Trillium)", 32, 1),
        ("Google TPU7x (Ironwood)", 192, 2),
        ("Google TPU v3", 32, 2),
        ("Google TPU v2", 16, 2),
    ],
)
def test_memory_and_cores_of_a_tpu_chip(name, memory_gb, cores):
    assert named(name).memory_bytes == memory_gb * GIB
    assert named(name).cores == cores


def test_cores_are_for_tpus_only(entry):
    assert (entry.cores is not None) == (entry.kind == "tpu")
