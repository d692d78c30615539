"""What the environment says of the processes that share a run, and what is answered where it contradicts itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.fakes import h100s

from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.find import find_own
from pantheraml.hardware.processes import Processes, read_processes
from pantheraml.recipe.types import HardwareAsk

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
    for name in (*TORCHRUN, "PANTHERAML_DEVICES", "PANTHERAML_LOGS", "PANTHERAML_SIGNS", "PANTHERAML_LAUNCHER"):
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


# ---- The device of each ------------------------------------------------------------------------------------------


def own(monkeypatch: pytest.MonkeyPatch, answered: tuple[int, ...], size: int, devices: str = "") -> list[tuple[str, list[int]]]:
    """(device, which others it knows of the same kind) of each of the processes of a machine, with these GPUs."""
    here = replace(h100s(8), devices=tuple(each for each in h100s(8).devices if each.kind == "cpu" or each.index in answered))
    monkeypatch.setattr("pantheraml.hardware.find.detect", lambda *_, **__: here)
    found = []
    for rank in range(size):
        local = {name: str(rank if name.endswith("RANK") else size) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        said(monkeypatch, MASTER_ADDR="localhost", MASTER_PORT="1", PANTHERAML_DEVICES=devices, **local)
        mine = find_own(HardwareAsk(devices="all"))
        found.append((str(mine.device), [each.index for each in mine.inventory.devices if each.kind == "cuda"]))
    return found


def test_each_process_takes_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own(monkeypatch, (0, 1, 2), 2) == [("cuda:0", [0, 1, 2]), ("cuda:1", [0, 1, 2])]
    with pytest.raises(DeviceError, match="there is no cuda:1; here is cuda:0"):
        own(monkeypatch, (0, 2, 3), 2)
    with pytest.raises(DeviceError, match="3 processes were started on this machine, and 2 of kind cuda answered"):
        own(monkeypatch, (1, 4), 3)


def test_where_the_launcher_has_counted_each_takes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own(monkeypatch, (0, 1, 2, 3), 2, "[0, 3]") == [("cuda:0", [0, 3]), ("cuda:3", [0, 3])]
    assert own(monkeypatch, (0, 1, 2, 3), 1, "[2]") == [("cuda:2", [2])]
    with pytest.raises(DeviceError, match="there is no cuda:3"):
        own(monkeypatch, (0, 1, 2), 2, "[0, 3]")
