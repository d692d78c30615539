"""Measured speeds: real on this CPU, kept, and read back; never for another device or torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pantheraml.errors import StorageError
from pantheraml.hardware import speed
from pantheraml.hardware.cpu import CpuBackend
from pantheraml.hardware.device import Device
from pantheraml.hardware.speed import CACHE, Measured, matmul_flops, measure, median_seconds, remember, remembered


@pytest.fixture(scope="module")
def cpu() -> Device:
    (device,) = CpuBackend().probe()
    return device


@pytest.fixture(scope="module")
def measured(cpu: Device) -> Measured:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "LONG_ENOUGH_S", 0.001)
        return measure(CpuBackend(), cpu)


def test_measure_counts_what_it_did(cpu: Device, measured: Measured) -> None:
    assert (measured.device, measured.name, measured.dtype) == ("cpu:0", cpu.name, cpu.dtypes[0])
    assert measured.matrix_size >= 1024 and measured.copy_bytes >= 64 << 20
    assert measured.flops_per_s > 1e8 and measured.copy_bytes_per_s > 1e7 and 0 < measured.launch_s < 1
    assert measured.host_bytes_per_s is None  # the device works in the host's memory
    assert (measured.threads, measured.torch) == (torch.get_num_threads(), torch.__version__)


def test_a_median_is_of_the_calls_after_the_first() -> None:
    calls: list[int] = []
    waits: list[int] = []
    assert median_seconds(lambda: calls.append(0), lambda: waits.append(0), repeats=3, warmups=2) >= 0
    assert (len(calls), len(waits)) == (5, 10)
    assert matmul_flops(2.0, 1000) == 1e9


def test_what_was_measured_is_kept_once_and_found_again(cpu: Device, measured: Measured, tmp_path: Path) -> None:
    assert remembered(cpu, tmp_path / "cache") is None
    remember(replace(measured, flops_per_s=1.0), tmp_path / "cache")
    remember(replace(measured, device="cpu:1"), tmp_path / "cache")
    file = remember(measured, tmp_path / "cache")
    assert remembered(cpu, tmp_path / "cache") == measured
    assert len(json.loads(file.read_text())) == 2  # the older figure of the same device is gone
    assert [path.name for path in file.parent.iterdir()] == [CACHE]


def test_figures_of_something_else_are_not_used(cpu: Device, measured: Measured, tmp_path: Path) -> None:
    remember(replace(measured, torch="1.0"), tmp_path)
    remember(replace(measured, name="another"), tmp_path)
    remember(replace(measured, dtype="float64"), tmp_path)
    assert remembered(cpu, tmp_path) is None


@pytest.mark.parametrize("text", ["", "[{}]", '{"device": 1}', "\xff"])
def test_a_cache_that_is_not_ours_holds_nothing(cpu: Device, measured: Measured, tmp_path: Path, text: str) -> None:
    (tmp_path / CACHE).write_text(text, "latin-1")
    assert remembered(cpu, tmp_path) is None
    remember(measured, tmp_path)
    assert remembered(cpu, tmp_path) == measured


@pytest.mark.parametrize("wrong", [{"flops_per_s": 0}, {"launch_s": -5.0}, {"copy_bytes_per_s": "fast"}])
def test_a_row_that_is_no_measurement_is_left_out_and_the_others_stay(
    cpu: Device, measured: Measured, tmp_path: Path, wrong: dict[str, object]
) -> None:
    file = remember(replace(measured, device="cpu:1"), tmp_path)
    file.write_text(json.dumps([*json.loads(file.read_text()), {**json.loads(file.read_text())[0], "device": "cpu:0", **wrong}]))
    assert remembered(cpu, tmp_path) is None
    remember(measured, tmp_path)
    assert [row["device"] for row in json.loads(file.read_text())] == ["cpu:1", "cpu:0"]


def test_a_figure_with_other_threads_is_not_used(cpu: Device, measured: Measured, tmp_path: Path) -> None:
    remember(replace(measured, threads=measured.threads + 1), tmp_path)
    assert remembered(cpu, tmp_path) is None


def test_a_user_without_a_home_has_no_figures(cpu: Device) -> None:
    assert remembered(cpu, Path("~nobody-of-this-name/cache")) is None


def test_a_cache_that_cannot_be_written_is_named(measured: Measured, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="the measured speed cannot be kept") as caught:
        remember(measured, tmp_path / "file")
    assert "PANTHERAML_CACHE" in caught.value.fix
