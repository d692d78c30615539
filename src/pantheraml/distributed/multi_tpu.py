"""The chips of a TPU host, taken by this process: set up, asked, given back.

from pantheraml.distributed import MultiTPUConfig, setup_multi_tpu
from pantheraml.trainer import PantheraMLTPUTrainer

config = MultiTPUConfig(num_cores=8)
setup_multi_tpu(config)
trainer = PantheraMLTPUTrainer(tpu_config=config, model=model, tokenizer=tokenizer, train_dataset=dataset)
trainer.train()
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from pantheraml.errors import DeviceError
from pantheraml.hardware.backend import MemoryUse
from pantheraml.hardware.device import Device, Inventory
from pantheraml.hardware.settings import read_settings
from pantheraml.hardware.xla import XlaBackend
from pantheraml.hardware.xla_mesh import open_mesh
from pantheraml.planning.sharding import format_mesh, mesh_axes
from pantheraml.recipe.types import HardwareAsk


@dataclass(frozen=True, slots=True)
class MultiTPUConfig:
    """How many chips work together, and how they share the work; see docs/tpu.md.

    Attributes:
        num_cores: devices as JAX counts them: chips, or on v2, v3 and 7x cores of them. None: all that are here.
        dcn, dp, fsdp, tp: devices along each axis; fsdp None: what the others leave.
        simulate: let XLA's CPU devices stand in for a TPU, and say so everywhere. None: as PANTHERAML_SIMULATE_TPU says.
    """

    num_cores: int | None = None
    dcn: int = 1
    dp: int = 1
    fsdp: int | None = None
    tp: int = 1
    simulate: bool | None = None

    @property
    def simulated(self) -> bool:
        """Whether the CPU is to stand in, by this configuration or by the environment."""
        return bool(read_settings().simulate_tpu) if self.simulate is None else self.simulate

    def hardware(self) -> dict[str, Any]:
        """The same as keys of a recipe's `hardware`."""
        return {
            "kind": XlaBackend.kind,
            "devices": self.num_cores or "auto",
            "dcn": self.dcn,
            "dp": self.dp,
            "fsdp": self.fsdp or "auto",
            "tp": self.tp,
            "simulate_tpu": self.simulated,
        }


@dataclass(slots=True)
class _Opened:
    """What this process has set up; one at a time."""

    backend: XlaBackend | None = None
    devices: tuple[Device, ...] = ()
    mesh: Any = None


_opened = _Opened()


def setup_multi_tpu(config: MultiTPUConfig | None = None) -> dict[str, Any]:
    """Take the chips for this process, and say what they are: `get_tpu_status`. Training does it by itself as well.

    Raises: DeviceError if there are none, or fewer than asked for; RecipeError if the axes do not fit the number.
    """
    config = config or MultiTPUConfig()
    backend = XlaBackend(simulate=config.simulated)
    answer = backend.probe()
    if not isinstance(answer, tuple):
        simulated = "; or let the CPU stand in: MultiTPUConfig(simulate=True)"
        raise DeviceError("no TPU answered", why=answer.why, fix=answer.fix + simulated)
    ask = HardwareAsk.model_validate(config.hardware())
    axes, _ = mesh_axes(ask, answer[0], Inventory(devices=answer))
    mesh = open_mesh(axes, simulate=config.simulated, cache=read_settings().cache)
    _opened.backend, _opened.mesh = backend, mesh
    _opened.devices = tuple(replace(answer[min(index, len(answer) - 1)], index=index) for index in range(mesh.size))
    return get_tpu_status()


def cleanup_multi_tpu() -> None:
    """Forget the set-up. The chips stay with this process until it ends: JAX gives them back then."""
    _opened.backend, _opened.devices, _opened.mesh = None, (), None


def get_tpu_status() -> dict[str, Any]:
    """What is set up: `ready`, `devices` (how many), `mesh`, `name`, `topology`, `simulated`."""
    devices = _opened.devices
    return {
        "ready": bool(devices),
        "devices": len(devices),
        "mesh": format_mesh(dict(_opened.mesh.shape)) if devices else None,
        "name": devices[0].label if devices else None,
        "topology": devices[0].topology if devices else None,
        "simulated": devices[0].simulated if devices else None,
    }


def get_tpu_device(index: int = 0) -> Device:
    """The facts of one device. Raises: DeviceError if it is not set up."""
    _ready()
    if not 0 <= index < len(_opened.devices):
        raise DeviceError(
            f"there is no {XlaBackend.kind}:{index}",
            why=f"{len(_opened.devices)} devices are set up",
            fix=f"ask for 0 to {len(_opened.devices) - 1}",
        )
    return _opened.devices[index]


def synchronize_tpu() -> None:
    """Wait until the devices have done what they were given. Raises: DeviceError if none is set up."""
    _ready().synchronize()


def get_tpu_memory_info(index: int = 0) -> dict[str, int | None]:
    """Bytes on one device; None where JAX does not tell. Keys: those of `MemoryUse`. Of simulated devices, the process's memory."""
    use: MemoryUse = _ready().memory(get_tpu_device(index).index)
    return asdict(use)


def _ready() -> XlaBackend:
    if _opened.backend is None:
        raise DeviceError("no TPU is set up", why="setup_multi_tpu has not been called in this process", fix="call setup_multi_tpu() first")
    return _opened.backend
