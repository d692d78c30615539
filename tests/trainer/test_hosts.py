"""What the hosts of a run tell each other, with threads in the place of hosts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.threads import on_hosts

from pantheraml.distributed.world import Alone, World, most, together, told
from pantheraml.errors import DeviceError, PantheraError, StorageError
from pantheraml.models.quantize import EightBitLinear
from pantheraml.trainer.checkpoint import TENSORS, Checkpoints, Damaged
from pantheraml.trainer.hosts import KeptByFirst, check_same, identity


def test_what_the_first_host_says_is_what_all_hear() -> None:
    assert on_hosts(lambda world: told(world, lambda: {"rank": world.rank}), 3) == [{"rank": 0}] * 3
    assert on_hosts(lambda world: most(world, world.rank * 2), 3) == [4, 4, 4]
    assert told(Alone(), lambda: [1, None]) == [1, None]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_host_stops_all_and_names_it(rank: int) -> None:
    def work(world: World) -> None:
        with together(world):
            if world.rank == rank:
                raise PantheraError("the disk is gone", why="w", fix="f")

    found = on_hosts(work)
    assert str(found[rank]).startswith("the disk is gone")
    other = found[1 - rank]
    assert isinstance(other, DeviceError) and f"host {rank} of 2 has stopped: the disk is gone" in str(other)


def test_something_else_on_one_host_stops_all() -> None:
    found = on_hosts(lambda world: check_same(world, f"rows {min(world.rank, 1)}", "has read other rows"), 3)
    assert all(isinstance(each, PantheraError) and "host 1 of 3 has read other rows than host 0" in str(each) for each in found)
    assert on_hosts(lambda world: check_same(world, "rows", "has read other rows")) == [None, None]


def test_models_with_other_weights_are_told_apart() -> None:
    torch.manual_seed(0)
    model, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    same = torch.nn.Linear(4, 4)
    same.load_state_dict(model.state_dict())
    assert identity(model) == identity(same) != identity(other)


@pytest.mark.parametrize("where", ["the last value", "one bit", "a buffer", "a frozen weight", "the shape"])
def test_every_bit_of_a_model_counts(where: str) -> None:
    def made() -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(40, 70), torch.nn.BatchNorm1d(70), torch.nn.Linear(70, 1).bfloat16())
        model[0].weight.requires_grad_(False)
        model.register_buffer("computed", torch.zeros(3), persistent=False)
        return model

    model, same = made(), made()
    with torch.no_grad():
        same.computed += 1  # not loaded, so machines may differ in it by a rounding
        assert identity(model) == identity(same)
        match where:
            case "the last value":
                model[2].weight[0, -1] += 0.25
            case "one bit":
                model[0].bias.view(torch.int32)[-1] ^= 1
            case "a buffer":
                model[1].running_mean[-1] = 1e-30
            case "a frozen weight":
                model[0].weight[-1, -1] = torch.nextafter(model[0].weight[-1, -1], torch.tensor(9.0))
            case _:
                model[0].weight.data = model[0].weight.data.view(40, 70)
    assert identity(model) != identity(same)


def in_four_bits(layer: torch.nn.Linear) -> torch.nn.Module:
    from bitsandbytes.nn import Linear4bit

    four = Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=True)
    four.load_state_dict(layer.state_dict())
    return four.to("cpu")


@pytest.mark.parametrize("rounded", [lambda layer: EightBitLinear(layer, "int8"), in_four_bits], ids=["int8", "nf4"])
def test_weights_in_few_bits_count_with_their_scales(rounded: Any) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)
    found = []
    for factor in (1.0, 1.0, 2.0):  # rounded, twice as much has the same codes
        model = torch.nn.Sequential(copy.deepcopy(layer))
        model[0].weight.data.mul_(factor)
        model[0] = rounded(model[0])
        found.append(identity(model))
    assert found[0] == found[1] != found[2]


def kept(world: World, folder: Path) -> KeptByFirst:
    return KeptByFirst(Checkpoints(folder / str(world.rank) / "checkpoints", fingerprint="f", keep=2), world, folder / "0")


def test_the_checkpoints_of_the_first_host_are_those_of_all(tmp_path: Path) -> None:
    def work(world: World) -> tuple[Any, ...]:
        checkpoints = kept(world, tmp_path)
        assert checkpoints.newest(print) is None
        for step in (2, 4):
            weights = {"weight/a": torch.full((2, 3), float(step + 10 * world.rank)), "step/a": torch.tensor(float(step))}
            checkpoints.save(step, weights, {"tokens": step}, best=None)
        checkpoints.discard_after(2)
        found = checkpoints.newest(print)
        assert found is not None and found.tensors["step/a"].shape == ()
        return found.step, found.state["tokens"], found.tensors["weight/a"].tolist(), checkpoints.steps()

    assert on_hosts(work) == [(2, 2, [[2.0] * 3] * 2, [2])] * 2
    assert (tmp_path / "0" / "checkpoints").is_dir() and not (tmp_path / "1" / "checkpoints").exists()


def test_a_damaged_one_is_damaged_for_all_and_a_full_disk_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(world: World) -> None:
        kept(world, tmp_path).save(2, {"weight/a": torch.zeros(3)}, {}, best=None)

    assert on_hosts(save) == [None, None]
    with (tmp_path / "0" / "checkpoints" / "step-00000002" / TENSORS).open("ab") as file:
        file.write(b"more")
    assert all(isinstance(each, Damaged) and TENSORS in str(each) for each in on_hosts(lambda world: kept(world, tmp_path).load(2)))
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 0}))
    first, second = on_hosts(save)
    assert isinstance(first, StorageError) and isinstance(second, DeviceError)
