"""The device manager: on this machine for real, and on machines that are not here with stand-ins that say so."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakes import GIB, FakeBackend, decoder_shape, llama_8b

import pantheraml
from pantheraml.errors import DeviceError
from pantheraml.hardware.backend import Backend, MemoryUse
from pantheraml.hardware.cpu import CpuBackend, usable_memory
from pantheraml.hardware.device import Device, DeviceType, Inventory
from pantheraml.hardware.find import find
from pantheraml.hardware.speed import Measured, remember
from pantheraml.manager import DeviceManager, get_device_manager
from pantheraml.planning.batch import nearest_power_of_two, rows_that_fit
from pantheraml.planning.memory import estimate_memory
from pantheraml.planning.workload import Workload
from pantheraml.recipe.types import HardwareAsk


@pytest.fixture(autouse=True)
def no_figures_from_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PANTHERAML_CACHE", str(tmp_path / "cache"))


def machine(*backends: FakeBackend, ask: HardwareAsk | None = None, **rest: Any) -> DeviceManager:
    """A manager of a machine with these backends."""
    by_kind: dict[str, Backend] = {backend.kind: backend for backend in backends}
    devices: list[Device] = []
    for backend in backends:
        answer = backend.probe()
        assert isinstance(answer, tuple)
        devices += answer
    found = find(ask, inventory=Inventory(devices=tuple(devices)), training=False)
    return DeviceManager(found, open_device=lambda device: by_kind[device.kind], **rest)


# ---- This machine ------------------------------------------------------------------------------------------------


def test_the_snippet_of_the_documentation_runs_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    from pantheraml import get_device_manager

    device_mgr = get_device_manager()
    device = device_mgr.get_device()
    print(f"Using device: {device.name} ({device.device_type.value})")
    tensor = device_mgr.create_tensor([1, 2, 3, 4])
    config = get_device_manager(prefer="auto").get_batch_config(base_batch_size=1)
    print(config.batch_size, config.max_batch_size)

    assert tensor.tolist() == [1, 2, 3, 4] and str(tensor.device).partition(":")[0] == device.kind
    assert capsys.readouterr().out == f"Using device: {device.name} ({device.kind})\n{config.batch_size} None\n"


def test_the_cpu_is_found_asked_for_and_used() -> None:
    manager = get_device_manager(prefer="cpu")
    assert manager.get_device().device_type is DeviceType.CPU and manager.why == "prefer='cpu' asks for it"
    assert manager is not get_device_manager(prefer="cpu")  # arguments are honoured on every call
    tensor = manager.create_tensor([[1.5]], dtype=torch.float64)
    assert tensor.dtype == torch.float64 and manager.move_to_device(tensor, "cpu:0") is tensor
    manager.synchronize()
    assert manager.use("cpu").kind == "cpu" and manager.why == "use('cpu') asks for it"
    kinds = {absent.kind for absent in manager.absent} | {device.kind for device in manager.devices}
    assert kinds == {"tpu", "torch_tpu", "cuda", "xpu", "mps", "cpu"}


@pytest.mark.parametrize("asked", ["tpu", "tpu:0", "npu", "cpu:7"])
def test_what_is_not_here_is_an_error_that_lists_what_is(asked: str) -> None:
    manager = get_device_manager(prefer="cpu")
    if asked.startswith("tpu") and any(device.kind == "tpu" for device in manager.devices):
        pytest.skip("a TPU is here")
    for deed in (manager.get_device, manager.use, manager.memory, lambda name: manager.move_to_device(torch.ones(1), device_id=name)):
        with pytest.raises(DeviceError) as caught:
            deed(asked)
        assert "cpu:0" in str(caught.value) or "one of tpu, torch_tpu, cuda, xpu, mps, cpu" in str(caught.value)
    assert str(manager.get_device()) == "cpu:0"


def test_memory_is_that_of_the_process_and_the_machine() -> None:
    manager = get_device_manager(prefer="cpu")
    before = manager.memory()
    block = torch.ones(256 << 18)  # 256 MiB of float32
    during = manager.memory()
    assert before.used_bytes is not None and during.used_bytes is not None and during.peak_bytes is not None
    assert during.used_bytes - before.used_bytes == pytest.approx(256 << 20, rel=0.1)
    assert during.peak_bytes >= during.used_bytes and during.total_bytes == usable_memory()[0]
    assert during.reserved_bytes is None  # the CPU's allocator does not tell
    del block
    report = manager.memory_report()
    assert set(report["cpu:0"]) == {"total_bytes", "free_bytes", "used_bytes", "reserved_bytes", "peak_bytes"}


def test_optimize_memory_frees_what_only_garbage_holds_and_reports_before_and_after() -> None:
    manager = get_device_manager(prefer="cpu")

    class Ring:
        def __init__(self) -> None:
            self.block, self.me = torch.ones(512 << 18), self

    Ring()
    change = manager.optimize_memory()
    assert change.before.used_bytes is not None and change.after.used_bytes is not None
    assert change.before.used_bytes - change.after.used_bytes > 400 << 20
    assert change.freed_bytes is not None
    assert set(manager.clear_cache().after.__dataclass_fields__) == set(MemoryUse.__dataclass_fields__)


def test_alone_a_reduction_is_the_tensor_itself() -> None:
    manager = get_device_manager(prefer="cpu")
    manager.barrier()
    assert manager.all_reduce(torch.tensor([2.0]), "mean").tolist() == [2.0]
    with pytest.raises(ValueError, match="sum, mean, max or min"):
        manager.all_reduce(torch.tensor([2.0]), "product")


REDUCE = """
import sys
import torch.distributed
from pantheraml import get_device_manager
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
manager = get_device_manager(prefer="cpu")
manager.barrier()
print([manager.all_reduce(torch.tensor([rank + 1.0, 5.0]), op).tolist() for op in ("sum", "mean", "max", "min")])
torch.distributed.destroy_process_group()
"""


def test_two_processes_reduce_for_real(tmp_path: Path) -> None:
    words = [sys.executable, "-c", REDUCE]
    both = [subprocess.Popen([*words, rank, str(tmp_path / "store")], stdout=subprocess.PIPE, text=True) for rank in "01"]
    for process in both:
        said, _ = process.communicate(timeout=120)
        assert said == "[[3.0, 10.0], [1.5, 5.0], [2.0, 5.0], [1.0, 5.0]]\n"


def test_the_report_is_ready_for_json() -> None:
    import json

    manager = get_device_manager(prefer="cpu", usd_per_hour={"cpu": 0.04})
    report = json.loads(json.dumps(manager.report()))
    (cpu,) = [each for each in report["devices"] if each["id"] == "cpu:0"]
    assert report["device"] == "cpu:0" and cpu["price"] == {"usd_per_hour": 0.04, "source": "your own price"}
    assert cpu["memory"]["total_bytes"] == usable_memory()[0]


# ---- Machines that are not here ----------------------------------------------------------------------------------


def test_dynamic_switching_moves_what_follows() -> None:
    manager = machine(FakeBackend("cuda", count=2), FakeBackend("cpu"))
    assert str(manager.get_device()) == "cuda:0"
    assert str(manager.use("cuda:1")) == "cuda:1" and str(manager.get_device()) == "cuda:1"
    assert str(manager.get_device("gpu")) == "cuda:0"  # looking does not switch
    with pytest.raises(DeviceError, match="there is no cuda:2"):
        manager.use("cuda:2")
    assert str(manager.get_device()) == "cuda:1"


@pytest.mark.parametrize(
    ("kind", "base", "size"), [("tpu", 1, 128), ("tpu", 3, 512), ("tpu", 2, 256), ("cuda", 1, 4), ("cuda", 3, 16), ("cpu", 3, 3)]
)
def test_without_a_model_the_factor_speaks(kind: str, base: int, size: int) -> None:
    # 128 * 3 = 384 lies half-way between 256 and 512, 4 * 3 = 12 half-way between 8 and 16.
    config = machine(FakeBackend(kind)).get_batch_config(base)
    assert (config.batch_size, config.max_batch_size, config.decided_by) == (size, None, "factor")
    assert config.simulated and config.reason.endswith("the device is simulated")


def test_factors_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPUTE_TPU_BATCH_FACTOR", "32")
    assert machine(FakeBackend("tpu")).get_batch_config(1).batch_size == 32
    assert machine(FakeBackend("tpu"), ask=HardwareAsk(tpu_batch_factor=16)).get_batch_config(1).batch_size == 16
    for wrong in (0, 2.5, "4"):
        with pytest.raises(ValueError, match="a whole number of at least 1"):
            machine(FakeBackend("tpu")).get_batch_config(wrong)


@pytest.mark.parametrize(("number", "power"), [(1, 1), (2, 2), (3, 4), (5, 4), (6, 8), (127, 128), (95, 64), (96, 128)])
def test_nearest_power_of_two(number: int, power: int) -> None:
    assert nearest_power_of_two(number) == power


def test_with_a_model_the_planner_speaks_and_its_own_arithmetic_agrees() -> None:
    shape = decoder_shape()
    config = machine(FakeBackend("cuda")).get_batch_config(4, shape=shape, max_tokens=1024)

    def need(rows: int) -> int:
        return estimate_memory(
            shape,
            trainable_parameters=shape.lora_parameters(16),
            base_bytes_each=2,
            micro_tokens=rows * 1024,
            row_tokens=1024,
            levels=("keep",) * shape.layers,
            attention="sdpa",
            compute_bytes_each=2,
            lora_rank=16,
        ).total_bytes

    budget = 80 * GIB * 0.8
    assert config.decided_by == "planner" and config.max_batch_size is not None
    assert need(config.max_batch_size) <= budget < need(config.max_batch_size + 1)
    assert config.batch_size % 4 == 0 and config.max_batch_size - 4 < config.batch_size <= config.max_batch_size
    assert "the planner" in config.reason and "simulated" in config.reason


def test_a_model_that_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(DeviceError, match="not even one example of 2048 tokens of fake/8b fits on cuda:0") as caught:
        machine(FakeBackend("cuda", memory_bytes=8 * GIB)).get_batch_config(1, shape=llama_8b())
    assert "6." not in caught.value.what and "of 8.0 GiB free" in caught.value.why


@pytest.mark.parametrize(("each", "budget", "rows"), [(10, 9, 0), (10, 10, 1), (10, 99, 9), (10, 10_000, 1000), (7, 48, 6)])
def test_rows_that_fit_is_the_largest(each: int, budget: int, rows: int) -> None:
    assert rows_that_fit(lambda count: each * count, budget) == rows
    assert rows_that_fit(lambda count: 0, budget, most=37) == 37


def test_independent_batches_go_to_whichever_device_is_free() -> None:
    manager = machine(FakeBackend("cuda", count=2), FakeBackend("cpu"))
    slow_began, others_done = threading.Event(), threading.Event()
    took: dict[int, str] = {}

    def work(device: Device, batch: int) -> int:
        if device.index == 0 and not slow_began.is_set():  # the first batch of cuda:0 lasts until all others are done
            slow_began.set()
            took[batch] = str(device)
            assert others_done.wait(30)
            return batch * batch
        assert slow_began.wait(30)
        took[batch] = str(device)
        if len(took) == 8:
            others_done.set()
        return batch * batch

    assert manager.map(work, range(8)) == [batch * batch for batch in range(8)]
    assert sorted(took.values()) == ["cuda:0"] + ["cuda:1"] * 7


def test_map_carries_an_error_over_and_stops() -> None:
    done: list[int] = []

    def work(device: Device, batch: int) -> None:
        if batch == 1:
            raise KeyError("row 1")
        done.append(batch)
        time.sleep(0.001)

    with pytest.raises(KeyError, match="row 1"):
        machine(FakeBackend("cpu")).map(work, range(1000))
    assert done == [0]
    assert machine(FakeBackend("cpu")).map(work, []) == []


def test_choosing_weighs_measured_speed_against_your_price() -> None:
    fast, slow = FakeBackend("cuda", peak_flops=4e14), FakeBackend("xpu", peak_flops=1e14)
    manager = machine(fast, slow, usd_per_hour={"cuda": 8.0, "xpu:0": 1.0})
    work = Workload(flops=4e17)
    assert str(manager.choose(work).device) == "cuda:0"
    cheap = manager.choose(work, objective="cost")
    assert str(cheap.device) == "xpu:0" and cheap.cost_usd == pytest.approx(4000 / 3600)
    assert str(manager.choose(work, "time", budget_usd=1.5).device) == "xpu:0"
    assert manager.estimate(work, "cuda:0").cost_usd == pytest.approx(8 * 1000 / 3600)
    assert manager.cost(1800, "cuda").usd == 4.0
    manager.use(str(cheap.device))
    assert str(manager.get_device()) == "xpu:0"


def test_a_stand_in_has_no_price_and_no_speed_from_the_catalog() -> None:
    backend = FakeBackend("cuda", name="NVIDIA H100 80GB HBM3")
    manager = machine(backend)
    assert manager.price().usd_per_hour is None and manager.profile().flops_per_s is None
    assert manager.cost(10).usd is None
    with pytest.raises(DeviceError, match="no device can take this work"):
        manager.choose(Workload(flops=1.0))


def test_a_measurement_of_bench_goes_before_the_probe(tmp_path: Path) -> None:
    manager = get_device_manager(prefer="cpu")
    device = manager.get_device()
    assert manager.profile().flops_per_s == device.peak_flops
    figures = {
        "flops_per_s": 7e12,
        "matrix_size": 1024,
        "copy_bytes_per_s": 1e10,
        "copy_bytes": 1,
        "host_bytes_per_s": None,
        "launch_s": 1e-5,
        "threads": torch.get_num_threads(),
    }
    kept = Measured(device="cpu:0", name=device.name, dtype=device.dtypes[0], torch=torch.__version__, date="2026-01-01", **figures)
    remember(kept, tmp_path / "cache")
    profile = manager.profile()
    assert (profile.flops_per_s, profile.launch_s, profile.flops_source) == (7e12, 1e-5, "measured 2026-01-01")


def test_the_public_names_are_at_the_top() -> None:
    assert pantheraml.get_device_manager is get_device_manager and pantheraml.DeviceManager is DeviceManager
    assert isinstance(get_device_manager(prefer="cpu").backend(), CpuBackend)


def test_free_memory_is_asked_now_and_not_remembered() -> None:
    class Full(FakeBackend):
        def memory(self, index: int) -> MemoryUse:
            return replace(super().memory(index), free_bytes=0)

    manager = machine(Full("cuda", peak_flops=4e14))
    with pytest.raises(DeviceError, match="not even one example"):
        manager.get_batch_config(1, shape=decoder_shape())
    with pytest.raises(DeviceError) as caught:
        manager.choose(Workload(flops=1.0, memory_bytes=GIB))
    assert "0 KiB may be filled" in caught.value.why


def test_synchronize_waits_for_the_device_that_is_named() -> None:
    waited: list[int | None] = []

    class Counted(FakeBackend):
        def synchronize(self, index: int | None = None) -> None:
            waited.append(index)

    machine(Counted("cuda", count=2)).synchronize("cuda:1")
    assert waited == [1]


def test_prices_are_of_devices_and_amounts() -> None:
    ask = HardwareAsk(usd_per_hour=2.0)
    manager = machine(FakeBackend("cuda"), FakeBackend("cpu"), ask=ask)
    assert (manager.price("cuda").usd_per_hour, manager.price("cpu").usd_per_hour) == (2.0, None)
    assert manager.price("cpu").source == "simulated: nobody rents it"
    with pytest.raises(DeviceError, match="'cdua' is no name of a device"):
        machine(FakeBackend("cpu"), usd_per_hour={"cdua": 1.0})
    with pytest.raises(ValueError, match="an amount of dollars"):
        machine(FakeBackend("cpu"), usd_per_hour={"cpu": -1.0})
    for wrong in (-5.0, float("nan")):
        with pytest.raises(ValueError, match="a number of seconds"):
            manager.cost(wrong)


def test_errors_use_the_words_in_which_something_was_asked() -> None:
    manager = machine(FakeBackend("cpu"))
    with pytest.raises(DeviceError, match="device_id='cuda:1' asks for cuda, but no cuda device answered; here is cpu:0"):
        manager.use("cuda:1")
    if not any(device.kind == "cuda" for device in get_device_manager(prefer="cpu").devices):
        with pytest.raises(DeviceError, match="prefer='cuda:1' asks for cuda, but no cuda device answered; here is cpu:0"):
            get_device_manager(prefer="cuda:1")
    with pytest.raises(DeviceError, match="3 is no name of a device"):
        get_device_manager(prefer=3)
