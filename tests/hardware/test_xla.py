"""No TPU is here. What JAX and libtpu say on machines that have one is taken from their logs; JAX itself is asked on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pantheraml.errors import DeviceError
from pantheraml.hardware import xla
from pantheraml.hardware.detect import detect
from pantheraml.hardware.device import Absent, Device
from pantheraml.hardware.tpu import TpuEnvironment, device_files, duty_cycle, seen_on_pci
from pantheraml.hardware.xla import Answer, Core, XlaBackend, ask_apart

GIB = 1 << 30
NOTHING = TpuEnvironment.model_construct()
VARIABLES = [str(field.validation_alias) for field in TpuEnvironment.model_fields.values()]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that are here; a test changes it."""
    here = {"jax", "libtpu"}
    monkeypatch.setattr(xla, "installed", here.__contains__)
    return here


def no_answer(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    monkeypatch.setattr(xla, "ask_apart", lambda platform: Answer(version="0.10.2", error=error))


def backend(tmp_path: Path, **environment: str) -> XlaBackend:
    return XlaBackend(environment=TpuEnvironment(**environment), root=tmp_path)


def absent(answer: tuple[Device, ...] | Absent) -> Absent:
    assert isinstance(answer, Absent)
    return answer


def chip(kind: str, x: int, y: int, z: int = 0, core: int = 0, **more: int) -> Core:
    return Core(device_kind=kind, coords=(x, y, z), core_on_chip=core, **more)


def answer(*cores: Core) -> Answer:
    return Answer(version="0.10.2", cores=cores, slice_coords=tuple(core.coords for core in cores if core.coords))


def plug_in(tmp_path: Path, *numbers: str, vendor: str = "0x1ae0") -> None:
    for index, number in enumerate(numbers):
        folder = tmp_path / f"sys/bus/pci/devices/0000:00:{index:02x}.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(number + "\n")


# ---- What a TPU says -------------------------------------------------------------------------------------------------


def test_a_v5e_host_of_eight_chips() -> None:
    # bytes_limit and bytes_in_use as memory_stats() gave them in a Kaggle notebook on a v5e-8.
    places = [(x, y) for y in range(4) for x in range(2)]
    cores = [chip("TPU v5 lite", x, y, bytes_limit=16909332480, bytes_in_use=1961653248) for x, y in places]
    devices = XlaBackend(environment=NOTHING).describe(answer(*cores))
    assert [str(device) for device in devices] == [f"tpu:{index}" for index in range(8)]
    assert {device.name for device in devices} == {"TPU v5 lite"}
    assert {(device.memory_bytes, device.free_bytes) for device in devices} == {(16909332480, 16909332480 - 1961653248)}
    assert {(device.capability, device.cores, device.topology) for device in devices} == {("v5e", 1, "2x4")}
    assert not any(device.simulated for device in devices)


def test_a_colab_chip_is_one_whatever_the_variables_say() -> None:
    # Colab sets TPU_ACCELERATOR_TYPE=v5e-1 and TPU_CHIPS_PER_HOST_BOUNDS=2,2,1 together.
    said = TpuEnvironment(accelerator_type="v5e-1", chips_per_host_bounds="2,2,1", host_bounds="1,1,1")
    (device,) = XlaBackend(environment=said).describe(answer(chip("TPU v5 lite", 0, 0, bytes_limit=16909332480)))
    assert device.topology == "1x1"


def test_without_megacore_the_cores_of_a_chip_share_its_memory() -> None:
    cores = [chip("TPU v3", x, y, core=core) for y in range(2) for x in range(2) for core in range(2)]
    devices = XlaBackend(environment=NOTHING).describe(answer(*cores))
    assert len(devices) == 8
    # Google: v3 has 32 GiB and 2 TensorCores a chip; a v3-8 is 2x2 chips.
    assert {(device.memory_bytes, device.cores, device.capability, device.topology) for device in devices} == {(16 * GIB, 1, "v3", "2x2")}


@pytest.mark.parametrize(
    ("kind", "memory_gib", "cores", "generation", "topology"),
    # Memory and TensorCores of a chip as Google's pages give them; v4 and v5p show one device a chip (megacore).
    [("TPU v4", 32, 2, "v4", "2x2x1"), ("TPU v5", 95, 2, "v5p", "2x2x1"), ("TPU v6 lite", 32, 1, "v6e", "2x2")],
)
def test_what_jax_does_not_tell_comes_from_the_catalog(kind: str, memory_gib: int, cores: int, generation: str, topology: str) -> None:
    chips = [chip(kind, x, y) for y in range(2) for x in range(2)]
    for device in XlaBackend(environment=NOTHING).describe(answer(*chips)):
        assert (device.memory_bytes, device.cores) == (memory_gib * GIB, cores)
        assert (device.capability, device.topology) == (generation, topology)


def test_the_topology_is_that_of_the_whole_slice() -> None:
    whole = tuple((x, y, z) for z in range(4) for y in range(2) for x in range(2))
    here = Answer(cores=tuple(chip("TPU v4", *place) for place in whole[:4]), slice_coords=whole)
    assert {device.topology for device in XlaBackend(environment=NOTHING).describe(here)} == {"2x2x4"}


def test_where_jax_gives_no_places_the_variables_tell_the_topology() -> None:
    alone = Answer(cores=(Core(device_kind="TPU v4"),))
    # Of a v4-256: TOPOLOGY is 4x4x8, from CHIPS_PER_HOST_BOUNDS 2,2,1 and HOST_BOUNDS 2,2,8.
    bounds = TpuEnvironment(chips_per_host_bounds="2,2,1", host_bounds="2,2,8")
    assert XlaBackend(environment=bounds).describe(alone)[0].topology == "4x4x8"
    assert XlaBackend(environment=TpuEnvironment(topology="4x4x8")).describe(alone)[0].topology == "4x4x8"
    assert XlaBackend(environment=TpuEnvironment(chips_per_host_bounds="what?")).describe(alone)[0].topology is None


def test_the_memory_of_a_tpu_is_unknown_where_nobody_knows_it() -> None:
    (device,) = XlaBackend(environment=NOTHING).describe(answer(chip("TPU v99", 0, 0)))
    assert (device.memory_bytes, device.free_bytes) == (None, None)
    (device,) = XlaBackend(environment=NOTHING).describe(answer(chip("TPU v99", 0, 0, bytes_limit=GIB)))
    assert (device.memory_bytes, device.capability, device.cores) == (GIB, None, None)


def test_the_duty_cycle_is_that_of_the_devices_chip() -> None:
    data = ["45.32", "47.11", "0.00", "100.0"]  # the form in Google's page on the TPU monitoring library
    assert [duty_cycle(data, index, 4) for index in range(4)] == pytest.approx([0.4532, 0.4711, 0.0, 1.0])
    assert [duty_cycle(data, index, 8) for index in (0, 1, 2, 7)] == pytest.approx([0.4532, 0.4532, 0.4711, 1.0])
    assert duty_cycle([], 0, 4) is None
    assert duty_cycle(["N/A"] * 4, 0, 4) is None
    assert duty_cycle(data, 0, 6) is None


# ---- Why there is none -----------------------------------------------------------------------------------------------


def test_where_nothing_points_to_a_tpu_jax_is_not_started(tmp_path, installed, monkeypatch) -> None:
    installed.remove("libtpu")
    monkeypatch.setattr(xla, "ask_apart", lambda platform: pytest.fail("JAX was asked"))
    why = absent(backend(tmp_path).probe())
    assert why.why.startswith("nothing points to one")
    assert "machine with a TPU" in why.fix


def test_without_jax(tmp_path, installed) -> None:
    installed.clear()
    why = absent(backend(tmp_path).probe())
    assert (why.why, why.seen) == ("jax is not installed, and XLA is reached through it", ())
    assert why.fix.startswith('pip install "pantheraml[tpu]"')
    simulated = absent(XlaBackend(simulate=True, environment=NOTHING, root=tmp_path).probe())
    assert simulated.why == why.why


def test_a_variable_alone_makes_no_device(tmp_path, installed, monkeypatch) -> None:
    # libtpu 0.0.42 on a machine without a TPU.
    error = "Unable to initialize backend 'tpu': NOT_FOUND: TPU initialization failed: No jellyfish device found."
    no_answer(monkeypatch, error)
    why = absent(backend(tmp_path, accelerator_type="v5litepod-8", worker_id="0").probe())
    assert why.why == (f"TPU_ACCELERATOR_TYPE=v5litepod-8 and TPU_WORKER_ID=0 are set, but XLA here runs on the CPU; libtpu says: {error}")
    assert why.fix.endswith("or unset TPU_ACCELERATOR_TYPE")
    assert absent(backend(tmp_path).probe()).why.startswith("XLA here runs on the CPU; libtpu says:")


def test_a_variable_without_libtpu(tmp_path, installed) -> None:
    installed.remove("libtpu")
    why = absent(backend(tmp_path, name="local").probe())
    assert why.why == "TPU_NAME=local is set, but libtpu is not installed, so XLA here runs on the CPU"
    assert why.fix.startswith('pip install "pantheraml[tpu]"')


def test_the_chips_that_the_driver_lists_are_told(tmp_path, installed) -> None:
    plug_in(tmp_path, "0x0063", "0x0063", "0x0042")  # two v5e, and a network card of Google's
    installed.remove("libtpu")
    why = absent(backend(tmp_path).probe())
    assert why.why.startswith("the driver lists 2 x TPU v5e, but libtpu is not installed")
    assert [(seen.index, seen.name, seen.capability, seen.memory_bytes) for seen in why.seen] == [
        (0, "TPU v5e", "v5e", None),
        (1, "TPU v5e", "v5e", None),
    ]


def test_another_vendors_card_is_no_chip(tmp_path) -> None:
    plug_in(tmp_path, "0x0063", vendor="0x10de")
    assert seen_on_pci(tmp_path / "sys/bus/pci/devices") == ()
    assert seen_on_pci(tmp_path / "nowhere") == ()


def test_v2_and_v3_share_a_number(tmp_path) -> None:
    plug_in(tmp_path, "0x0027")
    (seen,) = seen_on_pci(tmp_path / "sys/bus/pci/devices")
    assert (seen.name, seen.capability) == ("TPU v2 or v3", None)


def test_a_tpu_that_another_process_holds(tmp_path, installed, monkeypatch) -> None:
    no_answer(
        monkeypatch, "ABORTED: The TPU is already in use by process with pid 176028. Not attempting to load libtpu.so in this process."
    )
    plug_in(tmp_path, "0x005e")
    why = absent(backend(tmp_path).probe())
    assert "pid 176028" in why.why
    assert why.fix == "stop the other process that uses the TPU: it serves one at a time"


def test_jax_kept_from_the_tpu(tmp_path, installed, monkeypatch) -> None:
    monkeypatch.setattr(xla, "ask_apart", lambda platform: pytest.fail("JAX was asked"))
    why = absent(backend(tmp_path, name="local", platforms="cpu").probe())
    assert why.why == "TPU_NAME=local is set, but JAX_PLATFORMS=cpu keeps JAX from it"
    assert why.fix.startswith("unset JAX_PLATFORMS")


def test_device_files(tmp_path) -> None:
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio/vfio").touch()  # every machine with the vfio module has this
    assert not device_files(tmp_path)
    (tmp_path / "vfio/3").touch()
    assert device_files(tmp_path)


def test_the_environment_is_read_once_and_empty_is_not_set(monkeypatch) -> None:
    # As on a GPU runtime of Colab, which sets COLAB_TPU_1VM to nothing.
    monkeypatch.setenv("COLAB_TPU_1VM", "")
    assert TpuEnvironment().set_variables() == ()
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    said = TpuEnvironment()
    assert said.set_variables() == ("TPU_ACCELERATOR_TYPE=v5litepod-8",)
    assert said.platforms == "cpu"
    with pytest.raises(ValueError, match="frozen"):
        said.name = "other"


# ---- JAX, really -----------------------------------------------------------------------------------------------------


def test_jax_computes_in_a_process_of_its_own() -> None:
    said = ask_apart("cpu")
    assert said.error is None
    assert [core.device_kind for core in said.cores] == ["cpu"]
    assert said.slice_coords == ()
    assert "jax" not in sys.modules


def test_a_platform_that_is_not_there_says_why(monkeypatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    said = ask_apart("tpu")
    assert said.cores == ()
    assert said.error == "Unknown backend tpu. Available backends are ['cpu']"


def test_a_tpu_that_does_not_answer_in_time() -> None:
    said = ask_apart("cpu", within_s=0.01)
    assert said.error is not None
    assert said.error.startswith("no answer within 0.01 s")


def test_a_process_that_breaks(tmp_path, monkeypatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'F0000 libtpu: chip is gone' >&2\nkill -ABRT $$\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    assert ask_apart("tpu").error == "the process that asked JAX ended with -6: F0000 libtpu: chip is gone"


def test_a_simulated_tpu_says_so() -> None:
    inventory = detect(["tpu"], simulate_tpu=True)
    (device,) = inventory.devices
    assert (str(device), device.simulated, device.dtypes, device.peak_flops) == ("tpu:0", True, ("float32", "bfloat16"), None)
    assert device.name.startswith("XLA ")
    assert " on " in device.name
    assert device.label.endswith("(simulated)")
    assert (device.capability, device.cores, device.topology) == (None, None, None)


def test_nothing_is_simulated_unasked() -> None:
    assert all(device.kind != "tpu" or not device.simulated for device in detect(["tpu"]).devices)
    assert detect(["cpu"], simulate_tpu=True).devices[0].kind == "cpu"


IN_ONE_PROCESS = """
import json, os, sys
from pantheraml.hardware.xla import XlaBackend, ask_here
said = {}
backend = XlaBackend(simulate=True)
said["before"] = [backend.memory(0).used_bytes, backend.memory(0).total_bytes, backend.telemetry(0).utilization]
backend.synchronize()
said["jax loaded by that"] = "jax" in sys.modules
before = dict(os.environ)
said["apart"] = [device.name for device in backend.probe()]
said["changed by that"] = ["jax" in sys.modules, dict(os.environ) != before]
import jax
said["here"] = [str(device) for device in backend.probe()]
backend.synchronize()
said["after"] = [backend.memory(1).used_bytes, backend.telemetry(1).utilization]
said["real"] = XlaBackend().memory(0).used_bytes
import numpy
numpy.full = lambda *args: numpy.ones(args[0], numpy.float32) / 4
said["wrong"] = ask_here("cpu").error
print(json.dumps(said))
"""


def test_one_process_with_two_devices_of_xla(monkeypatch) -> None:
    # In a process of its own: JAX stays in the one that imports it, and warns at every fork from then on.
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = subprocess.run([sys.executable, "-c", IN_ONE_PROCESS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    used, total, utilization = said["before"]
    assert 0 < used < total  # of the process: XLA tells nothing of the CPU's memory
    assert utilization is None
    assert said["jax loaded by that"] is False
    assert len(said["apart"]) == 2
    assert said["changed by that"] == [False, False]
    assert said["here"] == ["tpu:0", "tpu:1"]
    assert said["after"][0] > 0
    assert said["real"] is None  # no TPU was started in this process
    assert said["wrong"].endswith("multiplied matrices wrongly")


# ---- What torch cannot do there --------------------------------------------------------------------------------------


def test_torch_has_no_device_there() -> None:
    with pytest.raises(DeviceError) as error:
        XlaBackend(environment=NOTHING).torch_device(1)
    assert error.value.what == "tpu:1 is no device of torch"
    assert "through JAX" in error.value.why
    with pytest.raises(DeviceError):
        XlaBackend(environment=NOTHING).autocast(torch.bfloat16)
    with XlaBackend(environment=NOTHING).autocast(torch.float32):
        assert not torch.is_autocast_enabled("cpu")


def test_what_torch_does_beside_it() -> None:
    backend = XlaBackend(environment=NOTHING)
    assert backend.set_threads(None) == torch.get_num_threads()
    backend.seed(7)
    first = torch.rand(3)
    backend.seed(7)
    assert torch.equal(first, torch.rand(3))
