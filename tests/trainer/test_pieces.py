"""Checkpoints of tensors that are divided over processes, with threads in the place of processes."""

from __future__ import annotations

import errno
import itertools
import json
import math
import random
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.threads import on_hosts
from torch import Tensor

from pantheraml.distributed.world import Alone, World
from pantheraml.engines.engine import check_fits
from pantheraml.engines.piece import Piece, Stored, read_part, read_whole
from pantheraml.errors import DeviceError, StorageError
from pantheraml.trainer import checkpoint
from pantheraml.trainer.checkpoint import Checkpoints, Damaged
from pantheraml.trainer.hosts import KeptByFirst

Box = tuple[tuple[int, ...], tuple[int, ...]]


def whole(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "weight/a": torch.randn(7, 5, generator=draw),
        "weight/b": torch.randn(3, 4, 2, generator=draw).bfloat16(),
        "weight/c": torch.randn(2, generator=draw),
        "codes/a": torch.randint(256, (5, 6), generator=draw, dtype=torch.uint8),
    }


def rows(shape: tuple[int, ...], rank: int, size: int) -> Box:
    """Offsets and shape of what `torch.chunk` gives this process of the first dimension: nothing, where rows run out."""
    each = math.ceil(shape[0] / size)
    start = min(rank * each, shape[0])
    return (start, *([0] * (len(shape) - 1))), (min(each, shape[0] - start), *shape[1:])


def grid(shape: tuple[int, ...], rank: int, across: int, along: int) -> Box:
    """The first dimension divided by `across` groups, the second by `along` processes in each."""
    (first, *_), (many, *_) = rows(shape, rank // along, across)
    (second, *_), (wide, *_) = rows(shape[1:], rank % along, along)
    return (first, second, *([0] * (len(shape) - 2))), (many, wide, *shape[2:])


def cut(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(offset, offset + size) for offset, size in zip(*box, strict=True))]


def piece(tensor: Tensor, box: Box) -> Piece:
    return Piece(cut(tensor, box).clone(), tuple(tensor.shape), box[0])


def of_rank(step: int, world: World) -> dict[str, Any]:
    """What a process has: its rows of all, and one tensor that is whole in each."""
    divided = {name: piece(tensor, rows(tuple(tensor.shape), world.rank, world.size)) for name, tensor in whole(step).items()}
    return {**divided, "step/a": torch.tensor(float(step))}


def kept(world: World, folder: Path, keep: int = 9) -> KeptByFirst:
    """As several processes have them; the others have a folder of their own, which stays empty."""
    own = folder if world.rank == 0 else folder.parent / f"other-{world.rank}"
    return KeptByFirst(Checkpoints(own, fingerprint="f", keep=keep), world, folder.parent)


def opened(folder: Path) -> Checkpoints:
    return Checkpoints(folder, fingerprint="f", keep=9)


def save_on(folder: Path, size: int, *steps: int, state: Callable[[int, World], dict[str, Any]] = of_rank) -> list[Any]:
    def work(world: World) -> None:
        checkpoints = kept(world, folder)
        for step in steps:
            checkpoints.save(step, state(step, world), {"tokens": step * 10}, best=None)

    return on_hosts(work, size)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert found.contiguous().flatten().view(torch.uint8).tolist() == wanted.contiguous().flatten().view(torch.uint8).tolist()


def assert_holds(folder: Path, step: int) -> None:
    """One process reads what was divided, as it was before."""
    found = opened(folder).load(step)
    assert found.step == step and found.state["tokens"] == step * 10
    assert found.tensors.keys() == {*whole(step), "step/a"}
    assert_same(read_whole(found.tensors["step/a"]), torch.tensor(float(step)))
    for name, wanted in whole(step).items():
        assert isinstance(found.tensors[name], Stored)
        assert_same(read_whole(found.tensors[name]), wanted)


# ---- What is written is what is read, by any number of processes ---------------------------------------------------


@pytest.mark.parametrize("writers", [1, 2, 5])
@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_another_number_of_processes_reads_its_own_rows(tmp_path: Path, writers: int, readers: int) -> None:
    """Seven rows over five processes are 2, 2, 2, 1 and none."""
    folder = tmp_path / "checkpoints"
    assert save_on(folder, writers, 4) == [None] * writers

    def read(world: World) -> bool:
        found = kept(world, folder).newest(pytest.fail)
        assert found is not None and (found.step, found.state["tokens"]) == (4, 40)
        check_fits(found.tensors, {**{name: tuple(tensor.shape) for name, tensor in whole(4).items()}, "step/a": ()})
        assert_same(read_whole(found.tensors["step/a"]), torch.tensor(4.0))
        for name, wanted in whole(4).items():
            box = rows(tuple(wanted.shape), world.rank, world.size)
            assert_same(read_part(found.tensors[name], *box), cut(wanted, box))
        return True

    assert on_hosts(read, readers) == [True] * readers
    assert not list(tmp_path.glob("other-*"))


def test_pieces_of_two_dimensions_are_read_in_rows_and_columns(tmp_path: Path) -> None:
    """Written by 2 x 3 processes, whose pieces are not equal; read by 3 x 2, and by rows of each length."""
    wanted = torch.arange(7 * 5 * 2, dtype=torch.float32).reshape(7, 5, 2)
    folder = tmp_path / "checkpoints"
    assert save_on(folder, 6, 1, state=lambda step, world: {"w": piece(wanted, grid((7, 5, 2), world.rank, 2, 3))}) == [None] * 6
    found = opened(folder).load(1).tensors["w"]
    for rank in range(6):
        box = grid((7, 5, 2), rank, 3, 2)
        assert_same(read_part(found, *box), cut(wanted, box))
    for start, end in itertools.combinations(range(8), 2):
        box = ((start, 1, 0), (end - start, 3, 2))
        assert_same(read_part(found, *box), cut(wanted, box))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_division_is_read_in_any_other(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Each dimension is cut once at most, so up to eight processes have boxes of different sizes."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    wanted = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    cuts = [(0, data.draw(st.integers(0, size)), size) for size in shape]
    spans = [[(start, end - start) for start, end in itertools.pairwise(each)] for each in cuts]
    boxes: list[Box] = [(tuple(a for a, _ in each), tuple(n for _, n in each)) for each in itertools.product(*spans)]
    boxes = data.draw(st.permutations(boxes))
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    assert save_on(folder, len(boxes), 1, state=lambda step, world: {"w": piece(wanted, boxes[world.rank])}) == [None] * len(boxes)
    found = opened(folder).load(1).tensors["w"]
    starts = tuple(data.draw(st.integers(0, size)) for size in shape)
    sizes = tuple(data.draw(st.integers(0, size - start)) for size, start in zip(shape, starts, strict=True))
    assert_same(read_part(found, starts, sizes), cut(wanted, (starts, sizes)))
    assert_same(read_whole(found), wanted)


def test_pieces_need_no_common_edges(tmp_path: Path) -> None:
    """Four boxes around a fifth: no line through the square divides them."""
    boxes = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    wanted = torch.arange(9.0).reshape(3, 3)
    assert save_on(tmp_path / "c", 5, 1, state=lambda step, world: {"w": piece(wanted, boxes[world.rank])}) == [None] * 5
    assert_same(read_whole(opened(tmp_path / "c").load(1).tensors["w"]), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_every_dtype_keeps_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted = torch.randint(2, (6, 5 * dtype.itemsize), dtype=torch.uint8).mul(1 if dtype == torch.bool else 77).view(dtype)
    folder = tmp_path / "checkpoints"
    assert save_on(folder, 2, 1, state=lambda step, world: {"w": piece(wanted, grid((6, 5), world.rank, 1, 2))}) == [None, None]
    found = opened(folder).load(1).tensors["w"]
    assert (found.dtype, tuple(found.shape), found.nbytes) == (dtype, (6, 5), wanted.nbytes)
    assert_same(read_whole(found), wanted)
    assert_same(read_part(found, (2, 1), (3, 3)), wanted[2:5, 1:4])


def test_numbers_and_tensors_without_elements_can_be_divided_too(tmp_path: Path) -> None:
    state = {"number": Piece(torch.tensor(2.5), (), ()), "nothing": Piece(torch.zeros(0, 3), (0, 3), (0, 0))}
    assert save_on(tmp_path / "several", 2, 1, state=lambda step, world: state) == [None, None]
    opened(tmp_path / "one").save(1, state, {"tokens": 10}, best=None)
    assert contents(tmp_path / "one") == contents(tmp_path / "several")
    found = opened(tmp_path / "one").load(1).tensors
    assert_same(read_whole(found["number"]), torch.tensor(2.5))
    assert_same(read_whole(found["nothing"]), torch.zeros(0, 3))


def test_a_part_that_is_not_in_the_whole_is_refused(tmp_path: Path) -> None:
    save_on(tmp_path / "checkpoints", 2, 1)
    stored = opened(tmp_path / "checkpoints").load(1).tensors["weight/a"]
    for value in (stored, whole(1)["weight/a"]):
        for box in (((5, 0), (3, 5)), ((-1, 0), (2, 5)), ((0,), (7,)), ((0, 0), (-1, 5))):
            with pytest.raises(ValueError, match=r"does not lie in a tensor of shape \[7, 5\]"):
                read_part(value, *box)
    with pytest.raises(ValueError, match=r"\[2, 5\] from \[6, 0\] does not lie in a tensor of shape \[7, 5\]"):
        Piece(torch.zeros(2, 5), (7, 5), (6, 0))
    assert Piece(torch.zeros(0, 5), (7, 5), (8, 0)).nbytes == 0


def test_only_the_files_that_hold_a_part_are_read(tmp_path: Path) -> None:
    save_on(tmp_path / "checkpoints", 2, 1)
    stored = opened(tmp_path / "checkpoints").load(1).tensors["weight/a"]
    (place(tmp_path / "checkpoints", 1) / "pieces-00001.safetensors").unlink()
    assert_same(read_part(stored, (1, 2), (3, 2)), whole(1)["weight/a"][1:4, 2:4])
    with pytest.raises(StorageError, match=r"weight/a cannot be read from pieces-00001\.safetensors: No such file"):
        read_whole(stored)


# ---- The files ------------------------------------------------------------------------------------------------------


def test_each_process_writes_a_file_and_the_manifest_names_all(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_on(folder, 3, 1)
    files = {file.name for file in place(folder, 1).iterdir()}
    pieces = {f"pieces-{rank:05d}.safetensors" for rank in range(3)}
    assert files == {"tensors.safetensors", "state.json", "PIECES.json", "MANIFEST.json"} | pieces
    manifest = json.loads((place(folder, 1) / "MANIFEST.json").read_bytes())
    assert manifest["format"] == 2 and manifest["files"].keys() == files - {"MANIFEST.json"}
    for name, entry in manifest["files"].items():
        raw = (place(folder, 1) / name).read_bytes()
        assert entry == {"bytes": len(raw), "blake3": blake3.blake3(raw).hexdigest()}
    # Two elements over three processes: the third has none of them, and its file does not name it.
    third = safetensors.torch.load_file(place(folder, 1) / "pieces-00002.safetensors")
    assert third.keys() == {"weight/a", "weight/b", "codes/a"} and third["weight/a"].shape == (1, 5)
    assert safetensors.torch.load_file(place(folder, 1) / "tensors.safetensors").keys() == {"step/a"}
    index = json.loads((place(folder, 1) / "PIECES.json").read_bytes())
    assert index["weight/c"] == {
        "dtype": "float32",
        "shape": [2],
        "pieces": [{"file": f"pieces-0000{rank}.safetensors", "offsets": [rank], "shape": [1]} for rank in range(2)],
    }


def test_copies_are_written_once_by_the_first_that_has_them(tmp_path: Path) -> None:
    """Two groups of two, as where a model is divided in each of two hosts; and what only the second group has."""
    folder = tmp_path / "checkpoints"

    def state(step: int, world: World) -> dict[str, Any]:
        found = {name: piece(tensor, rows(tuple(tensor.shape), world.rank % 2, 2)) for name, tensor in whole(step).items()}
        found["late"] = Piece(torch.zeros(4) if world.rank >= 2 else torch.zeros(0), (4,), (0,))
        return found

    assert save_on(folder, 4, 1, state=state) == [None] * 4
    sizes = {file.name: file.stat().st_size for file in place(folder, 1).glob("pieces-*")}
    assert sizes.keys() == {f"pieces-0000{rank}.safetensors" for rank in (0, 1, 2)}
    files = [safetensors.torch.load_file(place(folder, 1) / name) for name in sorted(sizes)]
    assert [each.keys() for each in files] == [whole(1).keys(), whole(1).keys(), {"late"}]
    written = sum(tensor.nbytes for file in files for tensor in file.values())
    assert written == sum(tensor.nbytes for tensor in whole(1).values()) + 16
    found = opened(folder).load(1).tensors
    assert all(torch.equal(read_whole(found[name]), wanted) for name, wanted in whole(1).items())


def test_without_pieces_the_files_are_those_of_one_process(tmp_path: Path) -> None:
    one, several = tmp_path / "one" / "checkpoints", tmp_path / "several" / "checkpoints"
    opened(one).save(1, whole(1), {"tokens": 10}, best=None)
    assert save_on(several, 3, 1, state=lambda step, world: whole(step)) == [None] * 3
    assert contents(one) == contents(several)
    assert sorted(file.name for file in place(one, 1).iterdir()) == ["MANIFEST.json", "state.json", "tensors.safetensors"]
    assert json.loads((place(one, 1) / "MANIFEST.json").read_bytes())["format"] == 1


def compact(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def write_by_hand(at: Path, step: int, format: int, **more: dict[str, Any]) -> None:
    """A checkpoint as they were before there were pieces, from what the manifest is said to hold."""
    at.mkdir(parents=True)
    safetensors.torch.save_file(whole(step), at / "tensors.safetensors")
    (at / "state.json").write_bytes(compact({"step": step, "tokens": 10, "fingerprint": "f"}))
    raw = {file.name: file.read_bytes() for file in at.iterdir()}
    files = {name: {"bytes": len(each), "blake3": blake3.blake3(each).hexdigest()} for name, each in raw.items()}
    manifest = {"format": format, "step": step, "files": files}
    (at / "MANIFEST.json").write_bytes(compact({**manifest, "blake3": blake3.blake3(compact(manifest)).hexdigest()}))


def test_a_checkpoint_from_before_there_were_pieces_is_read_by_any_number(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    write_by_hand(place(folder, 1), 1, 1)

    def read(world: World) -> bool:
        found = kept(world, folder).newest(pytest.fail)
        assert found is not None and found.step == 1
        for name, wanted in whole(1).items():
            box = rows(tuple(wanted.shape), world.rank, world.size)
            assert_same(read_part(found.tensors[name], *box), cut(wanted, box))
        return True

    assert on_hosts(read, 2) == [True, True]
    found = opened(folder).load(1)
    assert all(isinstance(tensor, Tensor) for tensor in found.tensors.values()) and found.state["tokens"] == 10
    opened(tmp_path / "again").save(1, whole(1), {"tokens": 10}, best=None)
    assert contents(tmp_path / "again") == contents(folder)


def test_a_format_of_the_future_is_refused(tmp_path: Path) -> None:
    write_by_hand(place(tmp_path, 1), 1, 3)
    with pytest.raises(Damaged, match=r"MANIFEST\.json is of format 3: a newer pantheraml wrote it"):
        opened(tmp_path).load(1)


# ---- What does not make up a whole ----------------------------------------------------------------------------------


def boxes_of(*boxes: Box, shape: tuple[int, ...] = (4, 4)) -> Callable[[int, World], dict[str, Any]]:
    def state(step: int, world: World) -> dict[str, Any]:
        return {
            "weight/ok": piece(torch.zeros(4), rows((4,), world.rank, world.size)),
            "weight/a": piece(torch.zeros(shape), boxes[world.rank]),
        }

    return state


MIXED = {
    "a hole": (boxes_of(((0, 0), (2, 4)), ((3, 0), (1, 4))), r"weight/a \[4, 4\]: its 2 pieces hold 12 of 16 elements"),
    "a part": (boxes_of(((0, 0), (4, 2)), ((0, 0), (4, 2))), r"weight/a \[4, 4\]: its 1 pieces hold 8 of 16 elements"),
    "rows twice": (
        boxes_of(((0, 0), (3, 4)), ((2, 0), (2, 4))),
        r"weight/a \[4, 4\]: \[3, 4\] from \[0, 0\] \(pieces-00000.safetensors\) and \[2, 4\] from \[2, 0\] .* overlap",
    ),
    "a corner twice, and one missing": (boxes_of(((0, 0), (4, 3)), ((3, 2), (1, 2))), "weight/a .* overlap"),
    "as many elements as wanted": (boxes_of(((0, 0), (2, 4)), ((1, 0), (2, 4))), "weight/a .* overlap"),
    "one inside the other": (boxes_of(((0, 0), (4, 4)), ((1, 1), (1, 1))), "weight/a .* overlap"),
    "another dtype": (
        lambda step, world: {"weight/a": Piece(torch.zeros(2, dtype=[torch.float32, torch.bfloat16][world.rank]), (4,), (2 * world.rank,))},
        r"weight/a is bfloat16 \[4\] in process 1, and float32 \[4\] in one before it",
    ),
    "another shape": (
        lambda step, world: {"weight/a": Piece(torch.zeros(2), (4 + world.rank,), (2 * world.rank,))},
        r"weight/a is float32 \[5\] in process 1, and float32 \[4\]",
    ),
    "whole and a piece": (
        lambda step, world: {"weight/a": torch.zeros(4), **({"weight/a": Piece(torch.zeros(4), (4,), (0,))} if world.rank else {})},
        "process 1 has other whole tensors than the first one",
    ),
    "a name in one process only": (
        lambda step, world: {f"weight/{world.rank}": torch.zeros(4)},
        "process 1 has other whole tensors than the first one",
    ),
}


@pytest.mark.parametrize("what", MIXED)
def test_pieces_that_are_no_whole_are_refused_by_all_before_anything_is_written(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "checkpoints"
    save_on(folder, 2, 1)
    before = contents(folder)
    state, said = MIXED[what]
    found = save_on(folder, 2, 2, state=state)
    for each in found:
        with pytest.raises(ValueError, match=said):
            raise each
    assert contents(folder) == before and sorted(file.name for file in folder.iterdir()) == ["step-00000001"]


# ---- Writing is atomic ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a kill is to the code around it: nothing after this line runs."""


class Deadly:
    """Kills a process, or all of them (None), at the n-th call that goes through it; who is dead does nothing for good."""

    def __init__(self, rank: int | None, at: int) -> None:
        self.rank, self.at, self.calls, self.here = rank, at, 0, threading.local()
        self._lock = threading.Lock()

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            rank = getattr(self.here, "rank", None)
            if rank is not None and self.rank in (None, rank):
                with self._lock:
                    self.calls += 1
                    if self.calls >= self.at:
                        raise Killed
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("victim", [0, 1, 2, None])
def test_a_kill_of_any_process_at_any_call_leaves_whole_checkpoints_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int | None
) -> None:
    start = tmp_path / "start"
    save_on(start, 3, 1, 2)

    def attempt(folder: Path, at: int) -> bool:
        shutil.copytree(start, folder)
        deadly = Deadly(victim, at)

        def work(world: World) -> bool:
            checkpoints = kept(world, folder, keep=1)
            deadly.here.rank = world.rank
            try:
                checkpoints.save(3, of_rank(3, world), {"tokens": 30}, best=1)
                return True
            except (Killed, DeviceError):
                return False

        with monkeypatch.context() as patch:
            patch.setattr(safetensors.torch, "save_file", deadly.wrap(safetensors.torch.save_file))
            patch.setattr(checkpoint, "_sync", deadly.wrap(checkpoint._sync))
            patch.setattr(checkpoint, "_entry", deadly.wrap(checkpoint._entry))
            patch.setattr(checkpoint.shutil, "rmtree", deadly.wrap(shutil.rmtree))
            for name in ("mkdir", "write_bytes", "rename"):
                patch.setattr(Path, name, deadly.wrap(getattr(Path, name)))
            done = on_hosts(work, 3)
        assert all(isinstance(each, bool) for each in done), done
        return all(done)

    survived = 0
    for at in range(1, 100):
        folder = tmp_path / str(at) / "checkpoints"
        complete = attempt(folder, at)
        steps = opened(folder).steps()
        assert steps in ([[1, 3]] if complete else [[1, 2], [1, 2, 3], [1, 3]]), at
        for step in steps:
            assert_holds(folder, step)
        assert not [file for file in folder.iterdir() if file.name.startswith(".")], at
        survived += not complete
        if complete:
            break
    assert complete and survived >= (3 if victim in (1, 2) else 15)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("call", ["save_file", "_entry", "_sync"])
def test_a_disk_that_refuses_one_process_stops_all_and_leaves_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, call: str
) -> None:
    """The others are slower, so that what they write would come after the end, if nobody waited for them."""
    folder = tmp_path / "checkpoints"
    save_on(folder, 3, 1)
    before = contents(folder)
    home = safetensors.torch if call == "save_file" else checkpoint
    real, here = getattr(home, call), threading.local()

    def full(*args: Any) -> Any:
        if here.rank == rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(0.05)
        return real(*args)

    def work(world: World) -> None:
        here.rank = world.rank
        kept(world, folder).save(2, of_rank(2, world), {"tokens": 20}, best=None)

    monkeypatch.setattr(home, call, full)
    found = on_hosts(work, 3)
    for other, each in enumerate(found):
        if other == rank:
            assert isinstance(each, StorageError) and "step-00000002 could not be saved: No space left on device" in each.what
            assert str(folder.parent) in each.fix
        else:
            assert isinstance(each, DeviceError) and f"host {rank} of 3 has stopped: the checkpoint" in str(each)
    monkeypatch.undo()
    assert contents(folder) == before and [file.name for file in folder.iterdir()] == ["step-00000001"]
    assert save_on(folder, 3, 2) == [None] * 3
    assert_holds(folder, 2)


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_what_is_no_matter_of_the_disk_stops_all_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    folder, real, here = tmp_path / "checkpoints", checkpoint._written, threading.local()

    def broken(*args: Any) -> Any:
        if here.rank == 1:
            raise error
        return real(*args)

    def work(world: World) -> str:
        here.rank = world.rank
        try:
            kept(world, folder).save(2, of_rank(2, world), {}, best=None)
        except (ValueError, KeyboardInterrupt, DeviceError) as raised:
            return repr(raised) if world.rank == 1 else str(raised)
        return "saved"

    monkeypatch.setattr(checkpoint, "_written", broken)
    first, second = on_hosts(work, 2)
    assert second == repr(error) and f"host 1 of 2 has stopped: {error!r}" in str(first)
    assert list(folder.iterdir()) == []


def test_room_is_asked_for_all_pieces_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 5 << 20))

    def state(step: int, world: World) -> dict[str, Any]:
        return {"w": Piece(torch.zeros(1 << 20, dtype=torch.bfloat16), (2 << 20,), (world.rank << 20,))}

    first, second = save_on(tmp_path / "checkpoints", 2, 1, state=state)
    assert first is None and second is None
    first, second = save_on(tmp_path / "checkpoints", 2, 2, state=lambda step, world: {**state(step, world), "x": torch.zeros(1)})
    assert isinstance(first, StorageError) and "5 MiB are needed and 5 MiB are free" in first.what
    assert isinstance(second, DeviceError) and opened(tmp_path / "checkpoints").steps() == [1]


# ---- A folder that not all processes see ----------------------------------------------------------------------------


def blind(monkeypatch: pytest.MonkeyPatch, folder: Path) -> threading.local:
    """On the host of the second process the folder of the first is not there."""
    here = threading.local()
    for name in ("is_dir", "read_bytes"):
        real = getattr(Path, name)

        def call(path: Path, *args: Any, real: Callable[..., Any] = real, name: str = name) -> Any:
            if getattr(here, "rank", 0) == 1 and folder in path.parents:
                if name == "is_dir":
                    return False
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
            return real(path, *args)

        monkeypatch.setattr(Path, name, call)
    return here


@pytest.mark.parametrize("verb", ["save", "newest", "check_shared"])
def test_pieces_need_a_disk_that_all_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    folder = tmp_path / "checkpoints"
    save_on(folder, 2, 1)
    before = contents(folder)
    assert on_hosts(lambda world: kept(world, folder).check_shared(), 2) == [None, None]
    here = blind(monkeypatch, tmp_path)

    def work(world: World) -> None:
        here.rank = world.rank
        match verb:
            case "save":
                kept(world, folder).save(2, of_rank(2, world), {}, best=None)
            case "newest":
                kept(world, folder).newest(pytest.fail)
            case _:
                kept(world, folder).check_shared()

    first, second = on_hosts(work, 2)
    assert isinstance(second, StorageError) and "process 1 of 2 does not see" in second.what and str(tmp_path) in second.what
    assert "divided over the processes" in second.why and "on a disk that all hosts share" in second.fix
    assert isinstance(first, DeviceError) and "host 1 of 2 has stopped: process 1 of 2 does not see" in str(first)
    monkeypatch.undo()
    assert contents(folder) == before and [file.name for file in folder.iterdir()] == ["step-00000001"]
    assert list(tmp_path.iterdir()) == [folder]


def test_another_checkpoint_under_the_same_path_is_not_believed(tmp_path: Path) -> None:
    """Each host has a disk of its own, with the run of a same name and other contents on it."""
    folder, other = tmp_path / "checkpoints", tmp_path / "elsewhere"
    save_on(folder, 2, 1)
    save_on(other, 2, 1, state=lambda step, world: of_rank(9, world))
    manifest = checkpoint.manifest_of(place(folder, 1))
    assert checkpoint.pieces_seen(place(folder, 1), manifest, Alone()).keys() == whole(1).keys()
    with pytest.raises(StorageError, match="does not see"):
        checkpoint.pieces_seen(place(other, 1), manifest, Alone())


def test_whole_tensors_need_no_disk_in_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = blind(monkeypatch, tmp_path / "checkpoints")

    def work(world: World) -> float:
        here.rank = world.rank
        checkpoints = kept(world, tmp_path / "checkpoints")
        checkpoints.save(1, {"w": torch.tensor(1.0 + world.rank)}, {}, best=None)
        found = checkpoints.newest(pytest.fail)
        assert found is not None
        return read_whole(found.tensors["w"]).item()

    assert on_hosts(work, 2) == [1.0, 1.0]


# ---- Reading believes nothing ---------------------------------------------------------------------------------------


FILES = ("tensors.safetensors", "pieces-00000.safetensors", "pieces-00001.safetensors", "state.json", "PIECES.json", "MANIFEST.json")


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_in_any_file_is_found_and_the_one_before_is_taken(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "checkpoints"
    save_on(folder, 2, 1, 2)
    path = place(folder, 2) / file
    sound = path.read_bytes()
    draw = random.Random(4)
    for at in (0, len(sound) - 1, *(draw.randrange(len(sound)) for _ in range(10))):
        damaged = bytearray(sound)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(Damaged, match=rf"step-00000002: {file} was changed"):
            opened(folder).load(2)

    said: list[str] = []

    def read(world: World) -> int:
        found = kept(world, folder).newest(said.append)
        assert found is not None
        wanted = whole(1)["weight/a"]
        assert_same(read_whole(found.tensors["weight/a"]), wanted)
        return found.step

    assert on_hosts(read, 3) == [1, 1, 1]
    assert len(said) == 1 and f"step-00000002: {file} was changed" in said[0]  # the first process alone says it
    damaged_for_all = on_hosts(lambda world: kept(world, folder).load(2), 2)
    assert all(isinstance(each, Damaged) and file in str(each) for each in damaged_for_all)


@pytest.mark.parametrize("file", [file for file in FILES if file.lower().startswith("pieces")])
def test_a_missing_or_foreign_file_of_pieces_is_named(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "checkpoints"
    save_on(folder, 2, 1)
    save_on(folder, 3, 2)
    shutil.copy(place(folder, 2) / file, place(folder, 1) / file)
    with pytest.raises(Damaged, match=rf"step-00000001: {file} .*another checkpoint"):
        opened(folder).load(1)
    (place(folder, 1) / file).unlink()
    with pytest.raises(Damaged, match=rf"step-00000001: {file} is missing"):
        opened(folder).load(1)
    shutil.copy(place(folder, 2) / "pieces-00002.safetensors", place(folder, 1))
    with pytest.raises(Damaged, match="step-00000001: "):
        opened(folder).load(1)
