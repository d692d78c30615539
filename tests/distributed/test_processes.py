"""What the environment says of the processes that share a run, and what is answered where it contradicts itself."""

from __future__ import annotations

import pytest

from pantheraml.errors import RecipeError
from pantheraml.hardware.processes import Processes, read_processes

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, "PANTHERAML_LOGS", "PANTHERAML_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)


def said(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Processes:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return read_processes()


def test_nothing_said_is_one_process_that_nobody_has_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    found = said(monkeypatch)
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == (0, 0, 1, 1)
    assert not found.launched and found.address is None and found.logs is None


def test_what_torchrun_sets_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    found = said(monkeypatch, **TORCHRUN)
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == (5, 1, 8, 4)
    assert (found.address, found.port, found.agent_store, found.attempt) == ("node0", 29500, True, 2)
    assert found.launched


def test_one_process_of_torchrun_is_launched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, WORLD_SIZE="1", RANK="0").launched


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"RANK": "8"}, ("RANK=8 and WORLD_SIZE=8", "the last of 8 is 7")),
        ({"LOCAL_RANK": "4"}, ("LOCAL_RANK=4 and LOCAL_WORLD_SIZE=4", "the last of 4 is 3")),
        ({"LOCAL_WORLD_SIZE": "9"}, ("LOCAL_WORLD_SIZE=9 and WORLD_SIZE=8",)),
        ({"MASTER_ADDR": ""}, ("WORLD_SIZE=8, but not MASTER_ADDR", "torchrun")),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, ("not MASTER_ADDR and MASTER_PORT",)),
        ({"MASTER_PORT": "70000"}, ("MASTER_PORT is '70000'",)),
        ({"WORLD_SIZE": "two"}, ("WORLD_SIZE is 'two'",)),
        ({"WORLD_SIZE": "0"}, ("WORLD_SIZE is '0'",)),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], parts: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as refused:
        said(monkeypatch, **{**TORCHRUN, **changed})
    assert all(part in str(refused.value) for part in parts)


def test_one_process_alone_needs_no_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, WORLD_SIZE="1", RANK="0", LOCAL_RANK="0").port is None


def test_a_rank_without_a_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="RANK=1 and WORLD_SIZE=1"):
        said(monkeypatch, RANK="1")
