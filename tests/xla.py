"""XLA's CPU devices: eight, that share this machine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import jax


def eight_devices(cache: Path) -> list[Any]:
    """Starts JAX on the CPU. What is compiled for one test serves the next.

    Raises: RuntimeError if this process has started it with fewer devices.
    """
    jax.config.update("jax_platforms", "cpu")
    with suppress(RuntimeError):  # it runs
        jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_disable_most_optimizations", True)
    found = jax.devices("cpu")
    if len(found) < 8:
        raise RuntimeError("JAX was started with fewer than eight CPU devices: run these tests first, or alone")
    return found
