"""What the environment says about devices, typed. An argument or a recipe that says it too wins; a default loses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.device import parse_device
from pantheraml.recipe.types import HardwareAsk

RECIPE = "the recipe"
S = TypeVar("S", bound=BaseSettings)


def _first(said: Any) -> Any:
    """OpenMP takes a number for each level of nested threads."""
    return said.partition(",")[0].strip() if isinstance(said, str) else said


class HardwareSettings(BaseSettings):
    """Environment variables. None: not set, so the recipe's default holds; `hardware` in a recipe has the same keys.

    Attributes:
        device_type: `auto`, `gpu`, a kind, or one device of it (`cuda:1`). prefer: the same under its older name, where that is not set.
        usd_per_hour: of the device that is chosen.
        openmp_threads: of each process, for `hardware.threads`; of a list the first. It does not count where a launcher started several,
            as torchrun sets it to 1 whatever there is. local_world_size: how many it started on this machine.
        cache: folder in which measured speeds are kept.
    """

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore")

    device_type: str | None = Field(default=None, validation_alias="PANTHERAML_DEVICE_TYPE")
    prefer: str | None = Field(default=None, validation_alias="COMPUTE_PREFER")
    allow_cpu: bool | None = Field(default=None, validation_alias="PANTHERAML_ALLOW_CPU")
    allow_tpu: bool | None = Field(default=None, validation_alias="COMPUTE_ALLOW_TPU")
    simulate_tpu: bool | None = Field(default=None, validation_alias="PANTHERAML_SIMULATE_TPU")
    tpu_batch_factor: int | None = Field(default=None, gt=0, validation_alias="COMPUTE_TPU_BATCH_FACTOR")
    gpu_batch_factor: int | None = Field(default=None, gt=0, validation_alias="COMPUTE_GPU_BATCH_FACTOR")
    cpu_batch_factor: int | None = Field(default=None, gt=0, validation_alias="COMPUTE_CPU_BATCH_FACTOR")
    usd_per_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False, validation_alias="COMPUTE_USD_PER_HOUR")
    openmp_threads: Annotated[int, BeforeValidator(_first)] | None = Field(default=None, gt=0, validation_alias="OMP_NUM_THREADS")
    local_world_size: int = Field(default=1, gt=0, validation_alias="LOCAL_WORLD_SIZE")
    cache: Path = Field(default=Path("~/.cache/pantheraml"), validation_alias="PANTHERAML_CACHE")

    def over(self, ask: HardwareAsk) -> tuple[HardwareAsk, str]:
        """The ask with what it leaves open filled from the environment, and who asks for the device.

        Raises: DeviceError if the environment names no device.
        """
        elsewhere = {"device_type", "prefer", "openmp_threads", "local_world_size", "cache"}
        given = {**self.model_dump(exclude=elsewhere), "threads": self.openmp_threads if self.local_world_size == 1 else None}
        said: dict[str, Any] = {name: value for name, value in given.items() if value is not None and name not in ask.model_fields_set}
        asked_by = RECIPE
        variable, named = ("PANTHERAML_DEVICE_TYPE", self.device_type) if self.device_type else ("COMPUTE_PREFER", self.prefer)
        if named and "kind" not in ask.model_fields_set:
            try:
                kind, index = parse_device(named)
            except DeviceError as error:
                raise DeviceError(f"{variable}={named}: {error.what}", why=error.why, fix=error.fix) from error
            said["kind"] = kind
            if index is not None and "index" not in ask.model_fields_set:
                said["index"] = index
            asked_by = f"{variable}={named}"
        return ask.model_copy(update=said), asked_by


def read_settings() -> HardwareSettings:
    """What the environment says now. Raises: RecipeError if a variable has a value that cannot be used."""
    return read_environment(HardwareSettings)


def read_environment(kind: type[S]) -> S:
    """The same for settings of any kind."""
    try:
        return kind()
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"the environment variable {first['loc'][0]} is {first['input']!r}",
            why=f"it cannot be used: {first['msg'][0].lower()}{first['msg'][1:]}",
            fix="unset it, or give it a value of that kind",
        ) from error
