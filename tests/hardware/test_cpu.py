from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch

from pantheraml.hardware.backend import open_backend
from pantheraml.hardware.cpu import CpuBackend, cpu_name, multiplies_bfloat16, usable_cores, usable_memory
from pantheraml.hardware.device import Device
from pantheraml.hardware.failures import classify
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
