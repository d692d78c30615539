"""Checkpoints that are whole or not there, and that are not believed without proof.

    checkpoints/step-00000040/
        tensors.safetensors    trained weights and both moments of the optimizer
        state.json             where the run stands, and of which run it is
        MANIFEST.json          size and blake3 of each of the others, and of itself
      and where tensors are divided over processes
        pieces-00000.safetensors, ...    what each process writes of them
        PIECES.json                      dtype and shape of each, and where its pieces begin

A checkpoint is written into a hidden folder, synced, and renamed; one that goes is renamed first, then removed. So a
kill at any moment, of any process, leaves only whole ones under their names. Reading compares every byte with the manifest.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blake3

from pantheraml.distributed.world import Alone, World, stopping, told
from pantheraml.engines.piece import Index, Piece, Stored, file_of, index_of, merged, stored_in
from pantheraml.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

TENSORS, STATE, MANIFEST, PIECES = "tensors.safetensors", "state.json", "MANIFEST.json", "PIECES.json"
_PREFIX, _UNFINISHED, _OLD = "step-", ".unfinished-", ".old-"
_SPARE_BYTES = 1 << 20
_WHOLE, _DIVIDED = 1, 2
"""Formats of the manifest: only the second has pieces."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was read: `step` steps are done; `state` as it was given to `save`.

    A tensor that was divided is `Stored`: nothing of it is read before it is asked for, which must be before the
    checkpoint is let go of.
    """

    step: int
    tensors: dict[str, Tensor | Stored]
    state: dict[str, Any]


class Damaged(ValueError):
    """A checkpoint that is not what was written; the message names the file and what is wrong with it."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds one folder for each. Leftovers of a killed run are removed; nobody else may write here.
        fingerprint: of recipe and data; a checkpoint of other ones is refused.
        keep: how many of the newest stay, besides the best.
    """

    def __init__(self, folder: Path, *, fingerprint: str, keep: int) -> None:
        self._folder, self._fingerprint, self._keep = folder, fingerprint, keep
        for leftover in self._hidden():
            _delete(leftover)

    @property
    def run(self) -> Path:
        """The folder of the run that they belong to."""
        return self._folder.parent

    def steps(self) -> list[int]:
        """Steps for which there is a folder, rising; not yet verified."""
        if not self._folder.is_dir():
            return []
        numbers = (place.name.removeprefix(_PREFIX) for place in self._folder.glob(f"{_PREFIX}*"))
        return sorted(int(number) for number in numbers if number.isdecimal() and number == f"{int(number):08d}")

    def place(self, step: int) -> Path:
        """The folder of the checkpoint of this step, whether there is one or not."""
        return self._folder / f"{_PREFIX}{step:08d}"

    def save(
        self, step: int, tensors: Mapping[str, Tensor | Piece], state: Mapping[str, Any], *, best: int | None, world: World | None = None
    ) -> Path:
        """Write the checkpoint of `step` done steps, then let go of those no longer kept; `best` is one that is kept.

        Args:
            tensors: whole ones, of the same names in each process; the first writes them. And pieces: one that several
                processes have is written by the first of these.
            world: the processes that write it, all of which call this. The folder is that of the first; with pieces, all must
                see it. None: this one alone.
        Raises:
            StorageError: the disk refuses. DeviceError: something failed in another process.
            ValueError: the pieces of a tensor overlap or leave a hole, or the processes have other tensors.
            Whatever it is, what is kept of the checkpoints before this one stays as it is.
        """
        world = world or Alone()
        whole = {name: value for name, value in tensors.items() if not isinstance(value, Piece)}
        with stopping(world):
            like = sorted((name, str(each.dtype), list(each.shape)) for name, each in whole.items())
            own = self.place(step)
            hidden = own.with_name(f"{_UNFINISHED}{secrets.token_hex(4)}").absolute()
            offer = {"out": str(own), "hidden": str(hidden), "like": _hash(json.dumps(like)), "pieces": index_of(tensors, world.rank)}
        offers = [json.loads(each) for each in world.gathered(json.dumps(offer))]
        # From here all know the same, so what is wrong is wrong for all of them.
        out, unfinished = Path(offers[0]["out"]), Path(offers[0]["hidden"])
        index = merged([each["pieces"] for each in offers])
        if other := [rank for rank, each in enumerate(offers) if each["like"] != offers[0]["like"]]:
            raise ValueError(f"process {other[0]} has other whole tensors than the first one: they must be the same in all")
        try:
            told(world, lambda: self._begin(out, unfinished, sum(each.nbytes for each in whole.values()) + _bytes(index)))
            files: dict[str, Any] = {}
            for written in _each(world, lambda: _written(out, unfinished, tensors, index, world)):
                files |= written
            told(world, lambda: self._complete(out, unfinished, step, state, files, index, best))
        finally:
            if world.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
        return out

    def newest(self, announce: Callable[[str], None]) -> Checkpoint | None:
        """The newest sound checkpoint; each damaged one before it is announced by name. None if there is none at all.

        Raises: StorageError if there are checkpoints and none is sound.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                found = self.load(step)
            except Damaged as error:
                damaged.append(str(error))
                announce(f"{error}; it is not used, and the one before it is tried")
                continue
            return found
        if damaged:
            raise StorageError(
                f"none of the {len(damaged)} checkpoints in {self._folder} can be used",
                why="; ".join(damaged),
                fix="restore them from a backup, or start again under another run.name",
            )
        return None

    def load(self, step: int) -> Checkpoint:
        """One checkpoint, every byte compared with its manifest. Raises: Damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        place = self.place(step)
        state, index = self._verified(place, step)
        try:
            return Checkpoint(step, {**load_file(place / TENSORS), **stored_in(place, index)}, state)
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{place}: {TENSORS} cannot be read: {error}") from error

    def discard_after(self, step: int) -> None:
        """Remove what lies beyond the checkpoint that a run goes on from."""
        for other in self.steps():
            if other > step:
                self._remove(self.place(other))

    def _begin(self, out: Path, unfinished: Path, needed: int) -> None:
        """Make the folder to write into, if there is room for so many bytes."""
        needed += _SPARE_BYTES
        with _writing(out):
            self._folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
            if free < needed:
                raise _not_saved(out, f"{needed / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free")
            unfinished.mkdir()

    def _complete(
        self, out: Path, unfinished: Path, step: int, state: Mapping[str, Any], files: Mapping[str, Any], index: Index, best: int | None
    ) -> None:
        """Tensors are written, as `files` says: add the rest, give the folder its name, and let go of older ones."""
        with _writing(out):
            own = {"step": step, "fingerprint": self._fingerprint}
            rest = {STATE: _canonical({**state, **own}), **({PIECES: _canonical(index)} if index else {})}
            for name, content in rest.items():
                (unfinished / name).write_bytes(content)
            files = {**files, **{name: _entry(unfinished / name) for name in rest}}
            (unfinished / MANIFEST).write_bytes(_signed({"format": _DIVIDED if index else _WHOLE, "step": step, "files": files}))
            for name in (*rest, MANIFEST):
                _sync(unfinished / name)
            _sync(unfinished)
            if out.exists():  # the same step again, after a resume from an older one
                self._remove(out)
            unfinished.rename(out)
            _sync(self._folder)
        kept = {*self.steps()[-self._keep :], best}
        for other in self.steps():
            if other not in kept:
                self._remove(self.place(other))

    def _verified(self, place: Path, step: int) -> tuple[dict[str, Any], Index]:
        """State and pieces of a checkpoint in which nothing is missing, added, changed or from elsewhere."""
        try:
            manifest = _read_signed(place / MANIFEST)
            present = {file.name for file in place.iterdir()}
            files: dict[str, dict[str, Any]] = manifest["files"]
            if manifest["format"] not in (_WHOLE, _DIVIDED):
                raise Damaged(f"{place}: {MANIFEST} is of format {manifest['format']}: a newer pantheraml wrote it")
            if manifest["step"] != step:
                raise Damaged(f"{place}: {MANIFEST} is of step {manifest['step']}: it comes from another checkpoint")
            if missing := sorted({*files, MANIFEST} - present):
                raise Damaged(f"{place}: {missing[0]} is missing")
            if extra := sorted(present - {*files, MANIFEST}):
                raise Damaged(f"{place}: {extra[0]} does not belong to it")
            for name, entry in files.items():
                found = _entry(place / name)
                if found != entry:
                    what = f"has {found['bytes']} bytes instead of {entry['bytes']}" if found["bytes"] != entry["bytes"] else "was changed"
                    raise Damaged(f"{place}: {name} {what}: damaged, or from another checkpoint")
            state: dict[str, Any] = json.loads((place / STATE).read_bytes())
            index: Index = json.loads((place / PIECES).read_bytes()) if PIECES in files else {}
        except OSError as error:
            raise Damaged(f"{place}: {Path(error.filename or place).name} cannot be read: {error.strerror}") from error
        if state["fingerprint"] != self._fingerprint:
            raise Damaged(f"{place}: it is of another run, with other data or another recipe")
        return state, index

    def _remove(self, place: Path) -> None:
        hidden = place.with_name(f"{_OLD}{secrets.token_hex(4)}")
        try:
            place.rename(hidden)
        except OSError as error:
            raise _not_removed(place, error) from error
        _delete(hidden)

    def _hidden(self) -> Iterator[Path]:
        for prefix in (_UNFINISHED, _OLD):
            yield from self._folder.glob(f"{prefix}*")


def manifest_of(place: Path) -> str:
    """The manifest of a checkpoint, and so of every byte in it, in one short text. Raises: OSError."""
    return blake3.blake3((place / MANIFEST).read_bytes()).hexdigest()


def pieces_seen(place: Path, manifest: str, world: World) -> dict[str, Stored]:
    """The divided tensors of a checkpoint that the first process has verified.

    Args: manifest: what `manifest_of` gave there.
    Raises: StorageError if this process does not see the same files.
    """
    with suppress(OSError):  # nothing there is as bad as something else
        if manifest_of(place) == manifest:
            return stored_in(place, json.loads((place / PIECES).read_bytes()))
    raise not_shared(place, world)


def not_shared(place: Path, world: World) -> StorageError:
    """The error of a process that does not see what the first one made at this place."""
    return StorageError(
        f"process {world.rank} of {world.size} does not see {place} as the first one does",
        why="the model is divided over the processes, and each writes and reads its own part of a checkpoint in that folder",
        fix="set run.folder to a folder on a disk that all hosts share, and start again on all of them",
    )


def _written(out: Path, unfinished: Path, tensors: Mapping[str, Tensor | Piece], index: Index, world: World) -> dict[str, Any]:
    """Write what this process has to write, to the disk; name -> size and blake3 of each file."""
    from safetensors.torch import save_file

    if index and not unfinished.is_dir():
        raise not_shared(unfinished, world)
    own = file_of(world.rank)
    mine = {name for name, entry in index.items() if any(part["file"] == own for part in entry["pieces"])}
    whole = {name: value for name, value in tensors.items() if not isinstance(value, Piece)}
    pieces = {name: value.tensor.contiguous() for name, value in tensors.items() if isinstance(value, Piece) and name in mine}
    files = {**({TENSORS: whole} if world.rank == 0 else {}), **({own: pieces} if pieces else {})}
    with _writing(out):
        for name, content in files.items():
            save_file(content, unfinished / name)
        entries = {name: _entry(unfinished / name) for name in files}
        for name in files:
            _sync(unfinished / name)
    return entries


def _each(world: World, do: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """What each process came to, by rank, once all have ended: the first may clear up, and nobody writes any more.

    Raises: StorageError if the disk refused here, DeviceError if it did elsewhere.
    """
    failed: StorageError | None = None
    done: dict[str, Any] = {}
    with stopping(world):
        try:
            done = do()
        except StorageError as error:
            failed = error
    answers = [json.loads(each) for each in world.gathered(json.dumps({"done": done, "failed": failed is not None}))]
    with stopping(world):
        if failed:
            raise failed
    if any(answer["failed"] for answer in answers):
        world.gathered("")  # here they hear why
    return [answer["done"] for answer in answers]


def _bytes(index: Index) -> int:
    import torch

    return sum(math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize for entry in index.values())


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """What the disk refuses in the block is said of the checkpoint that it was for."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _not_saved(out, getattr(error, "strerror", None) or str(error)) from error


def _hash(text: str) -> str:
    return blake3.blake3(text.encode()).hexdigest()


def _canonical(values: Mapping[str, Any]) -> bytes:
    """The one way to write these values: any other bytes were changed."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _signed(manifest: Mapping[str, Any]) -> bytes:
    return _canonical({**manifest, "blake3": blake3.blake3(_canonical(manifest)).hexdigest()})


def _read_signed(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
        own = {key: value for key, value in manifest.items() if key != "blake3"}
        intact = raw == _signed(own)
    except (ValueError, AttributeError):
        intact, own = False, {}
    if not intact:
        raise Damaged(f"{path.parent}: {path.name} was changed")
    return own


def _entry(path: Path) -> dict[str, Any]:
    seen = blake3.blake3()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            seen.update(block)
    return {"bytes": path.stat().st_size, "blake3": seen.hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise _not_removed(folder, error) from error


def _not_removed(place: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{place} could not be removed: {error.strerror or error}",
        why="it is not kept any longer, and the disk would fill with such folders; no other checkpoint is touched",
        fix=f"correct the permissions of the folder, then go on with: pantheraml resume {place.parent.parent}",
    )


def _not_saved(out: Path, reason: str) -> StorageError:
    return StorageError(
        f"the checkpoint {out} could not be saved: {reason}",
        why="it is written beside its place and moved there when complete, so the checkpoints before it are untouched",
        fix=f"free space on the disk, then go on with: pantheraml resume {out.parent.parent}",
    )
