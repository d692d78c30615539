"""Checkpoints that are whole or not there, and that are not believed without proof.

    checkpoints/step-00000040/
        tensors.safetensors    trained weights and both moments of the optimizer
        state.json             where the run stands, and of which run it is
        MANIFEST.json          size and blake3 of each of the others, and of itself

A checkpoint is written into a hidden folder, synced, and renamed; one that goes is renamed first, then removed. So a
kill at any moment leaves only whole ones under their names. Reading compares every byte with the manifest.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3

from pantheraml.errors import StorageError

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "MANIFEST.json"
_PREFIX, _UNFINISHED, _OLD = "step-", ".unfinished-", ".old-"
_SPARE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was read: `step` steps are done; `state` as it was given to `save`."""

    step: int
    tensors: dict[str, Any]
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

    def save(self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any], *, best: int | None) -> Path:
        """Write the checkpoint of `step` done steps, then let go of those no longer kept; `best` is one that is kept.

        Raises: StorageError if the disk refuses; what is kept of the checkpoints before this one stays as it is.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        out = self._place(step)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            needed = sum(tensor.nbytes for tensor in tensors.values()) + _SPARE_BYTES
            free = shutil.disk_usage(self._folder).free
            if free < needed:
                raise _not_saved(out, f"{needed / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free")
            unfinished = self._folder / f"{_UNFINISHED}{secrets.token_hex(4)}"
            try:
                unfinished.mkdir()
                save_file(dict(tensors), unfinished / TENSORS)
                (unfinished / STATE).write_bytes(_canonical({**state, "step": step, "fingerprint": self._fingerprint}))
                files = {name: _entry(unfinished / name) for name in (STATE, TENSORS)}
                (unfinished / MANIFEST).write_bytes(_signed({"format": 1, "step": step, "files": files}))
                for file in unfinished.iterdir():
                    _sync(file)
                _sync(unfinished)
                if out.exists():  # the same step again, after a resume from an older one
                    self._remove(out)
                unfinished.rename(out)
                _sync(self._folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise _not_saved(out, getattr(error, "strerror", None) or str(error)) from error
        kept = {*self.steps()[-self._keep :], best}
        for other in self.steps():
            if other not in kept:
                self._remove(self._place(other))
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

        place = self._place(step)
        state = self._verified(place, step)
        try:
            return Checkpoint(step, load_file(place / TENSORS), state)
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{place}: {TENSORS} cannot be read: {error}") from error

    def discard_after(self, step: int) -> None:
        """Remove what lies beyond the checkpoint that a run goes on from."""
        for other in self.steps():
            if other > step:
                self._remove(self._place(other))

    def _verified(self, place: Path, step: int) -> dict[str, Any]:
        """The state of a checkpoint in which nothing is missing, added, changed or from elsewhere."""
        try:
            manifest = _read_signed(place / MANIFEST)
            present = {file.name for file in place.iterdir()}
            files: dict[str, dict[str, Any]] = manifest["files"]
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
        except OSError as error:
            raise Damaged(f"{place}: {Path(error.filename or place).name} cannot be read: {error.strerror}") from error
        if state["fingerprint"] != self._fingerprint:
            raise Damaged(f"{place}: it is of another run, with other data or another recipe")
        return state

    def _place(self, step: int) -> Path:
        return self._folder / f"{_PREFIX}{step:08d}"

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
