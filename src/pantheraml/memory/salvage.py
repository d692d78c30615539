"""What can still be read out of a damaged store, without SQLite: rows, ledger, settings and bands, each proved by its own checksum.

They are taken from the leaf pages of tables (https://sqlite.org/fileformat2.html#b_tree_pages) in store.db and in every frame of its log,
whatever the pages around them look like: newest and older versions alike, since an older version of a page that was lost has most of its
rows. Which of them count is decided in repair.py, by the number of the change that wrote each.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pantheraml.memory.ledger import MARK as LEDGER_MARK
from pantheraml.memory.ledger import Head, unpack_block
from pantheraml.memory.pages import DB, HEAD, PAGE, SUMS, WAL, Problem, RawFile, page_place, read_sums
from pantheraml.memory.rows import MARK as ROW_MARK
from pantheraml.memory.rows import guessed_key, sound_seq
from pantheraml.memory.tables import BAND_MARK, META_MARK, unpack_meta, unpack_run
from pantheraml.memory.wal import Frames, Header, examine, frame_place, page_at, read_frames, read_header

_MARKS = (ROW_MARK, LEDGER_MARK, META_MARK, BAND_MARK)
_LOCAL = PAGE - 35  # bytes of a cell that has no overflow pages
_LEAST = (PAGE - 12) * 32 // 255 - 23
_IN_DB = -1  # in place of the number of a frame


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table's leaf page: its rowid, where its record begins, the record's whole length, and the part of it that is here."""

    rowid: int
    size: int
    local: bytes
    overflow: int


@dataclass(slots=True)
class Found:
    """All that was read.

    Attributes:
        id, seq, frame, page, offset, current: of each sound copy of a row, where it lies; current: 1 where no newer version of its page was
        written, and the page is in use. blocks: of the ledger. settings: name to value. bands: entries of runs. uses: of records.
        hurt: rows that do not hold, by number, with what their key seems to be.
        acknowledged: number of the newest change that was; None: store.head is damaged.
    """

    id: array[int] = field(default_factory=lambda: array("q"))
    seq: array[int] = field(default_factory=lambda: array("q"))
    frame: array[int] = field(default_factory=lambda: array("q"))
    page: array[int] = field(default_factory=lambda: array("q"))
    offset: array[int] = field(default_factory=lambda: array("q"))
    current: array[int] = field(default_factory=lambda: array("b"))
    blocks: dict[int, bytes] = field(default_factory=dict[int, bytes])
    settings: dict[str, tuple[int, bytes | None]] = field(default_factory=dict[str, tuple[int, "bytes | None"]])
    bands: list[NDArray[np.uint64]] = field(default_factory=list["NDArray[np.uint64]"])
    uses: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    hurt: dict[int, str | None] = field(default_factory=dict[int, "str | None"])
    acknowledged: int | None = None

    def add(self, id: int, seq: int, frame: int, page: int, offset: int, current: bool) -> None:
        """One more copy of a row."""
        self.id.append(id)
        self.seq.append(seq)
        self.frame.append(frame)
        self.page.append(page)
        self.offset.append(offset)
        self.current.append(current)

    def best(self) -> NDArray[np.int64]:
        """[M] of the copies, the newest of each row, a current one first among equals; sorted by the row's number."""
        id, seq, current = np.array(self.id), np.array(self.seq), np.array(self.current)
        order = np.lexsort((current, seq, id))
        return order[np.append(id[order][1:] != id[order][:-1], True)] if len(order) else np.zeros(0, np.int64)


class Wreck:
    """The pages of a store, in all versions that its files hold, to be used in a `with`. problems: that were met.

    Raises: OSError.
    """

    def __init__(self, folder: Path) -> None:
        self.problems: list[Problem] = []
        self._raw = RawFile(folder / DB) if (folder / DB).exists() else None
        self._db_pages = os.fstat(self._raw.handle).st_size // PAGE if self._raw else 0
        self._sums = read_sums(folder / SUMS)
        self._proved = len(self._sums.base) > 0 and all(each.harmless for each in self._sums.problems)
        self.head = Head(folder / HEAD).read()
        if isinstance(self.head, str):
            self.problems.append(Problem(HEAD, "file", self.head))
        frames, taken, wrong = examine(folder / WAL, self._sums.covered)
        self.problems += [*self._sums.problems, *wrong]
        self._frames = _mended_header(folder / WAL) if frames and len(frames) and not frames.holds[0] else frames
        self._log = os.open(folder / WAL, os.O_RDONLY) if self._frames else -1
        self._versions: dict[int, list[int]] = {}
        self._last: dict[int, int] = {}  # of any kind, also damaged or behind the end
        self.end, self._pages, self._commits = 0, self._db_pages, np.zeros(0, np.int64)
        if self._frames:
            belongs = self._frames.sound & self._frames.related
            self._commits = np.flatnonzero(belongs & (self._frames.size > 0))
            self.end = self._last_commit(taken)
            self._pages = int(self._frames.size[self.end - 1]) if self.end else self._db_pages
            for k in np.flatnonzero(belongs).tolist():
                self._versions.setdefault(int(self._frames.page[k]), []).append(k)
            for k in np.flatnonzero(self._frames.related).tolist():
                self._last[int(self._frames.page[k])] = k
        self._free = self._free_pages()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._raw:
            self._raw.close()
        if self._log >= 0:
            os.close(self._log)

    def read(self) -> Found:
        """Reads all pages in all versions."""
        found = Found(acknowledged=self.head[0] if isinstance(self.head, tuple) else None)
        for frame, number, image, sound in self._images():
            used = sound and frame == self._newest(number) and number <= self._pages and number not in self._free
            current = sound and frame == self._last.get(number, _IN_DB) and (used or frame >= self.end)
            for cell, offset in _cells(image, number) if sound else ():
                if used and (use := _use(cell)):
                    found.uses[cell.rowid] = use
                self._sort(found, cell, offset, frame, number, current)
            if not sound or not self._proved:
                for cell, offset in _cells_anywhere(image):
                    self._sort(found, cell, offset, frame, number, False)
        return found

    def row(self, found: Found, i: int) -> bytes:
        """The bytes of a copy of a row."""
        image = self._image(found.page[i], found.frame[i])
        cell = _cell(image, found.offset[i])
        assert cell
        for frame in (found.frame[i], None):
            blob = self._payload(cell, frame)
            if sound_seq(found.id[i], blob) == found.seq[i]:
                return blob
        raise AssertionError("it was read before")

    def _last_commit(self, taken: int) -> int:
        """Behind which frame nothing was committed: SQLite's end of the log, or farther where more was acknowledged than it would take."""
        assert self._frames
        if isinstance(self.head, str):
            return int(self._commits[-1]) + 1 if len(self._commits) else 0
        end = taken
        for commit in self._commits[self._commits >= taken].tolist():
            newest = 0
            for k in range(end, commit + 1):
                for cell, _ in _cells(page_at(self._log, k), int(self._frames.page[k])) if self._frames.sound[k] else ():
                    block = unpack_block(cell.rowid, cell.local[start:]) if (start := _blob(cell)) is not None else None
                    newest = max(newest, block.tip.seq if block else 0)
            if newest > self.head[0]:
                break
            if newest:
                end = commit + 1
        return end

    def _images(self) -> Iterator[tuple[int, int, bytes, bool]]:
        """frame, number, image, and whether it is what was written: of store.db first, then of the log as it was written."""
        for start in range(0, self._db_pages, 256):
            assert self._raw
            data = os.pread(self._raw.handle, min(256, self._db_pages - start) * PAGE, start * PAGE)
            for i in range(len(data) // PAGE):
                number, image = start + i + 1, data[i * PAGE : (i + 1) * PAGE]
                sound = not self._proved or self._sums.accepts(number, image)
                if not sound:
                    self.problems.append(Problem(DB, page_place(number), "it does not match its checksum"))
                yield _IN_DB, number, image, sound
        for k in range(len(self._frames) if self._frames else 0):
            assert self._frames
            # What is behind the last commit counts only where it was acknowledged, so that the commit itself must be what is damaged.
            if self._frames.related[k]:
                yield k, int(self._frames.page[k]), page_at(self._log, k), bool(self._frames.sound[k])
                if not self._frames.sound[k] and k >= self.end:
                    self.problems.append(Problem(WAL, frame_place(k), "it does not match its checksum"))

    def _sort(self, found: Found, cell: Cell, offset: int, frame: int, number: int, current: bool) -> None:
        if _blob(cell) is None:
            return
        acknowledged = frame < self.end or (found.acknowledged or 0)
        for as_of in (frame, None) if cell.overflow else (frame,):
            blob = self._payload(cell, as_of)
            mark = blob[:2]
            if mark == ROW_MARK:
                seq = sound_seq(cell.rowid, blob)
                if seq is None:
                    found.hurt.setdefault(cell.rowid, guessed_key(blob))
                    continue
                if acknowledged is True or seq <= acknowledged:
                    found.add(cell.rowid, seq, frame, number, offset, current)
            elif mark == LEDGER_MARK and (block := unpack_block(cell.rowid, blob)):
                if acknowledged is True or block.tip.seq <= acknowledged:
                    found.blocks[cell.rowid] = blob
            elif mark == META_MARK and (entry := unpack_meta(blob)):
                if entry[0] >= found.settings.get(entry[1], (-1, None))[0]:
                    found.settings[entry[1]] = entry[0], entry[2]
            elif mark == BAND_MARK and (run := unpack_run(blob)):
                found.bands.append(run[1])
            else:
                continue
            return

    def _payload(self, cell: Cell, frame: int | None) -> bytes:
        """The blob of a record, with its overflow pages as they were at a frame; None: as they are now."""
        start = _blob(cell)
        if start is None:
            return b""
        parts, left, number = [cell.local], cell.size - len(cell.local), cell.overflow
        while left > 0 and 0 < number <= 1 << 31:
            image = self._image(number, self._as_of(number, frame))
            if len(image) < PAGE:
                break
            parts.append(image[4 : 4 + min(left, PAGE - 4)])
            left -= len(parts[-1])
            number = int.from_bytes(image[:4], "big")
        return b"".join(parts)[start:]

    def _as_of(self, number: int, frame: int | None) -> int:
        versions = self._versions.get(number, [])
        if frame is None:
            return versions[-1] if versions else _IN_DB
        if frame == _IN_DB:
            return _IN_DB
        assert self._frames
        after = int(np.searchsorted(self._commits, frame))
        end = int(self._commits[after]) if after < len(self._commits) else len(self._frames)
        return max((k for k in versions if k <= end), default=_IN_DB)

    def _image(self, number: int, frame: int) -> bytes:
        if frame != _IN_DB:
            return page_at(self._log, frame)
        return os.pread(self._raw.handle, PAGE, (number - 1) * PAGE) if self._raw and number <= self._db_pages else b""

    def _newest(self, number: int) -> int:
        return next((k for k in reversed(self._versions.get(number, [])) if k < self.end), _IN_DB)

    def _free_pages(self) -> set[int]:
        """Pages in which nothing counts. None are known where the first page is damaged."""
        first = self._image(1, self._newest(1))
        free: set[int] = set()
        if len(first) < PAGE or (self._newest(1) == _IN_DB and self._proved and not self._sums.accepts(1, first)):
            return free
        trunk = int.from_bytes(first[32:36], "big")
        while 0 < trunk <= self._pages and trunk not in free:
            image = self._image(trunk, self._newest(trunk))
            count = min(int.from_bytes(image[4:8], "big"), PAGE // 4 - 2)
            free |= {trunk, *np.frombuffer(image, ">u4", count, 8).tolist()}
            trunk = int.from_bytes(image[:4], "big")
        return free


def _mended_header(path: Path) -> Frames | None:
    """The frames of a log whose header is damaged: its checksum as it should be instead of as it stands, if more of them hold then."""
    with path.open("rb") as file:
        header = read_header(file.read(64))
    if header is None:
        return None
    tries = [read_frames(path, header), read_frames(path, Header(header.order, header.salts, header.computed, header.computed))]
    return max(tries, key=lambda frames: int(frames.sound.sum()))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i in range(8):
        if at + i >= len(data):
            return -1, at
        byte = data[at + i]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + i + 1
    return (value << 8 | data[at + 8], at + 9) if at + 8 < len(data) else (-1, at)


def _cell(image: bytes, at: int) -> Cell | None:
    size, at = _varint(image, at)
    rowid, at = _varint(image, at)
    if size < 4 or rowid <= 0 or size > 1 << 30:
        return None
    local, overflow = size, 0
    if size > _LOCAL:
        local = _LEAST + (size - _LEAST) % (PAGE - 4)
        local = local if local <= _LOCAL else _LEAST
        overflow = int.from_bytes(image[at + local : at + local + 4], "big")
    if at + local > PAGE:
        return None
    return Cell(rowid, size, image[at : at + local], overflow)


def _cells(image: bytes, number: int) -> Iterator[tuple[Cell, int]]:
    """The cells of a page and where they begin; none if it is not a leaf of a table."""
    start = 100 if number == 1 else 0
    if image[start] != 0x0D:
        return
    count = int.from_bytes(image[start + 3 : start + 5], "big")
    for i in range(min(count, (PAGE - 8 - start) // 2)):
        at = int.from_bytes(image[start + 8 + 2 * i : start + 10 + 2 * i], "big")
        if 8 <= at < PAGE and (cell := _cell(image, at)):
            yield cell, at


def _cells_anywhere(image: bytes) -> Iterator[tuple[Cell, int]]:
    """What may be cells, whatever the page says of them: before each of our marks, each place where a cell with it could begin."""
    for mark in _MARKS:
        place = -1
        while (place := image.find(mark, place + 1)) >= 0:
            for at in range(max(place - 18, 0), max(place - 4, 0)):
                cell = _cell(image, at)
                if cell and (start := _blob(cell)) is not None and image[at : place + 2].endswith(cell.local[: start + 2]):
                    yield cell, at


def _blob(cell: Cell) -> int | None:
    """Where the blob of a record (NULL, blob) begins, which is what all tables that are saved consist of; None for others."""
    if cell.local[1:2] != b"\0":
        return None
    kind, end = _varint(cell.local, 2)
    if kind < 12 or kind % 2 or cell.local[0] != end or end + (kind - 12) // 2 != cell.size:
        return None
    return end


def _use(cell: Cell) -> tuple[int, int] | None:
    """The two numbers of a record (NULL, integer, integer), which only the table of uses has."""
    data = cell.local
    if data[:2] != b"\x04\0" or data[2] > 9 or data[3] > 9:
        return None
    numbers, at = [], 4
    for kind in data[2:4]:
        length = {5: 6, 6: 8, 7: PAGE, 8: 0, 9: 0}.get(kind, kind)  # 7: no integer
        numbers.append(kind - 8 if kind in (8, 9) else int.from_bytes(data[at : at + length], "big", signed=True))
        at += length
    return (numbers[0], numbers[1]) if at == len(data) == cell.size else None
