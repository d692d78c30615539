"""A TPU through torch itself. None is here: its absence can be tried, what torch has can be looked up, and the CPU can do its sums."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.fakes import FakeBackend, fake_device, laptop

from pantheraml.api import _kind
from pantheraml.engines.open import loading_device, open_engine
from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware import detect as detect_module
from pantheraml.hardware import recovery, torch_tpu
from pantheraml.hardware.backend import backend_of, open_backend
from pantheraml.hardware.detect import detect
from pantheraml.hardware.device import Absent, Device, Inventory
from pantheraml.hardware.find import find
from pantheraml.hardware.placement import get_pytorch_device
from pantheraml.hardware.torch_tpu import TorchTpuBackend
from pantheraml.manager import get_device_manager
from pantheraml.models.load import read_shape
from pantheraml.planning.compile import choose_compile
from pantheraml.planning.levels import rungs
from pantheraml.planning.plan import make_plan
from pantheraml.planning.sharding import mesh_axes
from pantheraml.recipe.kinds import KINDS, kind_of, kinds_meant, torch_type
from pantheraml.recipe.load import recipe_from
from pantheraml.recipe.types import HardwareAsk

GIB = 1 << 30
ELSEWHERE = pytest.mark.skipif(torch.accelerator.is_available(), reason="torch has an accelerator")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_tpu, "find_spec", lambda name: name)


@pytest.fixture
def registered(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.accelerator as it is where torch_tpu found a chip; this torch cannot make a torch.device of that name."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="tpu"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)


class OnTheCpu(TorchTpuBackend):
    """The same, but tensors are the CPU's."""

    def torch_device(self, index: int) -> torch.device:
        return torch.device("cpu")


def chips(root: Path, *numbers: str) -> None:
    for index, number in enumerate(numbers):
        folder = root / f"sys/bus/pci/devices/0000:00:{index:02x}.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text("0x1ae0\n")
        (folder / "device").write_text(number + "\n")


# ---- Why there is none -----------------------------------------------------------------------------------------------


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_tpu, "find_spec", lambda name: None)
    absent = TorchTpuBackend().probe()
    assert isinstance(absent, Absent) and absent.kind == "torch_tpu" and not absent.seen
    assert "is not installed" in absent.why and "pip install torch_tpu" in absent.fix and "unproven" in absent.fix


@ELSEWHERE
def test_where_it_found_no_tpu(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)  # tests before may have left torch with another one
    chips(tmp_path, "0x006f")
    absent = TorchTpuBackend(root=tmp_path).probe()
    assert isinstance(absent, Absent) and "registered no TPU when torch was imported: torch's accelerator is none" in absent.why
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" in absent.fix
    assert [seen.name for seen in absent.seen] == ["TPU v6e"]


def test_a_runtime_that_does_not_start_is_found_before_a_tensor_would_abort(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "failed to retrieve the PjRt client: TPU initialization failed: No jellyfish device found.\nmore"  # torch_tpu 0.2.0

    def generator(device: torch.device) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch, "Generator", generator)
    monkeypatch.setattr(torch_tpu, "matmul_seconds", lambda *args: pytest.fail("a tensor was made"))
    absent = OnTheCpu().probe()
    assert isinstance(absent, Absent) and absent.why == f"it did not answer: {said.splitlines()[0]}"
    assert "it serves one at a time" in absent.fix


# ---- What one says ---------------------------------------------------------------------------------------------------


def test_a_chip_that_answers_is_described_and_says_that_it_is_unproven(
    registered: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chips(tmp_path, "0x006f", "0x006f")
    for name, answer in (
        ("synchronize", lambda index: None),
        ("empty_cache", lambda: None),
        ("get_memory_info", lambda index: (30 * GIB, 31 * GIB)),
        ("memory_stats", lambda index: {"allocated_bytes.all.current": GIB, "allocated_bytes.all.peak": 2 * GIB}),
    ):
        monkeypatch.setattr(torch.accelerator, name, answer)
    monkeypatch.setattr(torch_tpu, "_PROBE_SIZE", 64)
    backend = OnTheCpu(root=tmp_path)
    answered = backend.probe()
    assert isinstance(answered, tuple)
    (device,) = answered  # this process's; the other chip is another process's
    assert (str(device), device.name, device.capability) == ("torch_tpu:0", "TPU v6e", "v6e")
    assert (device.memory_bytes, device.free_bytes, device.dtypes) == (31 * GIB, 30 * GIB, ("bfloat16", "float32"))
    assert device.label == "TPU v6e (unproven)" and not device.simulated and device.peak_flops
    use = backend.memory(0)
    assert (use.used_bytes, use.peak_bytes, use.reserved_bytes) == (GIB, 2 * GIB, None)


@pytest.mark.parametrize("how", ["zero of zero", "an error"])
def test_memory_that_is_not_told_is_unknown(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(index: int) -> Any:
        raise RuntimeError("this allocator does not tell")

    monkeypatch.setattr(torch.accelerator, "get_memory_info", refuses if how == "an error" else lambda index: (0, 0))
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", refuses)
    use = TorchTpuBackend().memory(0)
    assert (use.total_bytes, use.free_bytes, use.used_bytes, use.reserved_bytes, use.peak_bytes) == (None,) * 5
    TorchTpuBackend().reset_peak(0)


UNDER_ITS_NAME = """
import types, torch
torch.utils.rename_privateuse1_backend("tpu")
torch._register_device_module("tpu", types.SimpleNamespace(get_amp_supported_dtype=lambda: [torch.bfloat16]))
torch.accelerator.current_device_index = lambda: 1
from pantheraml.hardware.torch_tpu import TorchTpuBackend
backend = TorchTpuBackend()
said = [str(backend.torch_device(1))]
try:
    backend.torch_device(0)
except ValueError as error:
    said.append(str(error))
for dtype in (torch.float32, torch.bfloat16):
    with backend.autocast(dtype):
        said.append(torch.is_autocast_enabled("tpu"))
print(said)
"""


def test_torch_takes_its_name_and_autocasts_under_it() -> None:
    # In a process of its own: a name that torch gave to a device stays.
    done = subprocess.run([sys.executable, "-c", UNDER_ITS_NAME], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == f"{['tpu:1', 'torch_tpu binds this process to the TPU of index 1, not 0', False, True]}\n", done.stderr


def test_it_takes_part_in_no_collective_and_computes_with_the_engine_of_torch() -> None:
    backend = TorchTpuBackend()
    assert (backend.collective, backend.quantizers, backend.engine, backend.static_shapes) == (None, (), "torch", True)
    assert (backend.pinned_memory, backend.recorder(0), backend.telemetry(0).power_w) == (False, None, None)


def test_torch_has_every_function_that_would_be_called() -> None:
    nodes = ast.walk(ast.parse(Path(torch_tpu.__file__).read_text()))
    written = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    names = sorted(name for name in written if re.fullmatch(r"torch\.accelerator\.\w+", name))
    assert len(names) > 5
    for name in names:
        reduce(getattr, name.split(".")[1:], torch)


# ---- Beside the TPU of JAX -------------------------------------------------------------------------------------------


class Counted(FakeBackend):
    def __init__(self) -> None:
        super().__init__("torch_tpu")
        self.asked = 0

    def probe(self) -> tuple[Device, ...] | Absent:
        self.asked += 1
        return super().probe()


NO_JAX = FakeBackend("tpu", absent=Absent(kind="tpu", why="jax is not installed", fix="install it"))


@pytest.mark.parametrize(
    ("tpu", "named", "asked"),
    [
        (FakeBackend("tpu"), "auto", 0),
        (FakeBackend("tpu"), "tpu", 0),
        (FakeBackend("tpu"), "torch_tpu", 1),
        (FakeBackend("tpu", dtypes=()), "auto", 1),  # JAX is here, but not torchax: nothing trains there
        (NO_JAX, "auto", 1),
    ],
)
def test_it_leaves_the_chips_to_jax_unless_it_is_named(monkeypatch: pytest.MonkeyPatch, tpu: FakeBackend, named: str, asked: int) -> None:
    mine = Counted()
    fakes = {"tpu": tpu, "torch_tpu": mine, "cpu": FakeBackend("cpu")}
    monkeypatch.setattr(detect_module, "open_backend", fakes.__getitem__)
    inventory = detect(fakes, named=named)
    assert mine.asked == asked
    if not asked:
        (absent,) = inventory.absent
        assert absent.kind == "torch_tpu" and "tpu:0 has answered, and the chips serve one library at a time" in absent.why
        assert "hardware.kind=torch_tpu" in absent.fix


def test_who_names_it_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes: dict[str, Any] = {kind: FakeBackend(kind, absent=Absent(kind=kind, why="no", fix="none")) for kind in KINDS}
    fakes |= {"tpu": FakeBackend("tpu"), "torch_tpu": FakeBackend("torch_tpu"), "cpu": FakeBackend("cpu")}
    monkeypatch.setattr(detect_module, "open_backend", fakes.__getitem__)
    assert str(find(HardwareAsk(kind="torch_tpu")).device) == "torch_tpu:0"
    assert str(find(HardwareAsk()).device) == str(find(HardwareAsk(kind="tpu")).device) == "tpu:0"
    assert str(get_device_manager(prefer="torch_tpu").get_device()) == "torch_tpu:0"
    assert str(get_device_manager().get_device()) == "tpu:0"
    assert get_pytorch_device("torch_tpu") == "tpu"  # torch's name


@ELSEWHERE
def test_named_and_not_here_is_refused_with_its_own_reason() -> None:
    with pytest.raises(DeviceError, match="no torch_tpu device answered") as caught:
        find(HardwareAsk(kind="torch_tpu"))
    assert "torch_tpu" in caught.value.why and "has answered" not in caught.value.why


def test_tpu_is_the_one_of_jax() -> None:
    assert kinds_meant("tpu") == ("tpu",) and kinds_meant("torch_tpu") == ("torch_tpu",)
    assert kinds_meant("auto")[:2] == ("tpu", "torch_tpu")
    assert (kind_of("tpu"), kind_of("cuda"), kind_of("meta")) == ("torch_tpu", "cuda", None)
    assert (torch_type("torch_tpu"), torch_type("cuda")) == ("tpu", "cuda")


def test_simulating_concerns_the_one_of_jax_alone() -> None:
    assert type(backend_of(fake_device("torch_tpu"))) is TorchTpuBackend
    assert not detect(["torch_tpu"], simulate_tpu=True).devices


def test_every_row_names_the_engine_of_its_backend() -> None:
    for kind, row in KINDS.items():
        assert open_backend(kind).engine == row.engine


# ---- Who goes by the kind --------------------------------------------------------------------------------------------


def test_the_accelerator_of_torch_that_is_called_tpu_is_this_one(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: SimpleNamespace(type="tpu"))
    current = recovery._current()
    assert current is not None and type(current[0]) is TorchTpuBackend and current[1] == 0


def test_a_model_is_on_the_device_itself_and_not_on_the_host() -> None:
    there = SimpleNamespace(device=SimpleNamespace(type="tpu"))
    assert _kind(there) == "torch_tpu"
    assert kind_of(there.device.type) == "torch_tpu"  # so it does not wait elsewhere for its device
    assert kind_of(loading_device(open_backend("tpu"), 0).type) == "cpu"  # as it does for JAX
    assert loading_device(OnTheCpu(), 0) == torch.device("cpu")


def test_several_together_are_refused() -> None:
    devices = tuple(fake_device("torch_tpu", index) for index in range(4))
    inventory = Inventory(devices=devices)
    assert mesh_axes(HardwareAsk(), devices[0], inventory)[0] == {}
    for asked in (HardwareAsk(devices="all"), HardwareAsk(devices=4), HardwareAsk(dp=2), HardwareAsk(fsdp=4)):
        with pytest.raises(DeviceError, match="several devices of kind torch_tpu cannot train together") as caught:
            mesh_axes(asked, devices[0], inventory)
        assert "through JAX" in caught.value.why


def test_the_plan_says_that_it_is_unproven_and_keeps_to_few_shapes() -> None:
    recipe = recipe_from({"model": "tiny:llama", "data": "x.jsonl", "hardware": {"kind": "torch_tpu"}})
    inventory = Inventory(devices=(fake_device("torch_tpu", name="TPU v6e"), *laptop().devices))
    plan = make_plan(
        recipe,
        inventory,
        read_shape(recipe.model),
        train_tokens=9_000,
        train_rows=100,
        longest_example=100,
        attention=TorchTpuBackend.attention,
        quantizers=(),
        available_threads=2,
    )
    assert str(plan.device) == "torch_tpu:0" and plan.device.label == "TPU v6e (simulated, unproven)"
    assert (plan.world_size, plan.mesh, len(plan.row_tokens), plan.compile, plan.graphs) == (1, {}, 1, False, False)
    assert set(plan.levels) <= {"keep", "all"}  # the model's own forward
    assert isinstance(open_engine(FakeBackend("torch_tpu", static_shapes=True), plan), TorchEngine)


def test_levels_and_compiling() -> None:
    device = fake_device("torch_tpu")
    assert rungs(device, "auto", fused=False) == ("keep", "all")
    with pytest.raises(RecipeError, match="checkpointing=tiled"):
        rungs(device, "tiled", fused=False)
    assert choose_compile("auto", device, fused=False, steps=5000) == (False, "it was never tried on torch_tpu:0")
