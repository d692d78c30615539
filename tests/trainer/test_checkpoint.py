"""A checkpoint is whole or not there, and one that was touched is never believed."""

from __future__ import annotations

import errno
import json
import random
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pantheraml.errors import StorageError
from pantheraml.trainer import checkpoint
from pantheraml.trainer.checkpoint import Checkpoints, Damaged

FILES = ("tensors.safetensors", "state.json", "MANIFEST.json")


def tensors(step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "weight/a": torch.randn(4, 8, generator=draw),
        "exp_avg/a": torch.randn(4, 8, generator=draw),
        "step/a": torch.tensor(float(step)),
    }


def opened(folder: Path, *, keep: int = 9, fingerprint: str = "of this run") -> Checkpoints:
    return Checkpoints(folder, fingerprint=fingerprint, keep=keep)


def saved(folder: Path, *steps: int, keep: int = 9, best: int | None = None) -> Checkpoints:
    made = opened(folder, keep=keep)
    for step in steps:
        made.save(step, tensors(step), {"tokens": step * 10, "best_loss": 1 / 3}, best=best)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def test_what_is_loaded_is_what_was_saved(tmp_path: Path):
    found = saved(tmp_path, 5).load(5)
    assert found.step == 5 and found.state["tokens"] == 50 and found.state["best_loss"] == 1 / 3
    assert found.tensors.keys() == tensors(5).keys()
    assert all(torch.equal(found.tensors[name], wanted) for name, wanted in tensors(5).items())


def test_a_folder_that_is_not_there_holds_no_checkpoint(tmp_path: Path):
    nothing = opened(tmp_path / "none")
    assert nothing.steps() == [] and nothing.newest(pytest.fail) is None
    assert not (tmp_path / "none").exists()


def test_the_newest_and_the_best_are_kept(tmp_path: Path):
    made = opened(tmp_path, keep=2)
    for step in range(1, 8):
        made.save(step, tensors(step), {}, best=3 if step >= 3 else 1)
    assert made.steps() == [3, 6, 7]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-00000003", "step-00000006", "step-00000007"]
    assert made.load(3).step == 3


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path: Path):
    saved(tmp_path, 1)
    for name in (".unfinished-0a1b2c3d", ".old-0a1b2c3d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tensors.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    opened(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt", "step-00000001"]


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    made = saved(tmp_path, 4)
    made.save(4, tensors(99), {"again": True}, best=None)
    found = made.load(4)
    assert found.state["again"] is True and torch.equal(found.tensors["weight/a"], tensors(99)["weight/a"])
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000004"]


def test_what_lies_beyond_the_step_gone_on_from_is_removed(tmp_path: Path):
    made = saved(tmp_path, 1, 2, 3)
    made.discard_after(1)
    assert made.steps() == [1]


# ---- Writing is atomic -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a kill is to the code around it: nothing after this line runs."""


@dataclass
class Deadly:
    """Dies at the n-th of the calls that go through it, and does nothing for good from then on."""

    at: int
    calls: int = 0

    def wrap(self, real):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls >= self.at:
                raise Killed
            return real(*args, **kwargs)

        return call


def test_a_kill_at_any_call_to_the_disk_leaves_whole_checkpoints_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every call that changes the folder is in turn the last one; cleaning up does not happen either, as after a kill."""
    import safetensors.torch

    def attempt(folder: Path, at: int) -> bool:
        made = saved(folder, 1, 2, keep=2, best=1)
        deadly = Deadly(at)
        with monkeypatch.context() as patch:
            patch.setattr(safetensors.torch, "save_file", deadly.wrap(safetensors.torch.save_file))
            patch.setattr(checkpoint, "_sync", deadly.wrap(checkpoint._sync))
            patch.setattr(checkpoint.shutil, "rmtree", deadly.wrap(shutil.rmtree))
            for name in ("mkdir", "write_bytes", "rename"):
                patch.setattr(Path, name, deadly.wrap(getattr(Path, name)))
            try:
                made.save(3, tensors(3), {"tokens": 30}, best=1)
                return True
            except Killed:
                return False

    survived = 0
    for at in range(1, 100):
        folder = tmp_path / str(at)
        complete = attempt(folder, at)
        again = opened(folder, keep=2)
        assert set(again.steps()) >= ({1, 3} if complete else {1, 2}) or set(again.steps()) == {1, 2, 3}, at
        for step in again.steps():
            assert torch.equal(again.load(step).tensors["weight/a"], tensors(step)["weight/a"]), at
        assert not [file for file in folder.iterdir() if file.name.startswith(".")], at
        survived += not complete
        if complete:
            break
    assert complete and survived >= 10


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = saved(tmp_path, 1)
    before = contents(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 4096))
    with pytest.raises(StorageError, match=r"step-00000002 could not be saved: 1 MiB are needed and 0 MiB are free") as raised:
        made.save(2, tensors(2), {}, best=None)
    assert "pantheraml resume" in raised.value.fix and raised.value.exit_code == 6
    assert contents(tmp_path) == before


@pytest.mark.parametrize("where", ["tensors", "sync"])
def test_a_disk_that_fills_up_while_writing_leaves_the_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    import safetensors.torch

    made = saved(tmp_path, 1)
    before = contents(tmp_path)

    def full(_: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    if where == "tensors":
        monkeypatch.setattr(safetensors.torch, "save_file", full)
    else:
        monkeypatch.setattr(checkpoint, "_sync", lambda path: full(None, path / "x" if path.is_dir() else path))
    with pytest.raises(StorageError, match="No space left on device"):
        made.save(2, tensors(2), {}, best=None)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    made.save(2, tensors(2), {}, best=None)
    assert made.newest(pytest.fail).step == 2


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from pantheraml.errors import StorageError
from pantheraml.trainer.checkpoint import Checkpoints
made = Checkpoints(Path(sys.argv[1]), fingerprint="of this run", keep=9)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write past the limit fails as one on a full disk does
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    made.save(2, {"weight/a": torch.zeros(100_000)}, {}, best=None)
except StorageError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_file_that_the_system_cuts_off_is_no_checkpoint(tmp_path: Path):
    """A real refusal by the kernel rather than a raised one: files may not be larger than 64 KiB."""
    saved(tmp_path, 1)
    before = contents(tmp_path)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 6, done.stderr
    assert "step-00000002 could not be saved" in done.stdout and "why:" in done.stdout
    assert contents(tmp_path) == before


def test_a_checkpoint_that_cannot_be_removed_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = saved(tmp_path, 1, keep=1)

    def refused(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refused)
    with pytest.raises(StorageError, match=r"could not be removed: Device or resource busy"):
        made.save(2, tensors(2), {}, best=None)
    assert made.load(2).step == 2
    with pytest.raises(StorageError, match=r"\.old-\w+ could not be removed"):
        opened(tmp_path)


# ---- Reading believes nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(tmp_path: Path, file: str):
    made = saved(tmp_path, 1)
    (place(tmp_path, 1) / file).unlink()
    with pytest.raises(Damaged, match=rf"step-00000001: {file} (is missing|cannot be read)"):
        made.load(1)


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_checkpoint_is_named(tmp_path: Path, file: str):
    made = saved(tmp_path, 1, 2)
    shutil.copy(place(tmp_path, 2) / file, place(tmp_path, 1) / file)
    with pytest.raises(Damaged, match=rf"step-00000001: {file} .*another checkpoint"):
        made.load(1)
    assert made.load(2).step == 2


@pytest.mark.parametrize("name", ["more.safetensors", ".hidden", "folder/"])
def test_a_file_that_does_not_belong_is_named(tmp_path: Path, name: str):
    made = saved(tmp_path, 1)
    extra = place(tmp_path, 1) / name.rstrip("/")
    extra.mkdir() if name.endswith("/") else extra.write_bytes(b"")
    with pytest.raises(Damaged, match=rf"step-00000001: {extra.name} does not belong"):
        made.load(1)


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_is_found(tmp_path: Path, file: str):
    """Random places in the tensors and the state, each byte of the manifest."""
    made = saved(tmp_path, 1)
    path = place(tmp_path, 1) / file
    sound = path.read_bytes()
    draw = random.Random(20)
    places = range(len(sound)) if file == "MANIFEST.json" else [0, len(sound) - 1, *(draw.randrange(len(sound)) for _ in range(40))]
    for at in places:
        damaged = bytearray(sound)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(Damaged, match=rf"step-00000001: {file} was changed"):
            made.load(1)
    path.write_bytes(sound)
    assert made.load(1).step == 1


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change", ["cut", "longer", "empty", "a folder"])
def test_another_length_is_found(tmp_path: Path, file: str, change: str):
    made = saved(tmp_path, 1)
    path = place(tmp_path, 1) / file
    sound = path.read_bytes()
    if change == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": sound[:-1], "longer": sound + b"\n", "empty": b""}[change])
    with pytest.raises(Damaged, match=rf"step-00000001: {file} (was changed|has \d+ bytes instead of \d+|cannot be read)"):
        made.load(1)


def test_a_manifest_that_means_the_same_in_other_bytes_was_changed(tmp_path: Path):
    made = saved(tmp_path, 1)
    path = place(tmp_path, 1) / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    with pytest.raises(Damaged, match=r"MANIFEST\.json was changed"):
        made.load(1)


def test_a_whole_checkpoint_under_another_step_is_refused(tmp_path: Path):
    made = saved(tmp_path, 1, 2)
    shutil.rmtree(place(tmp_path, 2))
    place(tmp_path, 1).rename(place(tmp_path, 2))
    with pytest.raises(Damaged, match=r"step-00000002: MANIFEST\.json is of step 1: it comes from another checkpoint"):
        made.load(2)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    saved(tmp_path, 1)
    with pytest.raises(Damaged, match="step-00000001: it is of another run, with other data or another recipe"):
        opened(tmp_path, fingerprint="of another one").load(1)


def test_a_step_that_was_never_saved_is_damaged_rather_than_a_crash(tmp_path: Path):
    with pytest.raises(Damaged, match=r"step-00000007: MANIFEST\.json cannot be read: No such file"):
        saved(tmp_path, 1).load(7)


def test_the_newest_sound_one_is_taken_and_the_damaged_ones_are_announced(tmp_path: Path):
    made = saved(tmp_path, 1, 2, 3)
    (place(tmp_path, 3) / "state.json").unlink()
    flipped = place(tmp_path, 2) / "tensors.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x00\x01")
    said: list[str] = []
    assert made.newest(said.append).step == 1
    assert len(said) == 2
    assert "step-00000003: state.json is missing; it is not used, and the one before it is tried" in said[0]
    assert "step-00000002: tensors.safetensors has" in said[1]


def test_none_sound_is_an_error_that_names_all(tmp_path: Path):
    made = saved(tmp_path, 1, 2)
    for step, file in ((1, "state.json"), (2, "MANIFEST.json")):
        (place(tmp_path, step) / file).write_bytes(b"{}")
    with pytest.raises(StorageError, match="none of the 2 checkpoints") as raised:
        made.newest(lambda text: None)
    assert "step-00000001: state.json" in raised.value.why and "step-00000002: MANIFEST.json" in raised.value.why
    assert "run.name" in raised.value.fix and raised.value.exit_code == 6


def test_names_that_are_no_steps_are_passed_over(tmp_path: Path):
    made = saved(tmp_path, 12)
    for name in ("step-12", "step-²", "step-", "step-x", "step-000000012"):
        (tmp_path / name).mkdir()
    assert made.steps() == [12]
