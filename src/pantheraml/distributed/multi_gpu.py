"""Several GPUs, or several processes on a CPU, that torchrun has started: joined by this process, and left.

from pantheraml.distributed import MultiGPUConfig, cleanup_distributed_training, setup_distributed_training

state = setup_distributed_training(MultiGPUConfig(num_gpus=2))
if state.is_first:
    print(f"{state.world_size} processes, this one on {state.device}")
cleanup_distributed_training()
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pantheraml.distributed.world import open_world
from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.backend import backend_of
from pantheraml.hardware.device import Device, parse_device
from pantheraml.hardware.find import Found, find, find_own
from pantheraml.hardware.processes import read_processes
from pantheraml.recipe.kinds import KINDS
from pantheraml.recipe.types import HardwareAsk

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("pantheraml")
_PARALLEL = ("auto", "ddp", "fsdp", "cp", "tp", "fsdp_tp")


@dataclass(frozen=True, slots=True)
class MultiGPUConfig:
    """How several devices, one process each, share the work; see docs/distributed.md. What is left out, the recipe or the plan says.

    Attributes:
        backend: what carries tensors between the devices: nccl on CUDA, xccl on XPU, gloo on the CPU. None: that; another one is an error.
        init_method: None or "env://": torchrun has said where the processes meet.
        timeout_minutes: so long the processes wait for one of them, before all end; as the first of them to be set up says.
        auto_device_map: the plan says where the weights lie: a copy on each device, or parts where that does not fit. False: a copy on each.
        tensor_parallel: the devices share the products, all of them or as many as `tensor_parallel_size` says.
        pipeline_parallel: is not built, so it must be False.
        use_gradient_checkpointing: compute layers again in backward (True) or never (False). None: where memory needs it.
        find_unused_parameters: may be anything: what a step, or one process's share of it, does not use has a gradient of zero. What no process
            uses in the first step is an error, since it would never train.
        num_gpus: devices in all, over all machines. None: as many as processes were started.
        data_parallel_size: copies of the model. 1 leaves it open.
        tensor_parallel_size: devices that share the products. 1 leaves it open.
        pipeline_parallel_size: is not built, so it must be 1.
        parallel: how the devices share the work, as hardware.parallel of a recipe: auto, ddp, fsdp, cp, tp or fsdp_tp.
    """

    backend: str | None = None
    init_method: str | None = None
    timeout_minutes: float | None = None
    auto_device_map: bool = True
    tensor_parallel: bool = False
    pipeline_parallel: bool = False
    use_gradient_checkpointing: bool | None = None
    find_unused_parameters: bool = False
    num_gpus: int | None = None
    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    parallel: str = "auto"

    def __post_init__(self) -> None:
        """Raises: RecipeError for a value that cannot be, or two that contradict each other."""
        for name in ("num_gpus", "data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size"):
            value: object = getattr(self, name)
            if not (name == "num_gpus" and value is None) and not (type(value) is int and value > 0):
                raise _wrong(f"{name}={value!r}", "is no number of devices", "there is at least one", f"set {name} to 1 or more")
        for name in ("auto_device_map", "tensor_parallel", "pipeline_parallel", "use_gradient_checkpointing", "find_unused_parameters"):
            value = getattr(self, name)
            if not (name == "use_gradient_checkpointing" and value is None) and type(value) is not bool:
                raise _wrong(f"{name}={value!r}", "is neither True nor False", "it is switched on or off", f"set {name} to True or False")
        if self.pipeline_parallel or self.pipeline_parallel_size > 1:
            said = f"pipeline_parallel_size={self.pipeline_parallel_size}" if self.pipeline_parallel_size > 1 else "pipeline_parallel=True"
            why = "layers that wait for each other on different devices are not built here"
            raise _wrong(said, "is not possible", why, 'set parallel="fsdp", which divides the weights of any model')
        if self.init_method not in (None, "env://"):
            why = "where the processes meet is said by torchrun, in MASTER_ADDR and MASTER_PORT"
            raise _wrong(f"init_method={self.init_method!r}", "is not possible", why, "leave it out, and start the script with torchrun")
        minutes: object = self.timeout_minutes
        if minutes is not None and not (type(minutes) in (int, float) and 0 < float(str(minutes)) < float("inf")):
            raise _wrong(f"timeout_minutes={minutes!r}", "is no time", "the processes wait for each other so long", "set it to 10, say")
        if self.parallel not in _PARALLEL:
            raise _wrong(f"parallel={self.parallel!r}", "is not known", f"these are: {', '.join(_PARALLEL)}", "choose one of them")
        self._check_together()

    def _check_together(self) -> None:
        axes = self.data_parallel_size * self.tensor_parallel_size
        if self.num_gpus is not None and self.num_gpus % axes:
            sizes = f"data_parallel_size={self.data_parallel_size} and tensor_parallel_size={self.tensor_parallel_size}"
            why = f"together they ask for {axes} devices, or a multiple of that"
            raise _wrong(f"num_gpus={self.num_gpus}", f"does not go with {sizes}", why, f"set num_gpus to {axes}, or leave it out")
        tensor = self.tensor_parallel or self.tensor_parallel_size > 1
        if tensor and self.parallel in ("ddp", "fsdp", "cp"):
            why = "one of them says that products are shared, and the other that they are not"
            raise _wrong(f"parallel={self.parallel!r}", "contradicts tensor parallelism", why, 'set parallel to "tp" or "fsdp_tp"')
        if not self.auto_device_map and (tensor or self.parallel not in ("auto", "ddp")):
            said = "tensor parallelism" if tensor else f"parallel={self.parallel!r}"
            why = "without a device map each device has a copy of the whole model"
            raise _wrong("auto_device_map=False", f"contradicts {said}", why, "leave auto_device_map out")

    def hardware(self) -> dict[str, Any]:
        """The same as keys of a recipe's `hardware`: those of which something is said."""
        parallel = self.parallel
        if parallel == "auto" and self.tensor_parallel and self.tensor_parallel_size == 1:
            parallel = "tp"
        if parallel == "auto" and not self.auto_device_map:
            parallel = "ddp"
        checkpointing = None if self.use_gradient_checkpointing is None else "on" if self.use_gradient_checkpointing else "off"
        keys = {
            "devices": self.num_gpus,
            "parallel": None if parallel == "auto" else parallel,
            "dp": None if self.data_parallel_size == 1 else self.data_parallel_size,
            "tp": None if self.tensor_parallel_size == 1 else self.tensor_parallel_size,
            "checkpointing": checkpointing,
            "timeout_s": None if self.timeout_minutes is None else 60.0 * self.timeout_minutes,
        }
        return {key: value for key, value in keys.items() if value is not None}


def _wrong(said: str, what: str, why: str, fix: str) -> RecipeError:
    return RecipeError(f"MultiGPUConfig({said}) {what}", why=why, fix=fix)


@dataclass(frozen=True, slots=True)
class DistributedState:
    """This process among those that train together.

    Attributes:
        rank: from 0, of `world_size` processes in all. local_rank: among those of this machine.
        device: what it computes on. backend: what carries tensors between the devices; None: there is one process.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str | None

    @property
    def is_first(self) -> bool:
        """Whether this process says what happens, and writes what is to be kept."""
        return self.rank == 0


def setup_distributed_training(config: MultiGPUConfig | None = None, *, device: str = "auto") -> DistributedState:
    """Join the processes that torchrun has started; all of them call it, and wait for each other. `Trainer` does it by itself as well.

    A second call finds what is there already. Without torchrun there is one process, and nothing to join.

    Args:
        device: a kind, of which each process takes its own ("cuda", "cpu"), or one device ("cuda:1"); "auto": the best that answers but a TPU.
    Raises: RecipeError if the configuration does not fit the number of processes or the device; DeviceError if there are fewer devices than
        processes, or one of the others does not come.
    """
    config = MultiGPUConfig() if config is None else config
    if not isinstance(config, MultiGPUConfig):
        raise RecipeError(
            f"setup_distributed_training({config!r}) is not possible",
            why="it takes a MultiGPUConfig",
            fix="pass MultiGPUConfig(num_gpus=2)",
        )
    return join(config, _found(device, use_tpu=False))


def join(config: MultiGPUConfig, found: Found) -> DistributedState:
    """`setup_distributed_training`, on a device that is found. Raises: as there."""
    said, device = read_processes(), found.device
    if KINDS[device.kind].engine != "torch":
        raise RecipeError(
            f"MultiGPUConfig is not for {device} ({device.label})",
            why="one process computes on all chips of a TPU, and torchrun starts several",
            fix="call setup_multi_tpu(), or use PantheraMLTPUTrainer",
        )
    backend = backend_of(device)
    if config.backend not in (None, backend.collective):
        fix = "leave it out" + (f": {backend.collective} is what these devices talk through" if backend.collective else "")
        why = f"the sums between devices of kind {device.kind} are made for {backend.collective or 'nothing else'}"
        raise _wrong(f"backend={config.backend!r}", f"does not go with {device} ({device.label})", why, fix)
    there = sum(each.kind == device.kind for each in found.inventory.devices)
    _check_number(config, said.world_size, f"{there} of kind {device.kind}", said.launched)
    if there > 1 and not said.launched:
        _once(
            _log.warning,
            f"{there} of kind {device.kind} are here, and one process trains on one of them; for all: torchrun --nproc-per-node {there} SCRIPT.py",
        )
    timeout_s = config.hardware().get("timeout_s", HardwareAsk().timeout_s)
    world = open_world(device, _log.warning, timeout_s)
    return DistributedState(
        rank=world.rank,
        world_size=world.size,
        local_rank=said.local_rank,
        device=backend.torch_device(device.index),
        backend=backend.collective if world.size > 1 else None,
    )


def _check_number(config: MultiGPUConfig, size: int, there: str, launched: bool) -> None:
    """Raises: RecipeError if other processes are here than the configuration needs."""
    axes = config.data_parallel_size * config.tensor_parallel_size
    if config.num_gpus in (None, size) and size % axes == 0:
        return
    wanted = config.num_gpus or axes
    named = "num_gpus" if config.num_gpus else "data_parallel_size" if config.tensor_parallel_size == 1 else "tensor_parallel_size"
    started = f"torchrun has started {size}" if launched else f"this script runs as {size}, without torchrun"
    raise RecipeError(
        f"{wanted} processes are wanted ({named}={getattr(config, named)}), and {started}",
        why=f"each device has a process of its own, which runs the whole script; {there} answered here",
        fix=f"start it with torchrun --nproc-per-node {wanted} SCRIPT.py, or leave {named} out",
    )


def cleanup_distributed_training() -> None:
    """Leave the others, and close torch's group if we have made it. Twice is as good as once."""
    from pantheraml.distributed.torch_world import leave_processes

    leave_processes()


setup_multi_gpu, cleanup_multi_gpu = setup_distributed_training, cleanup_distributed_training
"""Other names of the same."""


def get_rank() -> int:
    """Of this process among all that were started, from 0; 0 where nobody has started several."""
    return read_processes().rank


def get_world_size() -> int:
    """How many processes were started; 1 where nobody has started several."""
    return read_processes().world_size


def is_main_process() -> bool:
    """Whether this process is the first one."""
    return get_rank() == 0


def device_for_model(
    device: str, *, use_multi_gpu: bool | None, auto_device_map: bool | None, use_tpu: bool | None
) -> tuple[Found, tuple[Device, ...]]:
    """On which device this process loads a model, and over which all it is spread; none: over no others.

    Args: those of `FastLanguageModel.from_pretrained`.
    Raises: RecipeError if they contradict each other; DeviceError if what they ask for is not here.
    """
    said = read_processes()
    _check_words(device, use_multi_gpu, auto_device_map, use_tpu, said.world_size)
    found = _found(device, use_tpu=use_tpu)
    if said.world_size > 1:
        return found, ()  # where the parts lie is for the plan to say
    like = _like(found)
    if len(like) > 1 and (auto_device_map or (use_multi_gpu and auto_device_map is None)):
        return found, like
    if use_multi_gpu:
        raise _one_process(found.device, len(like))
    if auto_device_map and KINDS[found.device.kind].engine == "torch":
        _once(
            _log.warning, f"auto_device_map=True: the model lies on {found.device} as a whole, since it is the only one of its kind here."
        )
    return found, ()


def _check_words(device: str, use_multi_gpu: bool | None, auto_device_map: bool | None, use_tpu: bool | None, processes: int) -> None:
    """Raises: RecipeError for arguments that contradict each other."""
    kind, index = parse_device(device)
    tpu = kind in KINDS and KINDS[kind].family == "tpu"
    several = [name for name, on in (("use_multi_gpu", use_multi_gpu), ("auto_device_map", auto_device_map)) if on]
    if use_multi_gpu and (use_tpu or tpu):
        raise _contradiction(f"use_multi_gpu=True and {'use_tpu=True' if use_tpu else f'device={device!r}'}", "they name different devices")
    if use_tpu is not None and kind != "auto" and use_tpu != tpu:
        raise _contradiction(f"use_tpu={use_tpu} and device={device!r}", "they name different devices")
    if use_multi_gpu is False and processes > 1:
        raise _contradiction(
            f"use_multi_gpu=False, and torchrun has started {processes} processes", "they train together, on a device each"
        )
    if several and index is not None and processes == 1:
        raise _contradiction(f"{several[0]}=True and device={device!r}", "one asks for several devices, and the other for this one")


def _contradiction(what: str, why: str) -> RecipeError:
    return RecipeError(what, why=why, fix="leave one of them out")


def _one_process(device: Device, gpus: int) -> RecipeError | DeviceError:
    if gpus > 1:
        return RecipeError(
            f"use_multi_gpu=True and auto_device_map=False, and one process runs this script, where {gpus} GPUs are",
            why="for training each GPU has a process of its own; one process uses them all only for answers, by a device map",
            fix=f"start it with torchrun --nproc-per-node {gpus} SCRIPT.py, or leave auto_device_map out",
        )
    return DeviceError(
        f"use_multi_gpu=True, and {'one GPU' if gpus else 'no GPU'} answered here: {device} ({device.label})",
        why="several are asked for, and one process runs this script",
        fix="leave use_multi_gpu out; where there are several: torchrun --nproc-per-node 2 SCRIPT.py",
    )


def _found(device: str, *, use_tpu: bool | None) -> Found:
    """The device that a word means in this process: a kind is that of all processes, an index is meant for this one."""
    kind, index = parse_device(device)
    if kind == "auto" and use_tpu:
        return find(HardwareAsk(kind="tpu"), asked_by="use_tpu=True")
    if kind == "auto":
        return find_own(None if use_tpu is None else HardwareAsk(allow_tpu=False))
    look = find_own if index is None else find
    return look(HardwareAsk(kind=kind, index=index or 0), asked_by=f"device={device!r}")


def _like(found: Found) -> tuple[Device, ...]:
    """All GPUs of the kind of the one that was found; none where that is no GPU."""
    if KINDS[found.device.kind].family != "gpu":
        return ()
    return tuple(each for each in found.inventory.devices if each.kind == found.device.kind)


_said: set[str] = set()


def _once(say: Callable[[str], None], what: str) -> None:
    """What has been said is not said again."""
    if what not in _said:
        _said.add(what)
        say(what)
