"""The chips of a TPU host, taken by this process: set up, asked, given back.

from pantheraml.distributed import MultiTPUConfig, setup_multi_tpu
from pantheraml.trainer import PantheraMLTPUTrainer

config = MultiTPUConfig(num_cores=8)
setup_multi_tpu(config)
trainer = PantheraMLTPUTrainer(tpu_config=config, model=model, tokenizer=tokenizer, train_dataset=dataset)
trainer.train()
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

from pantheraml.distributed.world import open_world
from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.backend import MemoryUse
from pantheraml.hardware.device import Device, Inventory
from pantheraml.hardware.settings import read_settings
from pantheraml.hardware.xla import XlaBackend
from pantheraml.hardware.xla_mesh import open_mesh
from pantheraml.planning.sharding import format_mesh, mesh_axes
from pantheraml.recipe.types import HardwareAsk

_log = logging.getLogger("pantheraml")


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

    def __post_init__(self) -> None:
        """Raises: RecipeError for what is no number of devices."""
        for name in ("num_cores", "dcn", "dp", "fsdp", "tp"):
            value: object = getattr(self, name)
            open_ended = value is None and name in ("num_cores", "fsdp")
            if not open_ended and not (type(value) is int and value > 0):
                raise RecipeError(
                    f"MultiTPUConfig({name}={value!r}) is no number of devices", why="there is at least one", fix=f"set {name} to 1 or more"
                )

    @property
    def simulated(self) -> bool:
        """Whether the CPU is to stand in, by this configuration or by the environment."""
        return bool(read_settings().simulate_tpu) if self.simulate is None else self.simulate

    def hardware(self) -> dict[str, Any]:
        """The same as keys of a recipe's `hardware`."""
        return {
            "kind": XlaBackend.kind,
            "devices": "auto" if self.num_cores is None else self.num_cores,
            "dcn": self.dcn,
            "dp": self.dp,
            "fsdp": "auto" if self.fsdp is None else self.fsdp,
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

    On a slice of several hosts, each of them calls it, and waits for the others.
    Raises: DeviceError if there are none, or fewer than asked for; RecipeError if the axes do not fit the number.
    """
    config = MultiTPUConfig() if config is None else config
    if not isinstance(config, MultiTPUConfig):
        raise RecipeError(
            f"setup_multi_tpu({config!r}) is not possible", why="it takes a MultiTPUConfig", fix="pass MultiTPUConfig(num_cores=8)"
        )
    devices = probed(config)
    ask = HardwareAsk.model_validate(config.hardware())
    axes, _ = mesh_axes(ask, devices[0], Inventory(devices=devices))
    open_world(devices[0], _log.warning)
    mesh = open_mesh(axes, simulate=config.simulated, cache=read_settings().cache)
    _opened.backend, _opened.mesh = XlaBackend(simulate=config.simulated), mesh
    here = mesh.size // devices[0].hosts
    _opened.devices = tuple(replace(devices[min(index, len(devices) - 1)], index=index) for index in range(here))
    return get_tpu_status()


def probed(config: MultiTPUConfig) -> tuple[Device, ...]:
    """The devices of this host. Raises: DeviceError if there are none."""
    answer = XlaBackend(simulate=config.simulated).probe()
    if not isinstance(answer, tuple):
        simulated = "; or let the CPU stand in: MultiTPUConfig(simulate=True)"
        raise DeviceError("no TPU answered", why=answer.why, fix=answer.fix + simulated)
    return answer


def cleanup_multi_tpu() -> None:
    """Forget the set-up. The chips stay with this process until it ends: JAX gives them back then."""
    _opened.backend, _opened.devices, _opened.mesh = None, (), None


def get_tpu_status() -> dict[str, Any]:
    """What is set up: `ready`, `devices` (how many, on all hosts), `hosts`, `mesh`, `name`, `topology`, `simulated`."""
    devices = _opened.devices
    return {
        "ready": bool(devices),
        "devices": _opened.mesh.size if devices else 0,
        "hosts": devices[0].hosts if devices else None,
        "mesh": format_mesh(dict(_opened.mesh.shape)) if devices else None,
        "name": devices[0].label if devices else None,
        "topology": devices[0].topology if devices else None,
        "simulated": devices[0].simulated if devices else None,
    }


def get_tpu_device(index: int = 0) -> Device:
    """The facts of one device of this host. Raises: DeviceError if it is not set up."""
    ready()
    if not 0 <= index < len(_opened.devices):
        raise DeviceError(
            f"there is no {XlaBackend.kind}:{index}",
            why=f"{len(_opened.devices)} devices of this host are set up",
            fix=f"ask for 0 to {len(_opened.devices) - 1}",
        )
    return _opened.devices[index]


def synchronize_tpu() -> None:
    """Wait until the devices have done what they were given. Raises: DeviceError if none is set up."""
    ready().synchronize()


def get_tpu_memory_info(index: int = 0) -> dict[str, int | None]:
    """Bytes on one device; None where JAX does not tell. Keys: those of `MemoryUse`. Of simulated devices, the process's memory."""
    use: MemoryUse = ready().memory(get_tpu_device(index).index)
    return asdict(use)


def ready() -> XlaBackend:
    """The backend of what is set up. Raises: DeviceError if nothing is."""
    if _opened.backend is None:
        raise DeviceError("no TPU is set up", why="setup_multi_tpu has not been called in this process", fix="call setup_multi_tpu() first")
    return _opened.backend
