"""The devices of this machine for programs: choose one, put tensors on it, size batches, ask for memory, time and money.

    manager = get_device_manager()
    device = manager.get_device()
    config = manager.get_batch_config(base_batch_size=1)

Training does not need it; it stands on the same rooms.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from pantheraml.hardware.backend import Backend, MemoryUse, backend_of
from pantheraml.hardware.catalog import lookup
from pantheraml.hardware.detect import detect
from pantheraml.hardware.device import Absent, Device, Inventory, parse_device
from pantheraml.hardware.find import Found, find
from pantheraml.hardware.price import Price, price_of
from pantheraml.hardware.settings import read_settings
from pantheraml.hardware.speed import remembered
from pantheraml.planning.batch import BatchConfig, batch_by_factor, batch_by_shape
from pantheraml.planning.shape import ModelShape
from pantheraml.planning.workload import Choice, Estimate, Objective, Profile, Workload, choose, estimate
from pantheraml.recipe.kinds import in_host_memory
from pantheraml.recipe.types import HardwareAsk

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChange:
    """What giving memory back brought: the same keys before and after; `freed_bytes` is how much less this process holds, None if unknown."""

    before: MemoryUse
    after: MemoryUse
    freed_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Dollars for time on a device; None where the price is not known."""

    usd: float | None
    usd_per_hour: float | None
    source: str


class DeviceManager:
    """What answers on this machine, and one device that is in use. Make it with `get_device_manager`.

    Args:
        found: the device in use, and everything that was looked for.
        usd_per_hour: your own prices by device ("cuda:0") or kind ("cpu"), before those of the catalog.
        open_device: how a backend is opened; tests pass their own.
    """

    def __init__(
        self, found: Found, *, usd_per_hour: Mapping[str, float] | None = None, open_device: Callable[[Device], Backend] = backend_of
    ) -> None:
        self._found, self._device, self._why = found, found.device, found.why
        self._prices = dict(usd_per_hour or {})
        for name, price in self._prices.items():
            parse_device(name)
            if not 0 <= price < math.inf:
                raise ValueError(f"usd_per_hour of {name} is an amount of dollars, not {price}")
        self._open = open_device
        self._backends: dict[str, Backend] = {}

    # ---- Which device --------------------------------------------------------------------------------------------

    @property
    def devices(self) -> tuple[Device, ...]:
        """Everything that answered, in the order in which `auto` prefers it."""
        return self._found.inventory.devices

    @property
    def absent(self) -> tuple[Absent, ...]:
        """What did not answer, why, and what would bring it."""
        return self._found.inventory.absent

    @property
    def why(self) -> str:
        """Why the device in use is in use."""
        return self._why

    def get_device(self, device_id: str | None = None) -> Device:
        """The device in use, or the one that is named ("cuda:1", "gpu"). Raises: DeviceError if it is not here."""
        if device_id is None:
            return self._device
        kind, index = parse_device(device_id)
        ask = HardwareAsk(kind=kind, index=index or 0)
        return find(ask, inventory=self._found.inventory, training=False, asked_by=f"device_id={device_id!r}").device

    def use(self, device_id: str) -> Device:
        """Go over to another device. Raises: DeviceError if it is not here; then nothing changes."""
        self._device = self.get_device(device_id)
        self._why = f"use({device_id!r}) asks for it"
        return self._device

    def backend(self, device_id: str | None = None) -> Backend:
        """What drives a device; see hardware/backend.py."""
        device = self.get_device(device_id)
        if device.kind not in self._backends:
            self._backends[device.kind] = self._open(device)
        return self._backends[device.kind]

    # ---- Tensors -------------------------------------------------------------------------------------------------

    def create_tensor(self, data: Any, *, dtype: torch.dtype | None = None, device_id: str | None = None) -> torch.Tensor:
        """`torch.tensor(data)` on a device. Raises: DeviceError if torch has no tensors there."""
        import torch

        return torch.tensor(data, dtype=dtype, device=self._where(device_id))

    def move_to_device(self, tensor: torch.Tensor, device_id: str | None = None) -> torch.Tensor:
        """The tensor on a device; itself if it is there already. Raises: DeviceError as `create_tensor`."""
        return tensor.to(self._where(device_id))

    def _where(self, device_id: str | None) -> torch.device:
        return self.backend(device_id).torch_device(self.get_device(device_id).index)

    def synchronize(self, device_id: str | None = None) -> None:
        """Wait until the device has done what it was given."""
        self.backend(device_id).synchronize(self.get_device(device_id).index)

    def barrier(self) -> None:
        """Wait for the other processes of a torch.distributed group; alone, for nobody."""
        if group := _process_group():
            group.barrier()

    def all_reduce(self, tensor: torch.Tensor, op: Literal["sum", "mean", "max", "min"] = "sum") -> torch.Tensor:
        """The sum (mean, max, min) of a tensor over all processes of a torch.distributed group, in place; alone, the tensor as it is."""
        if op not in ("sum", "mean", "max", "min"):
            raise ValueError(f"op is sum, mean, max or min, not {op!r}")
        if group := _process_group():
            known = {"sum": group.ReduceOp.SUM, "mean": group.ReduceOp.SUM, "max": group.ReduceOp.MAX, "min": group.ReduceOp.MIN}
            group.all_reduce(tensor, op=known[op])
            if op == "mean":  # gloo has no average
                tensor.div_(group.get_world_size())
        return tensor

    def map(self, function: Callable[[Device, T], R], batches: Iterable[T], *, device_ids: Sequence[str] | None = None) -> list[R]:
        """`function(device, batch)` for each of independent batches, over several devices at once; results in order.

        Each device takes the next batch as soon as it is done with one, so a fast device gets more of them.

        Args:
            device_ids: which; None: all of the kind in use.
        Raises: what `function` raises first; batches that were not begun are left.
        """
        devices = [self.get_device(name) for name in device_ids or [str(each) for each in self.devices if each.kind == self._device.kind]]
        waiting: queue.SimpleQueue[tuple[int, T]] = queue.SimpleQueue()
        count = 0
        for count, batch in enumerate(batches, 1):
            waiting.put((count - 1, batch))
        results: dict[int, R] = {}
        errors: list[BaseException] = []

        def work(device: Device) -> None:
            try:
                while not errors:
                    try:
                        index, batch = waiting.get_nowait()
                    except queue.Empty:
                        return
                    results[index] = function(device, batch)
            except BaseException as error:  # noqa: BLE001 - carried over to the caller's thread, whatever it is
                errors.append(error)

        threads = [threading.Thread(target=work, args=(device,), name=str(device)) for device in devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[index] for index in range(count)]

    # ---- Batches -------------------------------------------------------------------------------------------------

    def get_batch_config(
        self,
        base_batch_size: int = 1,
        *,
        shape: ModelShape | None = None,
        max_tokens: int | None = None,
        lora_rank: int | None = 16,
        device_id: str | None = None,
    ) -> BatchConfig:
        """How many examples to take at once.

        Without a model, the base times the device's factor (TPU 128, GPU 4, CPU 1; settings), rounded to the nearest
        power of two where it is not the base itself. With a model's shape, the planner's memory arithmetic for training.

        Args:
            shape: from `pantheraml.models.load.read_shape`. max_tokens: of an example; None: what the model can do, or 2048.
            lora_rank: of the adapter that trains; None: every weight trains.
        Raises: ValueError for a base below 1; DeviceError if not even one example of the model fits.
        """
        if not isinstance(cast("object", base_batch_size), int) or base_batch_size < 1:
            raise ValueError(f"base_batch_size is a whole number of at least 1, not {base_batch_size!r}")
        device = self.get_device(device_id)
        if shape is None:
            return batch_by_factor(device, base_batch_size, self._found.ask)
        free = self.memory(str(device)).free_bytes
        return batch_by_shape(device, base_batch_size, shape, free_bytes=free, max_tokens=max_tokens, lora_rank=lora_rank)

    # ---- Memory --------------------------------------------------------------------------------------------------

    def memory(self, device_id: str | None = None) -> MemoryUse:
        """Bytes total, free, used by this process, reserved and at peak; None where the driver does not tell."""
        return self.backend(device_id).memory(self.get_device(device_id).index)

    def memory_report(self) -> dict[str, dict[str, int | None]]:
        """`memory` of every device, ready for JSON; the same keys for each."""
        return {str(device): asdict(self.memory(str(device))) for device in self.devices}

    def clear_cache(self, device_id: str | None = None) -> MemoryChange:
        """Give the allocator's cached blocks back to the driver."""
        return self._freed(device_id, self.backend(device_id).empty_cache)

    def optimize_memory(self, device_id: str | None = None) -> MemoryChange:
        """Collect Python's garbage, which may hold tensors, then clear the cache."""
        import gc

        def collect() -> None:
            gc.collect()
            self.backend(device_id).empty_cache()

        return self._freed(device_id, collect)

    def _freed(self, device_id: str | None, deed: Callable[[], None]) -> MemoryChange:
        self.synchronize(device_id)
        before = self.memory(device_id)
        deed()
        after = self.memory(device_id)
        # What this process gave back: the machine's free memory also moves with every other program.
        held, holds = (use.used_bytes if use.reserved_bytes is None else use.reserved_bytes for use in (before, after))
        return MemoryChange(before=before, after=after, freed_bytes=None if held is None or holds is None else held - holds)

    # ---- Time and money ------------------------------------------------------------------------------------------

    def price(self, device_id: str | None = None) -> Price:
        """Of an hour: your own for the device, its kind, or this manager; else the catalog's."""
        device = self.get_device(device_id)
        # The price of the settings is that of the device they choose, not of everything here.
        asked = self._found.ask.usd_per_hour if device == self._found.device else None
        own = self._prices.get(str(device), self._prices.get(device.kind, asked))
        return price_of(device, own)

    def cost(self, device_s: float, device_id: str | None = None) -> Cost:
        """Of so many measured seconds on a device. Raises: ValueError if they are no amount."""
        if not 0 <= device_s < math.inf:
            raise ValueError(f"device_s is a number of seconds, not {device_s}")
        price = self.price(device_id)
        return Cost(usd=price.of(device_s), usd_per_hour=price.usd_per_hour, source=price.source)

    def profile(self, device_id: str | None = None) -> Profile:
        """What is known of a device's speed and price: measured by `devices --bench` first, then by the probe, then the catalog's peak."""
        device = self.get_device(device_id)
        price = self.price(str(device))
        measured = None if device.simulated else remembered(device, read_settings().cache)
        entry = None if device.simulated else lookup(device.kind, device.name, device.memory_bytes)
        dtype = (device.dtypes or ("bfloat16",))[0]
        flops, source = None, "not measured, and not in the catalog"
        if measured:
            flops, source = measured.flops_per_s, f"measured {measured.date}"
        elif device.peak_flops:
            flops, source = device.peak_flops, "measured by the probe's small product"
        elif entry and entry.flops.get(dtype):
            flops, source = entry.flops[dtype], f"the catalog's peak ({entry.source})"
        return Profile(
            device=device,
            flops_per_s=flops,
            flops_source=source,
            free_bytes=self.memory(str(device)).free_bytes,
            host_bytes_per_s=math.inf if in_host_memory(device.kind) else measured.host_bytes_per_s if measured else None,
            launch_s=measured.launch_s if measured else None,
            usd_per_hour=price.usd_per_hour,
            price_source=price.source,
        )

    def estimate(self, workload: Workload, device_id: str | None = None) -> Estimate:
        """Time and money for a workload on one device; None where they are not known."""
        return estimate(workload, self.profile(device_id))

    def choose(self, workload: Workload, objective: Objective = "time", budget_usd: float | None = None) -> Choice:
        """The device for a workload, by its size, among all that answered; `use(str(choice.device))` goes over to it.

        Raises: DeviceError with a reason for each device, if none can or may take it.
        """
        return choose(workload, [self.profile(str(device)) for device in self.devices], objective, budget_usd)

    def report(self) -> dict[str, Any]:
        """Ready for JSON: the device in use and why, all devices with memory and price, and what is absent."""
        memory = self.memory_report()
        return {
            "device": str(self._device),
            "why": self._why,
            "devices": [
                {**asdict(device), "id": str(device), "memory": memory[str(device)], "price": asdict(self.price(str(device)))}
                for device in self.devices
            ],
            "absent": [asdict(absent) for absent in self.absent],
        }


def get_device_manager(
    prefer: str | None = None,
    allow_tpu: bool | None = None,
    *,
    allow_cpu: bool | None = None,
    usd_per_hour: Mapping[str, float] | None = None,
    hardware: HardwareAsk | None = None,
    inventory: Inventory | None = None,
) -> DeviceManager:
    """Look at this machine, and choose a device. Arguments are honoured on every call; each call looks anew.

    Args:
        prefer: auto, gpu, a kind (cpu, tpu, torch_tpu, cuda, xpu, mps), or one device (`cuda:1`). None: what `hardware` says, then the
            environment (PANTHERAML_DEVICE_TYPE or COMPUTE_PREFER), then auto.
        allow_tpu, allow_cpu: whether auto may take one; None: as above (COMPUTE_ALLOW_TPU, PANTHERAML_ALLOW_CPU), then yes.
        usd_per_hour: your own prices, by device ("cuda:0") or kind ("cpu").
        hardware: the same settings as a recipe has them.
        inventory: what was detected before, instead of looking.
    Raises: DeviceError if what is asked is not here: it lists what is.
    """
    said: dict[str, Any] = {}
    if prefer is not None:
        kind, index = parse_device(prefer)
        said = {"kind": kind, "index": index or 0}
    said |= {name: value for name, value in (("allow_tpu", allow_tpu), ("allow_cpu", allow_cpu)) if value is not None}
    ask = (hardware or HardwareAsk()).model_copy(update=said)
    complete, _ = read_settings().over(ask)
    # All kinds are looked for whatever is asked: a manager can go over to another device later.
    everything = detect(simulate_tpu=complete.simulate_tpu, named=complete.kind) if inventory is None else inventory
    found = find(ask, inventory=everything, training=False, asked_by=None if prefer is None else f"prefer={prefer!r}")
    return DeviceManager(found, usd_per_hour=usd_per_hour)


def _process_group() -> Any:
    """torch.distributed where this process belongs to a group, else None."""
    import torch.distributed

    group: Any = torch.distributed
    return group if group.is_available() and group.is_initialized() else None
