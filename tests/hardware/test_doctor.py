"""The report: real on this machine, and what it would say on others."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.fakes import FakeBackend, fake_device

import pantheraml.doctor
from pantheraml.doctor import DoctorReport, examine, report, smoke_steps
from pantheraml.hardware import speed
from pantheraml.hardware.backend import Telemetry
from pantheraml.hardware.catalog import lookup
from pantheraml.hardware.cpu import CpuBackend
from pantheraml.hardware.device import Absent, Device, Seen
from pantheraml.hardware.speed import Measured
from pantheraml.kernels.table import CPU_ROOM, OPERATIONS

PAGE = Path(__file__).parents[2] / "docs/devices.md"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PANTHERAML_CACHE", str(tmp_path / "cache"))


def shown(seen: DoctorReport, *, verbose: bool = False) -> str:
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(seen.render(verbose=verbose))
    return console.export_text()


def of(*examined: Any, **rest: Any) -> DoctorReport:
    """A report on made-up devices; the first is in use."""
    values: dict[str, Any] = {
        "python": "3", "system": "x", "basics": (), "optional": (), "absent": (), "why": "told by the test",
        "devices": examined, "device": str(examined[0].facts) if examined else None,
    }  # fmt: skip
    return DoctorReport(**{**values, **rest})


def test_a_cpu_alone_is_a_pass() -> None:
    seen = report()
    assert seen.problems == ()
    steps = {(smoke.device, smoke.dtype, smoke.error) for each in seen.devices for smoke in each.smoke}
    assert steps >= {("cpu:0", "float32", None), ("cpu:0", "bfloat16", None)}
    assert json.loads(json.dumps(seen.to_dict()))["ok"] is True


def test_it_says_what_is_in_use_and_what_is_missing_and_how_to_get_it() -> None:
    seen = report()
    text = shown(seen)
    assert f"In use: {seen.device}, the first that answered" in text and "ready to train" in text and "cross_entropy" in text
    for absent in seen.absent:
        assert absent.kind in text
    everything = shown(seen, verbose=True)
    for package in seen.optional:
        assert package.name in everything
        # An extra in brackets is not read as markup.
        assert package.version or f"pip install {package.install}" in everything


def test_json_is_alone_on_standard_output_and_every_key_is_documented(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pantheraml", "devices", "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    seen = json.loads(done.stdout)
    documented = set(re.findall(r"`(\w+)`", PAGE.read_text("utf-8").partition("## The report in JSON")[2]))
    (cpu,) = [each for each in seen["devices"] if each["id"] == "cpu:0"]
    keys = {*seen, *cpu, *cpu["facts"], *cpu["memory"], *cpu["telemetry"], *cpu["price"], *cpu["smoke"][0], *seen["basics"][0]}
    keys |= set(Measured.__dataclass_fields__) | {key for absent in seen["absent"] for key in absent}
    assert keys - documented == set()


def test_the_report_needs_neither_transformers_nor_the_compiler() -> None:
    # Each takes about a second to import; without them the report takes as long as torch.
    code = "import sys; from pantheraml.doctor import report; report(); print([m for m in ('transformers', 'torch._dynamo', 'jax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


def test_bench_measures_keeps_and_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LONG_ENOUGH_S", 0.001)
    assert all(each.measured is None for each in report().devices)
    assert any("--bench" in advice for advice in report().recommendations)
    (measured,) = [each.measured for each in report(bench=True).devices if each.facts.kind == "cpu"]
    assert measured is not None
    again = report()
    assert [each.measured for each in again.devices if each.facts.kind == "cpu"] == [measured]
    assert f"{measured.flops_per_s / 1e12:.3g} TFLOP/s in {measured.dtype}" in shown(again)
    assert not any("--bench" in advice for advice in again.recommendations)


def test_the_achieved_share_is_of_the_catalogs_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = lookup("cuda", "NVIDIA H100 80GB HBM3")
    assert entry is not None and entry.bandwidth_bytes_per_s is not None
    # What an H100 did once (8192 products in bfloat16, copies counted both ways).
    figures = Measured(
        device="cuda:0", name=entry.name, dtype="bfloat16", flops_per_s=798e12, matrix_size=8192, copy_bytes_per_s=3.0e12,
        copy_bytes=1, host_bytes_per_s=None, launch_s=1e-6, threads=1, torch="2", date="2026-11-13",
    )  # fmt: skip
    monkeypatch.setattr(pantheraml.doctor, "remembered", lambda device, cache: figures)
    device = replace(fake_device("cuda", name="NVIDIA H100 80GB HBM3"), simulated=False)
    seen = examine(device, None, tmp_path, backend=FakeBackend("cuda"))
    assert seen.peak_share == pytest.approx(798e12 / 989.4e12, rel=0.01)
    assert seen.copy_share == pytest.approx(3.0 / 3.35, rel=0.01)
    assert "798 TFLOP/s in bfloat16, 81% of its peak; copies 3e+03 GB/s" in shown(of(seen))
    assert examine(replace(device, simulated=True), None, tmp_path, backend=FakeBackend("cuda")).peak_share is None


def test_what_a_driver_tells_is_shown_and_what_it_does_not_is_left_out(tmp_path: Path) -> None:
    class Told(FakeBackend):
        def telemetry(self, index: int) -> Telemetry:
            return Telemetry(utilization=0.5, power_w=300.0)

    device = replace(fake_device("cuda"), capability="9.0", cores=132)
    text = shown(of(examine(device, 2.5, tmp_path, backend=Told("cuda"))), verbose=True)
    for part in ("9.0", "132", "50%", "300 W", "$2.50 an hour (your own price)"):
        assert part in text
    assert "temperature" not in text and "topology" not in text


def test_a_gpu_that_only_its_driver_knows_is_the_first_advice() -> None:
    lost = Absent(kind="cuda", why="torch was built without CUDA", fix="install the CUDA build", seen=(Seen(index=0, name="NVIDIA L4"),))
    assert of(absent=(lost,)).recommendations[0] == "cuda: install the CUDA build"


def test_a_simulated_device_is_marked(tmp_path: Path) -> None:
    seen = of(examine(fake_device("tpu"), None, tmp_path, backend=FakeBackend("tpu")))
    assert "Fake (simulated)" in shown(seen)
    assert any("is simulated" in advice for advice in seen.recommendations)


def test_a_device_on_which_nothing_of_ours_has_run_is_marked(tmp_path: Path) -> None:
    device = replace(fake_device("torch_tpu", name="TPU v6e"), simulated=False)
    seen = of(examine(device, None, tmp_path, backend=FakeBackend("torch_tpu")), device="torch_tpu:0")
    assert "torch_tpu:0 is unproven: nothing of PantheraML has run on one yet" in " ".join(seen.recommendations)
    assert "unproven" in shown(seen)


def test_a_measurement_that_cannot_be_kept_is_shown_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PANTHERAML_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(speed, "LONG_ENOUGH_S", 0.001)
    seen = report(bench=True)
    assert all(each.measured and "cannot be kept" in (each.trouble or "") for each in seen.devices if each.facts.dtypes)
    assert "note: the measured speed cannot be kept" in shown(seen) and seen.problems == ()


def test_the_price_of_the_settings_is_that_of_the_chosen_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPUTE_USD_PER_HOUR", "2")
    monkeypatch.setenv("PANTHERAML_SIMULATE_TPU", "1")
    monkeypatch.setenv("PANTHERAML_DEVICE_TYPE", "cpu")
    prices = {each.facts.kind: each.price for each in report().devices}
    assert prices["cpu"].usd_per_hour == 2 and prices["tpu"].usd_per_hour is None


def test_a_dtype_that_does_not_train_is_a_problem(tmp_path: Path) -> None:
    class Broken(FakeBackend):
        def synchronize(self, index: int | None = None) -> None:
            raise RuntimeError("the device is lost")

    device = fake_device("cuda", dtypes=("float32",))
    (smoke,) = smoke_steps(Broken(), device)
    assert smoke.error == "the device is lost"
    assert of(examine(device, None, tmp_path, backend=Broken())).problems == ("cuda:0 does not train in float32: the device is lost",)


def test_nothing_to_train_on_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPUTE_PREFER", "tpu")
    seen = report()
    if any(each.facts.kind == "tpu" for each in seen.devices):
        pytest.skip("a TPU is here")
    assert seen.device is None and "COMPUTE_PREFER=tpu asks for tpu, but no tpu device answered; here is cpu:0" in seen.problems[0]


def test_smoke_leaves_the_callers_random_numbers_alone() -> None:
    import torch

    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    smoke_steps(CpuBackend(), fake_device("cpu"))
    assert torch.equal(torch.rand(1), expected)


def test_every_device_of_the_machine_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[Device] = [each.facts for each in report().devices]
    answers = CpuBackend().probe()
    assert isinstance(answers, tuple) and devices[-1].name == answers[0].name


def test_without_a_compiler_the_cpu_has_the_references(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    device = fake_device("cpu")
    assert pantheraml.doctor._kernels(device) == {name: operation.reference for name, operation in OPERATIONS.items()}
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert all(target.startswith(CPU_ROOM) for target in pantheraml.doctor._kernels(device).values())
