from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from pantheraml.hardware.backend import open_backend
from pantheraml.hardware.cpu import CpuBackend, busy_share, cpu_name, hottest, multiplies_bfloat16, usable_cores, usable_memory
from pantheraml.hardware.device import Device
from pantheraml.hardware.failures import classify
from pantheraml.hardware.sensors import PowerMeter, intel_energy_uj, intel_gpus, intel_temperature_c, package_energy
from pantheraml.recipe.kinds import KINDS

MIB = 1 << 20


def probed() -> Device:
    devices = CpuBackend().probe()
    assert isinstance(devices, tuple)
    (device,) = devices
    return device


def test_probe_describes_this_cpu() -> None:
    device = probed()
    assert str(device) == "cpu:0"
    assert sorted(device.dtypes) == ["bfloat16", "float32"]
    assert 0 < device.free_bytes <= device.memory_bytes <= psutil.virtual_memory().total
    # Between a very old core and a thousand of the newest.
    assert device.peak_flops is not None
    assert 1e8 < device.peak_flops < 1e15
    assert not device.simulated


def test_autocast_computes_in_the_dtype() -> None:
    backend, left = CpuBackend(), torch.ones(4, 4)
    with backend.autocast(torch.bfloat16):
        assert (left @ left).dtype == torch.bfloat16
    with backend.autocast(torch.float32):
        assert (left @ left).dtype == torch.float32


def test_seed_repeats_what_torch_draws() -> None:
    backend = CpuBackend()
    backend.seed(7)
    first = torch.rand(3)
    backend.seed(7)
    assert torch.equal(first, torch.rand(3))


def test_set_threads_takes_the_number_or_all_cores() -> None:
    backend, before = CpuBackend(), torch.get_num_threads()
    try:
        assert backend.set_threads(1) == 1
        assert backend.set_threads(None) == usable_cores()
    finally:
        torch.set_num_threads(before)


def test_memory_sees_an_allocation_and_its_peak() -> None:
    backend = CpuBackend()
    backend.reset_peak(0)
    before = backend.memory(0)
    block = torch.ones(64 * MIB // 4)
    during = backend.memory(0)
    del block
    after = backend.memory(0)
    # Other threads of the interpreter may free a little at the same time.
    assert during.used_bytes - before.used_bytes > 50 * MIB
    assert after.peak_bytes >= during.used_bytes - 4 * MIB
    assert after.free_bytes > 0


def test_torchs_out_of_memory_is_known_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 52)
    assert classify(caught.value) == classify(MemoryError()) == "out of memory"
    assert classify(RuntimeError("shapes do not match")) == "other"


def test_there_is_one_cpu() -> None:
    assert CpuBackend().torch_device(0) == torch.device("cpu")
    with pytest.raises(ValueError, match="index 0, not 1"):
        CpuBackend().torch_device(1)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_usable_memory_obeys_a_v2_limit_of_any_level(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    write(tmp_path / "outer", memory__max=str(512 * MIB), memory__current=str(200 * MIB), memory__stat=f"inactive_file {50 * MIB}\n")
    write(tmp_path / "outer/inner", memory__max="max", memory__current="0")
    # The page cache of 50 MiB is given back on demand, so it is not used.
    assert usable_memory(tmp_path, membership) == (512 * MIB, (512 - 150) * MIB)


def test_usable_memory_obeys_a_v1_limit(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("9:name=systemd:/\n4:memory:/box\n2:cpu,cpuacct:/\n0::/\n")
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712")
    write(tmp_path / "memory/box", memory__limit_in_bytes=str(256 * MIB), memory__usage_in_bytes=str(100 * MIB))
    assert usable_memory(tmp_path, membership) == (256 * MIB, 156 * MIB)


@pytest.mark.parametrize("line", ["0::/", "0::/../elsewhere", "4:memory:/not/visible/in/here", "nonsense"])
def test_usable_memory_without_a_limit_is_the_machines(tmp_path: Path, line: str) -> None:
    membership = tmp_path / "membership"
    membership.write_text(line + "\n")
    write(tmp_path, memory__max="max")
    assert usable_memory(tmp_path, membership)[0] == psutil.virtual_memory().total
    assert usable_memory(tmp_path, tmp_path / "no such file")[0] == psutil.virtual_memory().total


def test_usable_cores_obeys_a_quota(tmp_path: Path) -> None:
    affinity = len(os.sched_getaffinity(0))
    membership = tmp_path / "membership"
    membership.write_text("0::/\n")
    write(tmp_path, cpu__max="100000 100000")
    assert usable_cores(tmp_path, membership) == 1
    write(tmp_path, cpu__max="max 100000")
    assert usable_cores(tmp_path, membership) == affinity


def test_cpu_name_is_the_kernels(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some Core 9000\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Some Core 9000"
    assert cpu_name(tmp_path / "missing")


def test_every_row_of_the_table_opens_a_backend_of_its_kind() -> None:
    for kind in KINDS:
        backend = open_backend(kind)
        assert backend.kind == kind
        assert backend.attention[-1] == "eager"


@pytest.mark.parametrize(
    ("line", "native"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16 vnni", True),
        ("flags\t\t: fpu avx2 amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("model name\t: a cpu named bf16", False),
    ],
)
def test_bfloat16_is_first_where_the_processor_multiplies_it(tmp_path, line: str, native: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert multiplies_bfloat16(tmp_path / "cpuinfo") is native
    assert multiplies_bfloat16(tmp_path / "none") is False


# ---- Telemetry ---------------------------------------------------------------------------------------------------

Times = namedtuple("Times", "user nice system idle iowait irq softirq steal guest guest_nice")  # as /proc/stat has them
Sensor = namedtuple("Sensor", "label current high critical")  # as psutil has them


def test_the_busy_share_is_what_was_neither_idle_nor_waiting_for_disks():
    before = Times(100, 0, 50, 800, 50, 0, 0, 0, 40, 0)
    # 10 s of four cores: 20 s of programs (5 of them in a guest, counted twice by the kernel), 4 s kernel, 12 s idle, 4 s waiting.
    assert busy_share(before, Times(120, 0, 54, 812, 54, 0, 0, 0, 45, 0)) == pytest.approx(24 / 40)
    assert busy_share(before, before) is None
    assert busy_share(before, before._replace(user=130, idle=799)) == 1.0  # a core was switched off
    mac = namedtuple("Times", "user nice system idle")
    assert busy_share(mac(1, 0, 1, 2), mac(2, 0, 2, 6)) == pytest.approx(2 / 6)


def test_the_load_is_unknown_at_the_first_call_and_known_from_then_on():
    backend, before = CpuBackend(), sum(psutil.cpu_times())
    assert backend.telemetry(0).utilization is None
    while sum(psutil.cpu_times()) - before < 0.5:
        sum(range(10_000))
    share = backend.telemetry(0).utilization
    assert share is not None and 0 < share <= 1


def test_the_temperature_is_that_of_the_processors_hottest_part():
    intel = {
        "coretemp": [Sensor("Package id 0", 61.0, 100.0, 100.0), Sensor("Core 0", 63.0, 100.0, 100.0)],
        "nvme": [Sensor("", 80.0, None, None)],
    }
    assert hottest(intel) == 63.0
    assert hottest({"k10temp": [Sensor("Tctl", 75.0, None, None), Sensor("Tdie", 48.0, None, None)]}) == 48.0
    assert hottest({"k10temp": [Sensor("Tctl", 75.0, None, None)]}) == 75.0
    assert hottest({"coretemp": [Sensor("Core 0", None, None, None)], "nvme": [Sensor("", 80.0, None, None)]}) is None
    assert hottest({}) is None


def test_power_is_energy_over_time_between_two_readings():
    meter = PowerMeter()
    assert meter.watts(5_000_000, 10.0) is None
    assert meter.watts(305_000_000, 12.0) == 150.0
    assert meter.watts(305_000_000, 12.0) is None  # no time has passed
    assert meter.watts(1_000, 14.0) is None  # the counter began anew
    assert meter.watts(8_001_000, 16.0) == 4.0
    assert meter.watts(None, 18.0) is None
    assert meter.watts(9_000_000, 20.0) is None


def test_the_energy_of_all_packages_or_none(tmp_path: Path):
    for name, label, energy in [("intel-rapl:0", "package-0", 7), ("intel-rapl:1", "package-1", 5), ("intel-rapl:2", "psys", 900)]:
        write(tmp_path / name, name=label, energy_uj=str(energy))
    write(tmp_path / "intel-rapl:0:0", name="core", energy_uj="3")
    write(tmp_path / "intel-rapl-mmio:0", name="package-0", energy_uj="7")
    assert package_energy(tmp_path) == 12
    (tmp_path / "intel-rapl:1/energy_uj").unlink()  # what may not be read looks the same
    assert package_energy(tmp_path) is None
    assert package_energy(tmp_path / "no such folder") is None


def intel_card(drm: Path, number: int, driver: str, device: str, **files: str) -> Path:
    """As the kernel lays it out: card0/device is the PCI device, its sensors are in hwmon/hwmonN."""
    write(drm / f"card{number}/device", vendor="0x8086\n", device=f"{device}\n")
    write(drm / f"card{number}-DP-1", status="connected\n")
    hwmon = drm / f"card{number}/device/hwmon/hwmon{number + 3}"
    write(hwmon, name=f"{driver}\n", **files)
    return hwmon


def test_intels_sensors_are_found_by_the_pci_id(tmp_path: Path):
    b580 = intel_card(
        tmp_path, 1, "xe", "0xe20b", temp2_input="54000\n", temp3_input="62000\n", energy1_input="123456\n", energy2_input="99\n"
    )
    a770 = intel_card(tmp_path, 0, "i915", "0x56a0", temp1_input="41000\n", energy1_input="42\n")
    write(tmp_path / "card2/device", vendor="0x10de\n", device="0xe20b\n")
    assert intel_gpus(0xE20B, tmp_path) == (b580,) and intel_gpus(0x56A0, tmp_path) == (a770,)
    assert (intel_temperature_c(b580), intel_energy_uj(b580)) == (54.0, 123456)
    assert (intel_temperature_c(a770), intel_energy_uj(a770)) == (41.0, 42)
    other = intel_card(tmp_path, 3, "xe", "0xe20b", energy2_input="7\n")
    assert intel_gpus(0xE20B, tmp_path) == (b580, other)  # two alike: who is who is not known
    assert (intel_temperature_c(other), intel_energy_uj(other)) == (None, 7)


@pytest.mark.parametrize(("devices", "known"), [([0xE20B], True), ([0xE20B, 0xE20B], False), ([0xE20B, 0x56A0], True), ([0x7D55], False)])
def test_an_intel_gpu_is_watched_where_its_sensors_are_surely_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices, known: bool
):
    from pantheraml.hardware import xpu

    card = intel_card(tmp_path, 0, "xe", "0xe20b", temp2_input="54000\n", energy1_input="1000000\n")
    monkeypatch.setattr(torch.xpu, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: SimpleNamespace(device_id=devices[index]))
    monkeypatch.setattr(xpu, "intel_gpus", lambda device_id: intel_gpus(device_id, tmp_path))
    backend = xpu.XpuBackend()
    first = backend.telemetry(0)
    assert (first.temperature_c, first.power_w, first.utilization) == (54.0 if known else None, None, None)
    (card / "energy1_input").write_text("2000000\n")
    watts = backend.telemetry(0).power_w
    assert watts is None if not known else watts is not None and watts > 0


def test_a_limit_on_addresses_counts_as_memory() -> None:
    code = "from pantheraml.hardware.cpu import usable_memory; print(*usable_memory())"
    limit = 6 << 30
    done = subprocess.run(
        ["sh", "-c", f'ulimit -v {limit >> 10} && exec "$0" -c "$1"', sys.executable, code],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    total, free = map(int, done.stdout.split())
    assert total == min(limit, usable_memory()[0])
    assert free < total


def run_with_glibc(program: str) -> None:
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_freed_memory_waits_for_its_next_use_until_it_is_let_go() -> None:
    run_with_glibc(
        "import resource, torch, psutil\n"
        "from pantheraml.hardware.cpu import CpuBackend, keep_freed_memory\n"
        "rss = lambda: psutil.Process().memory_info().rss >> 20\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "take = lambda: [torch.ones(6 << 20) for _ in range(8)]\n"  # 24 MiB each
        "assert keep_freed_memory()\n"
        "before = rss(); take(); assert rss() - before > 180, (before, rss())\n"
        "so_far = faults(); take(); assert faults() - so_far < 24576, faults() - so_far\n"  # half of their pages
        "CpuBackend().empty_cache(); assert rss() - before < 40, (before, rss())\n"
    )


def test_freed_memory_goes_back_to_the_system_on_request() -> None:
    run_with_glibc(
        "import torch, psutil\n"
        "from pantheraml.hardware.cpu import CpuBackend, return_freed_memory\n"
        "rss = lambda: psutil.Process().memory_info().rss >> 20\n"
        "assert return_freed_memory()\n"
        "kept = [torch.ones(3 << 18) for _ in range(64)]\n"  # 3 MiB each
        "before = rss(); del kept[::2]; after = rss()\n"
        "assert before - after > 80, (before, after)\n"
        "CpuBackend().empty_cache()\n"
    )
