"""Checksums of the pages of store.db, kept beside it, so that a damaged byte anywhere in it is found and named.

store.sums is a log. Sums of the pages that a checkpoint is going to write are appended and on disk before it begins ("pending"), and
count alone ("promoted") once it is done: whenever the process is killed, each page has one of the sums that are known for it.
"""

from __future__ import annotations

import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import blake3
import numpy as np
from numpy.typing import NDArray

PAGE = 4096
NEVER_WRITTEN = bytes(PAGE)
DB, WAL, SHM, SUMS, HEAD, LOCK, QUARANTINE = "store.db", "store.db-wal", "store.db-shm", "store.sums", "store.head", "lock", "quarantine"

_MAGIC = b"NBMS"
_BASE, _PENDING, _PROMOTED = 1, 2, 3
_HEAD = struct.Struct("<4sB3xIIIII")  # magic, kind, entries, pages, salt, salt, frames
_HEAD_BYTES = _HEAD.size + 8
_ENTRY = np.dtype([("page", "<u4"), ("sum", "<u8")])
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not what was written. harmless: nothing is lost by it, and the store can go on."""

    file: str
    where: str
    what: str
    harmless: bool = False

    def __str__(self) -> str:
        return f"{self.file}, {self.where}: {self.what}"


def page_sum(number: int, image: bytes) -> int:
    """Of a page and of where it stands (from 1): 64 bits, never 0."""
    return (int.from_bytes(blake3.blake3(image).digest(8), "little") + number * 0x9E3779B97F4A7C15) & _MASK or 1


def page_place(number: int) -> str:
    """Where a page lies, for people."""
    return f"page {number} (bytes {(number - 1) * PAGE} to {number * PAGE - 1})"


def fsync(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class Log:
    """How far SQLite's log has gone: its salts, its committed frames, and the pages of the database then."""

    salts: tuple[int, int] = (0, 0)
    frames: int = 0
    pages: int = 0


@dataclass(slots=True)
class Sums:
    """The checksums of a database file, and the file that keeps them. Not for several threads at once.

    Attributes:
        base: [pages] uint64 of each page; 0: never written, all zeros. held: (page, sum) that pages may have as well, newest last.
        log: what those come from. covered: salts and frames of SQLite's log that were committed when a checkpoint began.
        problems: of the file. end: bytes of it that count; what is behind was being written when the process was killed.
    """

    path: Path
    base: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    held: list[NDArray[np.void]] = field(default_factory=list["NDArray[np.void]"])
    log: Log | None = None
    covered: tuple[int, int, int] = (0, 0, 0)
    problems: list[Problem] = field(default_factory=list[Problem])
    end: int = 0
    _by_page: dict[int, list[int]] | None = None

    @property
    def settled(self) -> bool:
        """No checkpoint was begun and not finished."""
        return self.log is None

    def accepts(self, number: int, image: bytes) -> bool:
        """Whether a page is one that was written there."""
        total = page_sum(number, image)
        known = int(self.base[number - 1]) if number <= len(self.base) else 0
        return known == total or (image == NEVER_WRITTEN and (known == 0 or self._cut(number))) or total in self.waiting(number)

    def waiting(self, number: int) -> list[int]:
        """Sums that a page may have because a checkpoint that writes it was begun and not finished."""
        if self._by_page is None:
            self._by_page = {}
            for page, total in (pair for entries in self.held for pair in entries.tolist()):
                self._by_page.setdefault(page, []).append(total)
        return self._by_page.get(number, [])

    def _cut(self, number: int) -> bool:
        """The unfinished checkpoint may have cut the file before this page."""
        return self.log is not None and number > self.log.pages

    def sizes(self) -> tuple[int, int]:
        """Fewest and most pages that the file may have."""
        now, then = len(self.base), self.log.pages if self.log else len(self.base)
        return min(now, then), max(now, then, *(int(entries["page"].max(initial=0)) for entries in self.held))

    def add(self, pages: Sequence[int], sums: Sequence[int], log: Log) -> None:
        """Before a checkpoint: what it may write. On disk when this returns. Raises: OSError."""
        newest_last = list(dict.fromkeys(zip(reversed(pages), reversed(sums), strict=True)))[::-1]
        entries = np.array(newest_last, _ENTRY)
        self._append(_PENDING, entries.tobytes(), len(entries), log)
        self._hold(entries, log)

    def promote(self, log: Log) -> None:
        """After a checkpoint that has copied all of `log`: the newest sums count alone. On disk when this returns. Raises: OSError."""
        self._append(_PROMOTED, b"", 0, log)
        self._promoted(log)

    def _hold(self, entries: NDArray[np.void], log: Log) -> None:
        if self.log and self.log.salts != log.salts:  # SQLite began its log anew, so the last checkpoint was finished
            self._promoted(self.log)
        self.held.append(entries)
        self.log, self.covered, self._by_page = log, (*log.salts, log.frames), None

    def _promoted(self, log: Log) -> None:
        base = np.zeros(log.pages, np.uint64)
        base[: len(self.base)] = self.base[: log.pages]
        for entries in self.held:
            entries = entries[entries["page"] <= log.pages]
            base[entries["page"] - 1] = entries["sum"]  # the last of equal pages counts
        self.base, self.held, self.log, self.covered, self._by_page = base, [], None, (*log.salts, log.frames), None

    def _append(self, kind: int, body: bytes, count: int, log: Log) -> None:
        data = _batch(kind, body, count, log, self.end)
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            if os.fstat(handle).st_size > self.end:
                os.ftruncate(handle, self.end)
            written = 0
            while written < len(data):
                written += os.pwrite(handle, data[written:], self.end + written)
            os.fsync(handle)  # so that a loss of power tears the last batch at most
        finally:
            os.close(handle)
        self.end += len(data)

    def tidy(self, times: float = 3.0) -> None:
        """Writes the file anew where it has grown to so many times what it says. Raises: OSError."""
        if self.settled and self.end > times * self.base.nbytes + (1 << 16):
            write_sums(self.path, self.base, self.covered)
            self.end = len(_batch(_BASE, self.base.astype("<u8").tobytes(), len(self.base), Log(), 0))


def write_sums(path: Path, base: NDArray[np.uint64], covered: tuple[int, int, int] = (0, 0, 0)) -> None:
    """A file of sums in its shortest form, in place of what was there, on disk when this returns. Raises: OSError."""
    data = _batch(_BASE, base.astype("<u8").tobytes(), len(base), Log((covered[0], covered[1]), covered[2], len(base)), 0)
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        unfinished.write_bytes(data)
        fsync(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    fsync(path.parent)


def file_sums(path: Path) -> NDArray[np.uint64]:
    """The sums of the pages of a database file as it is."""
    sums: list[int] = []
    with path.open("rb") as file:
        while image := file.read(PAGE):
            sums.append(0 if image == NEVER_WRITTEN else page_sum(len(sums) + 1, image))
    return np.array(sums, np.uint64)


def read_sums(path: Path) -> Sums:
    """The sums that a file keeps; `problems` says what of it is damaged."""
    sums = Sums(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        sums.problems.append(Problem(path.name, "file", "it is not there"))
        return sums
    while sums.end < len(data):
        head = data[sums.end : sums.end + _HEAD_BYTES]
        if len(head) < _HEAD_BYTES or not any(data[sums.end :]):  # cut off, or room that a loss of power left empty
            break
        if not _header_holds(head, sums.end):
            following = next((at for at in _places(data, sums.end + 1) if _header_holds(data[at : at + _HEAD_BYTES], at)), len(data))
            # Behind all that counts: torn by a loss of power, and then what it says is not needed yet, or not any more.
            last = following == len(data) and len(sums.base) > 0
            where = f"bytes {sums.end} to {sums.end + _HEAD_BYTES - 1}"
            sums.problems.append(Problem(path.name, where, "a header is damaged", harmless=last))
            if last:
                break
            sums.end = following
            continue
        _, kind, count, pages, salt1, salt2, frames = _HEAD.unpack(head[:-8])
        size = {_BASE: 8, _PENDING: _ENTRY.itemsize, _PROMOTED: 0}.get(kind, 0) * count
        start, stop = sums.end + _HEAD_BYTES, sums.end + _HEAD_BYTES + size + (8 if size else 0)
        if stop > len(data):
            break
        body = data[start : start + size]
        log = Log((salt1, salt2), frames, pages)
        if size and _body_sum(head, body) != data[stop - 8 : stop]:
            # The last one pending: either torn, and then the checkpoint has not begun, or damaged, and then the log still has the pages.
            last = kind == _PENDING and stop == len(data)
            sums.problems.append(Problem(path.name, f"bytes {start} to {stop - 1}", "checksums of pages are damaged", harmless=last))
            if last:
                break
        elif kind == _BASE:
            sums.base, sums.covered = np.frombuffer(body, "<u8").astype(np.uint64), (salt1, salt2, frames)
        elif kind == _PENDING:
            sums._hold(np.frombuffer(body, _ENTRY), log)
        elif kind == _PROMOTED:
            sums._promoted(log)
        sums.end = stop
    if not len(sums.base) and not sums.problems:
        sums.problems.append(Problem(path.name, "file", "it ends before it says anything"))
    return sums


def check_pages(
    handle: int,
    read_known: Callable[[], Sums],
    read_logged: Callable[[], frozenset[int]],
    *,
    live: bool,
    first: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[Problem]:
    """Compares each page of a database file with what is known of it, reading 1 MiB at a time.

    Args:
        handle: of the file. read_known: gives the sums. read_logged: gives the pages whose newest version lies in SQLite's log.
        live: another process may be writing: what does not match is read again before it counts. first: only so many pages; None: all.
        progress: hears pages done, and of all.
    """
    sums = read_known()
    fewest, most = sums.sizes()
    size = os.fstat(handle).st_size
    pages = size // PAGE
    if not (fewest <= pages <= most and (size % PAGE == 0 or not sums.settled)) and not live:
        yield Problem(
            DB, f"its end (byte {size})", f"it has {size / PAGE:g} pages, and should have {fewest}" + f" to {most}" * (fewest < most)
        )
    pages = pages if first is None else min(pages, first)
    for start in range(0, pages, 256):
        data = os.pread(handle, min(256, pages - start) * PAGE, start * PAGE)
        for i in range(len(data) // PAGE):
            number = start + i + 1
            if sums.accepts(number, data[i * PAGE : (i + 1) * PAGE]):
                continue
            if live:
                sums, holds = _look_again(handle, number, read_known)
                if holds:
                    continue
            # Torn by a loss of power while it was being copied there; what it was before, and the log was made from, had been looked at.
            newer = bool(sums.waiting(number)) and number in read_logged()
            what = "it does not match its checksum" + "; it was being copied there from the log, which has it" * newer
            yield Problem(DB, page_place(number), what, harmless=newer)
        progress(min(start + 256, pages), pages)


def _look_again(handle: int, number: int, read_known: Callable[[], Sums], looks: int = 8, most: int = 500) -> tuple[Sums, bool]:
    """Whether a page holds that did not: it does not after so many looks during which nobody wrote checksums.

    A page that is written all the time, so that there are no such looks, holds as far as can be told: who writes it has read it back.
    """
    sums = read_known()
    for _ in range(most):
        time.sleep(0.02)
        before = _stamp(sums.path)
        sums = read_known()
        if sums.accepts(number, os.pread(handle, PAGE, (number - 1) * PAGE)):
            break
        looks -= before == _stamp(sums.path)
        if not looks:
            return sums, False
    return sums, True


def _stamp(path: Path) -> tuple[int, int, int]:
    """Another one once a file was written."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


class RawFile:
    """A database file opened to read its pages, beside SQLite.

    Closing any descriptor of a file drops all locks of the process on it, SQLite's too (POSIX fcntl), so all of a process share one
    for each file, and it is closed with the last.
    """

    _open: dict[tuple[int, int], list[int]] = {}  # noqa: RUF012 - of the process: (device, inode) -> descriptor, users
    _guard = threading.Lock()

    def __init__(self, path: Path) -> None:
        with self._guard:
            status = os.stat(path)
            self._key = status.st_dev, status.st_ino
            if self._key not in self._open:
                self._open[self._key] = [os.open(path, os.O_RDONLY), 0]
            shared = self._open[self._key]
            shared[1] += 1
            self.handle = shared[0]
        self._closed = False

    def is_at(self, path: Path) -> bool:
        """Whether the path still leads to this file."""
        with suppress(OSError):
            status = os.stat(path)
            return (status.st_dev, status.st_ino) == self._key
        return False

    def close(self) -> None:
        """To be called when SQLite has closed its connections."""
        with self._guard:
            if not self._closed:
                self._closed = True
                shared = self._open[self._key]
                shared[1] -= 1
                if not shared[1]:
                    os.close(shared[0])
                    del self._open[self._key]


def _batch(kind: int, body: bytes, count: int, log: Log, at: int) -> bytes:
    head = _HEAD.pack(_MAGIC, kind, count, log.pages, *log.salts, log.frames)
    head += _header_sum(head, at)
    return head + body + (_body_sum(head, body) if body else b"")


def _header_sum(head: bytes, at: int) -> bytes:
    return blake3.blake3(head + at.to_bytes(8, "little")).digest(8)


def _body_sum(head: bytes, body: bytes) -> bytes:
    return blake3.blake3(head + body).digest(8)


def _header_holds(head: bytes, at: int) -> bool:
    return len(head) == _HEAD_BYTES and head[:4] == _MAGIC and _header_sum(head[:-8], at) == head[-8:]


def _places(data: bytes, start: int) -> Iterator[int]:
    while (start := data.find(_MAGIC, start)) >= 0:
        yield start
        start += 1
