"""Memory, configurations and compilation under the names that users know, on simulated chips."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import pytest
import torch

from pantheraml import XLAOptimizer
from pantheraml.distributed import (
    MultiTPUConfig,
    TPUConfigManager,
    TPUErrorHandler,
    TPUMemoryManager,
    cleanup_tpu_training,
    get_tpu_status,
    optimize_tpu_memory,
    setup_multi_tpu,
    setup_tpu_training,
)
from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.recovery import TPUErrorHandler as Handler
from pantheraml.planning.shape import typical_shape


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PANTHERAML_SIMULATE_TPU", "1")
    yield
    if get_tpu_status()["ready"]:
        cleanup_tpu_training()


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_what_is_held_on_a_device_is_listed_and_let_go() -> None:
    with pytest.raises(DeviceError, match="no TPU is set up"):
        TPUMemoryManager()
    setup_multi_tpu(MultiTPUConfig(num_cores=8))
    manager = TPUMemoryManager()
    with manager.watching() as seen:
        kept = jnp.zeros((1 << 12, 1 << 12)).block_until_ready()
        kept += 1
    largest = manager.arrays(1)[0]
    assert (largest.shape, largest.dtype, largest.bytes) == ((1 << 12, 1 << 12), "float32", 1 << 26)
    # Of simulated devices this is the process's memory, which may have had room for it already.
    assert seen.after_bytes is not None and seen.grown_bytes == seen.after_bytes - (seen.before_bytes or 0)
    del kept
    assert all(each.shape != (1 << 12, 1 << 12) for each in manager.arrays(100))
    assert manager.info()["used_bytes"]
    given_back = optimize_tpu_memory()
    assert given_back is not None and given_back >= 0
    with pytest.raises(DeviceError, match="there is no tpu:8"):
        TPUMemoryManager(8)


# ---- Configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "slice_name", "dp", "bits"),
    [("135M", "v5e-8", 8, False), (8e9, "v5e-8", 1, False), ("8b", "v5e-1", 1, True), ("70b", "v6e-16", 1, False)],
)
def test_a_mesh_for_a_model_of_some_size(size: float | str, slice_name: str, dp: int, bits: bool) -> None:
    found = TPUConfigManager.get_optimal_config(size, slice_name=slice_name)
    assert (found.tpu.dp, found.load_in_8bit) == (dp, bits)
    assert found.of_bytes is not None and 0 < found.memory_bytes < found.of_bytes
    # A larger model never needs less.
    assert found.memory_bytes < TPUConfigManager.get_optimal_config(8e10, slice_name="v5p-512").memory_bytes * 64


def test_what_does_not_fit_names_a_slice_that_does() -> None:
    with pytest.raises(DeviceError, match=r"take v5e-\d+x\d+") as caught:
        TPUConfigManager.get_optimal_config("180b", slice_name="v5e-8")
    assert "180 billion parameters does not fit on 8 x" in str(caught.value)
    with pytest.raises(RecipeError, match="'big' is no size"):
        TPUConfigManager.get_optimal_config("big", slice_name="v5e-8")


@pytest.mark.parametrize("parameters", [1.35e8, 7e9, 4.05e11])
def test_a_typical_model_has_the_size_that_was_asked_for(parameters: float) -> None:
    shape = typical_shape(parameters)
    assert shape.parameters == pytest.approx(parameters, rel=0.03)
    assert len(shape.linears) == 7 * shape.layers


def test_training_is_set_up_and_cleaned_up_in_one_call() -> None:
    config = setup_tpu_training("135m")
    assert get_tpu_status()["devices"] == config.num_cores
    cleanup_tpu_training()
    assert not get_tpu_status()["ready"]
    assert setup_tpu_training(config=MultiTPUConfig(num_cores=4, tp=2)).tp == 2
    assert get_tpu_status()["mesh"] == "fsdp 2 x tp 2"


def test_what_is_no_configuration_is_refused() -> None:
    for wrong in ({"num_cores": 0}, {"fsdp": 0}, {"dp": -1}, {"tp": 2.0}, {"num_cores": "8"}):
        with pytest.raises(RecipeError, match="is no number of devices"):
            MultiTPUConfig(**wrong)
    with pytest.raises(RecipeError, match="takes a MultiTPUConfig"):
        setup_multi_tpu(8)
    for size in (None, "big", True, 8):
        with pytest.raises(RecipeError, match="is no size of a model"):
            TPUConfigManager.get_optimal_config(size, slice_name="v5e-8")
    with pytest.raises(DeviceError, match="at least one chip"):
        TPUConfigManager.get_optimal_config("8b", slice_name="0*v5e-8")
    assert TPUConfigManager.get_optimal_config("8b", slice_name="2*v5e-8").tpu.dcn == 2
    cleanup_tpu_training()  # twice is as good as once
    cleanup_tpu_training()


def test_the_handler_is_the_one_of_recovery() -> None:
    assert TPUErrorHandler is Handler


# ---- Compilation -----------------------------------------------------------------------------------------------------


def test_a_function_is_compiled_once_for_each_shape_and_option() -> None:
    optimizer = XLAOptimizer()
    assert optimizer.simulated
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)).eval()
    fast = optimizer.compile(module)
    for rows in (3, 3, 5, 3):
        x = torch.randn(rows, 8)
        assert torch.allclose(fast(x), module(x), atol=1e-6)
    assert optimizer.compilations == {"Sequential 3x8": 1, "Sequential 5x8": 1}
    with torch.no_grad():
        module[0].weight.add_(1.0)  # its weights are arguments
    assert torch.allclose(fast(x), module(x), atol=1e-5)
    assert optimizer.compile(module) is fast
    half = optimizer.compile(module, dtype=torch.bfloat16)
    assert half is not fast and half(x).dtype == torch.bfloat16
    assert sum(optimizer.compilations.values()) == 3


def test_a_module_is_computed_in_the_mode_that_it_has() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.5)).train()
    fast, x = XLAOptimizer().compile(module), torch.ones(4, 8)
    assert 0 < int((fast(x) == 0).sum()) < 256
    module.eval()
    assert torch.allclose(fast(x), module(x), atol=1e-6)
    module.train()
    assert int((fast(x) == 0).sum()) > 0


def test_other_arguments_choose_what_is_compiled_and_numbers_are_not_narrowed() -> None:
    optimizer = XLAOptimizer()

    def scaled(x: torch.Tensor, by: int = 1, *, twice: bool = False) -> torch.Tensor:
        return x * by * (2 if twice else 1)

    fast = optimizer.compile(scaled)
    x = torch.arange(3)
    assert fast(x, 5, twice=True).tolist() == [0, 10, 20] and fast(x, 5).tolist() == [0, 5, 10]
    assert fast(x).dtype == torch.int64
    for wide in (torch.tensor([2**40]), torch.tensor([1e300], dtype=torch.float64)):
        with pytest.raises(DeviceError, match="cannot be computed with by XLA"):
            fast(wide)
    outside = torch.ones(3)
    with pytest.raises(DeviceError, match="hand over those from outside as arguments"):
        optimizer.compile(lambda x: x + outside)(torch.ones(3))
    with pytest.raises(RecipeError, match="takes a function or a module"):
        optimizer.compile(3)


def test_functions_of_several_tensors_and_what_cannot_be_traced() -> None:
    def scores(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"softmax": torch.softmax(a @ b, -1), "sum": a.sum()}

    a, b = torch.randn(4, 8), torch.randn(8, 3)
    optimizer = XLAOptimizer()
    found = optimizer.compile(scores)(a, b)
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in scores(a, b).items())
    assert optimizer.compilations == {"scores 4x8 8x3": 1}
    with pytest.raises(DeviceError, match="<lambda> cannot be compiled by XLA"):
        optimizer.compile(lambda a: a[a > 0])(a)
