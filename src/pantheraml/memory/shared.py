"""What many records need to be decoded, dictionaries and models: each kept twice, so that a damaged byte costs none of them."""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

import blake3

from pantheraml.errors import StorageError

if TYPE_CHECKING:
    from pantheraml.memory.seal import Seal

ID_BYTES = 8
_ABOUT = b"shared"
_log = getLogger(__name__)


class Shared:
    """A folder of immutable things, known by the first 8 bytes of their blake3: `ID.suffix`, and `ID.suffix.copy` beside it.

    Safe to use from several threads. Several processes may read; the one that may write holds the store's lock.

    Args:
        folder: made if it is not there. readonly: write nothing. announce: hears of each damaged or missing file that was met, once.
        seal: what seals the files now; None: nothing does. An id is that of the data, not of the sealed file.
    Raises: StorageError if the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        *,
        readonly: bool = False,
        announce: Callable[[str], None] = _log.warning,
        seal: Callable[[], Seal | None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._seal = seal
        self._readonly = readonly
        self._announce = announce
        self._announced: set[Path] = set()
        self._lock = threading.Lock()
        if not readonly:
            self._tidy()

    def put(self, data: bytes, suffix: str) -> bytes:
        """Keeps the data, twice and durably, and gives its id. Putting it again mends what is damaged of it."""
        id = blake3.blake3(data).digest(ID_BYTES)
        with self._lock:
            for path in self._paths(id, suffix):
                if self._sound(path, id) is None:
                    self._write(path, data)
        return id

    def seal_again(self) -> None:
        """Everything with the newest data key. Raises: StorageError if the disk refuses, or both files of something are damaged."""
        for name in {path.name.removesuffix(".copy") for path in self._folder.iterdir()}:
            if _NAME.fullmatch(name):
                id, suffix = bytes.fromhex(name.split(".")[0]), name.split(".")[1]
                data = self.get(id, suffix)
                with self._lock:
                    for path in self._paths(id, suffix):
                        self._write(path, data)

    def get(self, id: bytes, suffix: str) -> bytes:
        """The data of an id, from the copy if the file is damaged or gone; that is announced, and mended where we may write.

        Raises: StorageError naming both files if both are damaged or gone.
        """
        file, copy = self._paths(id, suffix)
        with self._lock:
            data = self._sound(file, id)
            if data is None:
                data = self._sound(copy, id)
                if data is None:
                    raise _lost(file, copy)
                self._say(file, self._mend(file, data))
            return data

    def ids(self, suffix: str) -> list[bytes]:
        """Of everything with this suffix."""
        found = {path.name.split(".")[0] for pattern in (f"*.{suffix}", f"*.{suffix}.copy") for path in self._folder.glob(pattern)}
        return sorted(bytes.fromhex(name) for name in found if _NAME.fullmatch(f"{name}.{suffix}"))

    def verify(self) -> list[str]:
        """Reads every file. Gives a sentence for each problem; what one sound file is left of is mended where we may write."""
        problems: list[str] = []
        with self._lock:
            found = {path.name.removesuffix(".copy") for path in self._folder.iterdir()} if self._folder.is_dir() else set[str]()
            for name in sorted(found):
                if not _NAME.fullmatch(name):
                    if not name.endswith(".part"):
                        problems.append(f"{self._folder / name} is not one of the store's files")
                    continue
                id, suffix = bytes.fromhex(name.split(".")[0]), name.split(".")[1]
                both = self._paths(id, suffix)
                data = [self._sound(path, id) for path in both]
                sound = next((each for each in data if each is not None), None)
                for path, each in zip(both, data, strict=True):
                    if each is None:
                        ending = "no sound copy is left" if sound is None else self._mend(path, sound)
                        problems.append(f"{path} is {_state(path)}; {ending}")
        return problems

    def _tidy(self) -> None:
        """Removes what a killed process has left unfinished, and gives what it wrote once its copy."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self._folder.glob("*.part"):
                unfinished.unlink(missing_ok=True)
            names = {path.name for path in self._folder.iterdir()}
        except OSError as error:
            raise _not_written(self._folder, error) from error
        for name in sorted(names):
            if _NAME.fullmatch(name.removesuffix(".copy")):
                other = name.removesuffix(".copy") if name.endswith(".copy") else f"{name}.copy"
                data = None if other in names else self._sound(self._folder / name, bytes.fromhex(name.split(".")[0]))
                if data is not None:
                    self._say(self._folder / other, self._mend(self._folder / other, data))

    def _paths(self, id: bytes, suffix: str) -> tuple[Path, Path]:
        name = f"{id.hex()}.{suffix}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name}: an id has {ID_BYTES} bytes, and a suffix letters and digits")
        return self._folder / name, self._folder / f"{name}.copy"

    def _sound(self, path: Path, id: bytes) -> bytes | None:
        """What a file holds, if it is what its name says."""
        seal = self._seal()
        try:
            data = path.read_bytes()
            data = data if seal is None else seal.unseal(data, _ABOUT + id)
        except (OSError, StorageError):
            return None
        return data if blake3.blake3(data).digest(ID_BYTES) == id else None

    def _write(self, path: Path, data: bytes) -> None:
        seal = self._seal()
        _write(path, data if seal is None else seal.seal(data, _ABOUT + blake3.blake3(data).digest(ID_BYTES)))

    def _mend(self, path: Path, data: bytes) -> str:
        if self._readonly:
            return "the other copy is sound, and used"
        try:
            self._write(path, data)
        except StorageError as error:
            return f"the other copy is sound, and used; it was not mended: {error.what}"
        return "mended from its other copy"

    def _say(self, path: Path, ending: str) -> None:
        if path not in self._announced:
            self._announced.add(path)
            self._announce(f"{path} was damaged or missing; {ending}")


_NAME = re.compile(rf"[0-9a-f]{{{2 * ID_BYTES}}}\.[a-z0-9]+")


def _state(path: Path) -> str:
    return "damaged" if path.exists() else "missing"


def _write(path: Path, data: bytes) -> None:
    """The whole file or nothing, on disk when this returns."""
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with unfinished.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _not_written(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} cannot be written: {error.strerror or error}",
        why="what many records need to be decoded must be on disk, twice, before they are",
        fix="free space on the disk, or make the folder writable; then try again",
    )


def _lost(file: Path, copy: Path) -> StorageError:
    return StorageError(
        f"{file} is {_state(file)}, and {copy} is {_state(copy)}",
        why="records that were encoded with it cannot be decoded without it",
        fix="restore one of the two files from a backup; the other is mended from it",
    )
