"""The processes that share one run, as their environment tells each of them: what torchrun sets, and our own launcher."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from pantheraml.errors import RecipeError
from pantheraml.hardware.settings import read_environment


class Processes(BaseSettings):
    """Which process this is, of how many, and where they meet.

    Attributes:
        rank, world_size: among all. local_rank, local_world_size: among those of this machine.
        address, port: where the first process, or torchrun for it, keeps the store through which they find each other.
        agent_store: that store is torchrun's. attempt: how often torchrun has started all of them again; its store still holds what was
            written before.
        devices: the index of the device of each process of this machine, where our launcher has counted them.
        logs: folder for what this process prints, and its stacks; None: somebody else than our launcher started it.
        signs: folder in which our launcher looks for signs of life, and says who is lost; no other launcher uses it.
        launcher: the launcher's end of a pipe, as "file descriptor:inode"; it closes with the launcher.
    """

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore", populate_by_name=True)

    rank: int = Field(default=0, ge=0, validation_alias="RANK")
    local_rank: int = Field(default=0, ge=0, validation_alias="LOCAL_RANK")
    world_size: int = Field(default=1, gt=0, validation_alias="WORLD_SIZE")
    local_world_size: int = Field(default=1, gt=0, validation_alias="LOCAL_WORLD_SIZE")
    address: str | None = Field(default=None, validation_alias="MASTER_ADDR")
    port: int | None = Field(default=None, gt=0, lt=2**16, validation_alias="MASTER_PORT")
    agent_store: bool = Field(default=False, validation_alias="TORCHELASTIC_USE_AGENT_STORE")
    attempt: int = Field(default=0, ge=0, validation_alias="TORCHELASTIC_RESTART_COUNT")
    devices: tuple[int, ...] = Field(default=(), validation_alias="PANTHERAML_DEVICES")
    logs: Path | None = Field(default=None, validation_alias="PANTHERAML_LOGS")
    signs: Path | None = Field(default=None, validation_alias="PANTHERAML_SIGNS")
    launcher: str | None = Field(default=None, validation_alias="PANTHERAML_LAUNCHER")

    @property
    def launched(self) -> bool:
        """Whether somebody has started one process for each device, so that nobody needs to do it again."""
        return "world_size" in self.model_fields_set


def read_processes() -> Processes:
    """What the environment says now. Raises: RecipeError if that cannot be."""
    said = read_environment(Processes)
    for what, number, of, many in (
        ("RANK", said.rank, "WORLD_SIZE", said.world_size),
        ("LOCAL_RANK", said.local_rank, "LOCAL_WORLD_SIZE", said.local_world_size),
    ):
        if number >= many:
            raise RecipeError(
                f"the environment says {what}={number} and {of}={many}",
                why=f"processes are counted from 0, so the last of {many} is {many - 1}",
                fix=f"let torchrun set both, or unset both; by hand, {of} is how many there are",
            )
    if said.local_world_size > said.world_size:
        raise RecipeError(
            f"the environment says LOCAL_WORLD_SIZE={said.local_world_size} and WORLD_SIZE={said.world_size}",
            why="the processes of this machine are among all of them",
            fix="let torchrun set both, or unset both",
        )
    missing = [name for name, value in (("MASTER_ADDR", said.address), ("MASTER_PORT", said.port)) if value is None]
    if said.world_size > 1 and missing:
        raise RecipeError(
            f"the environment says WORLD_SIZE={said.world_size}, but not {' and '.join(missing)}",
            why="the processes must know where to meet: the machine of the first one, and a free port on it",
            fix=f"start them with torchrun, which sets it; or export {' and '.join(missing)}; for one process, unset WORLD_SIZE",
        )
    return said
