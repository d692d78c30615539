"""What this process holds on the devices that JAX has: arrays, and programs that were compiled."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Held:
    """An array, or the part of it that lies on one device.

    Attributes:
        shape, dtype: of the whole array. bytes: on that device.
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int


def arrays_on(platform: str, index: int) -> tuple[Held, ...]:
    """The arrays that something in this process still refers to, the largest first; none if JAX has not been imported.

    Args:
        platform: as JAX names it. index: of the device among those of this host.
    """
    jax: Any = sys.modules.get("jax")
    if jax is None:
        return ()
    device = jax.local_devices(backend=platform)[index]
    parts = [(array, part) for array in jax.live_arrays(platform) for part in array.addressable_shards if part.device == device]
    held = [Held(tuple(array.shape), str(array.dtype), part.data.nbytes) for array, part in parts]
    return tuple(sorted(held, key=lambda each: -each.bytes))


def let_go() -> None:
    """Of what nothing refers to any more, and of every compiled program: the next call compiles, or reads the cache on disk."""
    gc.collect()
    jax: Any = sys.modules.get("jax")
    if jax is not None:
        jax.clear_caches()
        gc.collect()
