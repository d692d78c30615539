"""The memory of the chips that were set up: what is held there, and how to let go of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pantheraml.distributed.multi_tpu import get_tpu_device, get_tpu_memory_info, ready
from pantheraml.hardware.xla_memory import Held, let_go


@dataclass(slots=True)
class Watched:
    """Bytes on a device before and after a block; None where JAX does not tell, and until the block has ended."""

    before_bytes: int | None
    after_bytes: int | None = None

    @property
    def grown_bytes(self) -> int | None:
        """How much more is held."""
        return None if self.before_bytes is None or self.after_bytes is None else self.after_bytes - self.before_bytes


class TPUMemoryManager:
    """One device of those that `setup_multi_tpu` set up. Figures are JAX's; of a simulated device, the process's memory.

    Args:
        index: of the device. Raises: DeviceError if it is not set up.
    """

    def __init__(self, index: int = 0) -> None:
        self.device = get_tpu_device(index)

    def info(self) -> dict[str, int | None]:
        """Bytes: see `get_tpu_memory_info`."""
        return get_tpu_memory_info(self.device.index)

    def arrays(self, most: int = 10) -> tuple[Held, ...]:
        """The largest arrays that this process holds there."""
        return ready().arrays(self.device.index)[:most]

    def optimize(self) -> int | None:
        """See `optimize_tpu_memory`."""
        return optimize_tpu_memory(self.device.index)

    @contextmanager
    def watching(self) -> Iterator[Watched]:
        """What a block leaves behind on the device."""
        seen = Watched(self.info()["used_bytes"])
        try:
            yield seen
        finally:
            seen.after_bytes = self.info()["used_bytes"]


def optimize_tpu_memory(index: int = 0) -> int | None:
    """Let go of compiled programs and of arrays that nothing refers to; how many bytes of a device that gave back, None if unknown.

    What is needed again is compiled again, or read from the cache on disk. Raises: DeviceError if the device is not set up.
    """
    before = get_tpu_memory_info(index)["used_bytes"]
    let_go()
    after = get_tpu_memory_info(index)["used_bytes"]
    return None if before is None or after is None else max(0, before - after)
