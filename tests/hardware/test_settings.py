"""An explicit argument wins over the recipe, the recipe over the environment, the environment over the default."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fakes import laptop

from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.find import find
from pantheraml.hardware.settings import read_settings
from pantheraml.recipe.types import HardwareAsk

VARIABLES = (
    ("PANTHERAML_ALLOW_CPU", "0", "allow_cpu", False),
    ("COMPUTE_ALLOW_TPU", "false", "allow_tpu", False),
    ("PANTHERAML_SIMULATE_TPU", "1", "simulate_tpu", True),
    ("COMPUTE_TPU_BATCH_FACTOR", "64", "tpu_batch_factor", 64),
    ("COMPUTE_GPU_BATCH_FACTOR", "8", "gpu_batch_factor", 8),
    ("COMPUTE_CPU_BATCH_FACTOR", "2", "cpu_batch_factor", 2),
    ("COMPUTE_USD_PER_HOUR", "1.5", "usd_per_hour", 1.5),
    ("OMP_NUM_THREADS", "3", "threads", 3),
    ("OMP_NUM_THREADS", "5, 2", "threads", 5),
)


@pytest.mark.parametrize(("variable", "text", "key", "value"), VARIABLES)
def test_a_variable_fills_what_the_recipe_leaves_open(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, key: str, value: object
) -> None:
    monkeypatch.delenv(variable, raising=False)
    default = getattr(HardwareAsk(), key)
    assert getattr(read_settings().over(HardwareAsk())[0], key) == default != value
    monkeypatch.setenv(variable, text)
    assert getattr(read_settings().over(HardwareAsk())[0], key) == value
    # Said in the recipe, even as the default: the environment is silent.
    assert getattr(read_settings().over(HardwareAsk(**{key: default}))[0], key) == default


def test_threads_that_a_launcher_sets_for_each_of_several_are_nobodys_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert read_settings().over(HardwareAsk())[0].threads is None
    assert read_settings().over(HardwareAsk(threads=2))[0].threads == 2


@pytest.mark.parametrize("variable", ["PANTHERAML_DEVICE_TYPE", "COMPUTE_PREFER"])
def test_the_environment_names_a_device(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "CUDA:1")
    ask, by = read_settings().over(HardwareAsk())
    assert (ask.kind, ask.index) == ("cuda", 1)
    assert "CUDA:1" in by
    ask, by = read_settings().over(HardwareAsk(kind="cpu"))
    assert (ask.kind, ask.index, by) == ("cpu", 0, "the recipe")


def test_our_own_variable_goes_before_the_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPUTE_PREFER", "tpu")
    monkeypatch.setenv("PANTHERAML_DEVICE_TYPE", "cpu")
    assert read_settings().over(HardwareAsk())[0].kind == "cpu"
    monkeypatch.setenv("PANTHERAML_DEVICE_TYPE", "")  # empty is not set
    assert read_settings().over(HardwareAsk())[0].kind == "tpu"


def test_a_variable_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPUTE_TPU_BATCH_FACTOR", "many")
    with pytest.raises(RecipeError, match="the environment variable COMPUTE_TPU_BATCH_FACTOR is 'many'"):
        read_settings()
    monkeypatch.setenv("COMPUTE_TPU_BATCH_FACTOR", "0")
    with pytest.raises(RecipeError, match="COMPUTE_TPU_BATCH_FACTOR"):
        read_settings()


def test_a_device_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANTHERAML_DEVICE_TYPE", "npu")
    with pytest.raises(DeviceError, match="PANTHERAML_DEVICE_TYPE=npu: 'npu' is no name of a device") as caught:
        read_settings().over(HardwareAsk())
    assert "cuda" in caught.value.why


def test_find_says_that_the_environment_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPUTE_PREFER", "cpu")
    found = find(inventory=laptop())
    assert found.why == "COMPUTE_PREFER=cpu asks for it"
    monkeypatch.setenv("COMPUTE_PREFER", "cuda")
    with pytest.raises(DeviceError) as caught:
        find(inventory=laptop())
    assert "COMPUTE_PREFER=cuda asks for cuda, but" in caught.value.what and "here is cpu:0" in caught.value.what


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert read_settings().cache == Path("~/.cache/pantheraml")
    monkeypatch.setenv("PANTHERAML_CACHE", str(tmp_path))
    assert read_settings().cache == tmp_path
