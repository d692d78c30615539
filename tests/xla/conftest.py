"""These tests run in a process of their own (scripts/test): torchax makes torch name a device `jax`, and JAX warns at every fork."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from tests.engines.conftest import one_thread as one_thread
from tests.engines.conftest import plan_of as plan_of
from tests.engines.conftest import small as small


@pytest.fixture(scope="session", autouse=True)
def devices(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """XLA's CPU devices: eight, that share this machine. What is compiled for one test serves the next."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_disable_most_optimizations", True)
    found: list[Any] = jax.devices("cpu")
    assert len(found) == 8
    return found
