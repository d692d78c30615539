"""A recipe that says with how few devices it may go on: what is asked for, started, or here, and what comes of it."""

from __future__ import annotations

from typing import Any

import pytest
from tests.fakes import h100s, laptop

from pantheraml.errors import RecipeError
from pantheraml.planning.sharding import process_meshes
from pantheraml.recipe.types import HardwareAsk


def meshes(here: int, processes: int | None = None, **ask: Any) -> tuple[list[dict[str, int]], str]:
    inventory = h100s(here)
    return process_meshes(HardwareAsk(**ask), inventory.devices[0], inventory, collective="nccl", processes=processes)


def test_fewer_that_answer_are_taken_and_that_is_said() -> None:
    found, why = meshes(3, devices=4, min_devices=2)
    assert found[0] == {"dp": 3} and why == "3 of the 4 that the recipe asks for answered, and hardware.min_devices allows it"
    found, why = meshes(8, devices=4, min_devices=2)
    assert found[0] == {"dp": 4} and why == "the recipe asks for it"
    assert meshes(3, devices="all", min_devices=2)[0][0] == {"dp": 3}
    assert meshes(2, devices="all", min_devices=1)[0][0] == {"dp": 2}


@pytest.mark.parametrize(
    ("ask", "processes", "what"),
    [
        ({"devices": 4}, 3, "hardware.devices=4, but 3 processes were started"),
        ({"devices": 4, "min_devices": 2}, 5, "hardware.devices=4, but 5 processes were started"),
        ({"devices": 4, "min_devices": 2}, 1, "hardware.min_devices=2, but one process was started"),
        ({"min_devices": 2}, 1, "hardware.min_devices=2, but one process was started"),
        ({"devices": "all", "min_devices": 3}, 2, "hardware.min_devices=3, but 2 processes were started"),
    ],
)
def test_other_numbers_of_processes_than_the_recipe_allows_are_refused(ask: dict[str, Any], processes: int, what: str) -> None:
    with pytest.raises(RecipeError) as refused:
        meshes(8, processes, **ask)
    assert refused.value.what == what and "start " in refused.value.fix


def test_so_many_as_the_recipe_allows_are_taken_as_they_were_started() -> None:
    for ask, processes in (({"devices": 4, "min_devices": 2}, (2, 3, 4)), ({"min_devices": 2}, (2, 9)), ({"devices": "all"}, (1, 3))):
        for size in processes:
            found, why = meshes(8, size, **ask)
            assert found[0] == ({"dp": size} if size > 1 else {}) and "started" in why
    with pytest.raises(RecipeError, match="fsdp 4 does not come to 3 devices"):
        meshes(8, 3, fsdp=4, min_devices=2)


def test_processes_that_share_a_cpu_are_as_many_as_are_asked_for() -> None:
    inventory = laptop()
    found, _ = process_meshes(HardwareAsk(devices=4, min_devices=2), inventory.devices[0], inventory, collective="gloo")
    assert found[0] == {"dp": 4}


@pytest.mark.parametrize(("devices", "what"), [("all", "=all are one of a CPU"), ("auto", "=auto come to 1")])
def test_more_than_a_cpu_counts_as_are_refused_rather_than_forgotten(devices: str, what: str) -> None:
    inventory = laptop()
    with pytest.raises(RecipeError) as refused:
        process_meshes(HardwareAsk(devices=devices, min_devices=2), inventory.devices[0], inventory, collective="gloo")
    assert refused.value.what == f"hardware.min_devices=2, but hardware.devices{what}"
    assert refused.value.fix == "set hardware.devices to 2 or more"


def test_with_how_few_is_not_how_many() -> None:
    with pytest.raises(RecipeError, match=r"hardware\.min_devices=2, but hardware\.devices=auto come to 1"):
        meshes(8, min_devices=2)
    assert meshes(8, cp=2, min_devices=2)[0] == [{"cp": 2}]
