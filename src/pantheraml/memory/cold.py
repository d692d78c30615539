"""The cold tier: containers in blocks, in segment files that only grow, and are removed as a whole (the format: segment.py).

Writing: `append` returns when its blocks are on the disk; only then rows may point at them. What a kill leaves behind is a part of a
block at the end of a file, which nobody points at; the next writer cuts it off. A flipped byte costs the entries of its block, and is
named by file and offset.

Compaction, in this order: 1. `start_segment`, then `append` what is alive in worn segments; 2. one transaction of the database points
all their rows at the new places; 3. `remove` the worn segments. A kill before 2 leaves new blocks that nobody points at, one after it
old segments that nobody points into; whoever compares rows with segments finds either (`worn_segments` in policy.py), the next time.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from logging import getLogger
from pathlib import Path
from typing import NamedTuple, NoReturn

from pantheraml.errors import StorageError
from pantheraml.memory.segment import (
    BLOCK_BYTES,
    HEADER_BYTES,
    MOST_BLOCK_BYTES,
    Block,
    Damage,
    Entry,
    block_bytes,
    block_end,
    header,
    read_block,
    walk,
    wrong_header,
)

SEGMENT_BYTES = 64 << 20
"""From here on a new one is begun."""
CACHE_BYTES = 4 << 20
"""Of blocks that were read."""
_NAME = re.compile(r"(\d{6,})\.seg")
_log = getLogger(__name__)


class Place(NamedTuple):
    """Where an entry stands: the segment, the offset of its block there, and which of the block's entries it is."""

    segment: int
    offset: int
    entry: int


class Cold:
    """The segments of a store. Any number of threads may read; one may write, in the one process that holds the store's lock.

    Args:
        folder: made if it is not there. readonly: nothing is written or cut off.
        used_from: whether any row points at a block (segment, offset) or at one behind it. With it the writer also cuts off blocks that a
            power cut has left with their length but without their content. None: only what a kill leaves.
        announce: hears what was cut off, and which segment is not written on.
    Raises: StorageError if the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        readonly: bool = False,
        segment_bytes: int = SEGMENT_BYTES,
        cache_bytes: int = CACHE_BYTES,
        used_from: Callable[[int, int], bool] | None = None,
        announce: Callable[[str], None] = _log.warning,
    ) -> None:
        self._folder, self._readonly = folder, readonly
        self._segment_bytes, self._cache_bytes = segment_bytes, cache_bytes
        self._announce = announce
        self._cache: OrderedDict[tuple[int, int], list[Entry]] = OrderedDict()
        self._cached = 0
        self._lock = threading.Lock()
        self._writer = threading.Lock()
        self._open: int | None = None
        self._end = 0
        """The segment that is written on, and its size."""
        if not readonly:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if segments := self.segments():
                    self._take_up(segments[-1], used_from)
            except OSError as error:
                _refused(folder, error)

    # ---- Reading -------------------------------------------------------------------------------------------------

    def segments(self) -> list[int]:
        """Their numbers, rising."""
        try:
            names = [path.name for path in self._folder.iterdir()]
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    def path(self, segment: int) -> Path:
        """Of its file."""
        return self._folder / f"{segment:06d}.seg"

    def size_bytes(self, segment: int) -> int:
        """Of its file; 0 if it is gone."""
        try:
            return self.path(segment).stat().st_size
        except FileNotFoundError:
            return 0

    def read(self, place: Place | tuple[int, int, int], id: int) -> bytes:
        """The container of a record. Its whole block is checked, and kept in memory for a while.

        Raises: StorageError naming file and offset if the block is damaged or gone, or another record stands there.
        """
        segment, offset, entry = place
        entries = self._entries(segment, offset)
        if not 0 <= entry < len(entries) or entries[entry][0] != id:
            there = f"record {entries[entry][0]}" if 0 <= entry < len(entries) else f"none of its {len(entries)} entries"
            raise self._unusable(segment, offset, f"entry {entry} should be record {id}, and it is {there}")
        return entries[entry][1]

    def blocks(self, segment: int) -> Iterator[Block]:
        """All blocks of a segment in their order, damaged ones too. Raises: StorageError if the file is gone."""
        try:
            with self.path(segment).open("rb") as file:
                yield from walk(file, segment)
        except OSError as error:
            raise self._unusable(segment, 0, error.strerror or str(error)) from error

    def verify(self) -> list[Block]:
        """Every block that cannot be read, after reading all. Memory is that of one block."""
        return [block for segment in self.segments() for block in self.blocks(segment) if block.wrong]

    def _entries(self, segment: int, offset: int) -> list[Entry]:
        key = segment, offset
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        try:
            with self.path(segment).open("rb") as file:
                entries, _ = read_block(file, segment, offset, os.fstat(file.fileno()).st_size)
        except Damage as damage:
            raise self._unusable(segment, offset, str(damage)) from damage
        except OSError as error:
            raise self._unusable(segment, offset, error.strerror or str(error)) from error
        with self._lock:
            if key not in self._cache and _held(entries) <= self._cache_bytes:
                self._cache[key] = entries
                self._cached += _held(entries)
                while self._cached > self._cache_bytes:
                    self._cached -= _held(self._cache.popitem(last=False)[1])
        return entries

    def _unusable(self, segment: int, offset: int, why: str) -> StorageError:
        return StorageError(
            f"the block at offset {offset:,} of {self.path(segment)} cannot be used",
            why=why,
            fix="`pantheraml memory verify` names the records in it; put them again, or restore the file from a backup",
        )

    # ---- Writing -------------------------------------------------------------------------------------------------

    def append(self, entries: Sequence[Entry]) -> list[Place]:
        """Write containers as blocks; they are on the disk when this returns.

        Raises: StorageError if the disk refuses; what was written by then is cut off, or stays without anything that points at it.
        """
        if self._readonly:
            raise ValueError("this store was opened to be read")
        with self._writer:
            return [place for lot in _lots(entries, self._segment_bytes) for place in self._append(lot)]

    def start_segment(self) -> None:
        """What is appended from here on stands in a new segment."""
        with self._writer:
            self._open = None

    def remove(self, segments: Sequence[int]) -> None:
        """Take whole segments away, into which no row points any more. Raises: StorageError if the disk refuses."""
        with self._writer:
            if self._open in segments:
                self._open = None
            try:
                for segment in segments:
                    self.path(segment).unlink(missing_ok=True)
                _sync(self._folder)
            except OSError as error:
                _refused(self._folder, error)
        with self._lock:
            for key in [key for key in self._cache if key[0] in segments]:
                self._cached -= _held(self._cache.pop(key))

    def _append(self, lot: list[list[Entry]]) -> list[Place]:
        """Some blocks into one segment, by one write."""
        segment, begin = self._open, self._end
        if segment is None or begin >= self._segment_bytes:
            segment, begin = self._next_number(), 0
        data = bytearray() if begin else bytearray(header(segment))
        places: list[Place] = []
        for block in lot:
            offset = begin + len(data)
            data += block_bytes(segment, offset, block)
            places += (Place(segment, offset, entry) for entry in range(len(block)))
        path = self.path(segment)
        try:
            with path.open("r+b" if begin else "xb", buffering=0) as file:
                file.seek(begin)
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
            if not begin:
                _sync(self._folder)
        except OSError as error:
            # After a failed fsync nobody knows what is on the disk, so what comes next goes into another file.
            self._open = None
            with suppress(OSError):
                if begin:
                    os.truncate(path, begin)
                else:
                    path.unlink(missing_ok=True)
            _refused(path, error)
        self._open, self._end = segment, begin + len(data)
        return places

    def _next_number(self) -> int:
        """Above every one that ever was, as far as this process knows: a row that points at a removed one must not find another."""
        self._last = max([self._last, *self.segments()]) + 1
        return self._last

    _last = 0

    def _take_up(self, segment: int, used_from: Callable[[int, int], bool] | None) -> None:
        """Find the end of the last segment, and cut off what was never finished."""
        path, size = self.path(segment), self.size_bytes(segment)
        with path.open("rb") as file:
            end = HEADER_BYTES if size >= HEADER_BYTES else 0
            wrong = wrong_header(file.read(HEADER_BYTES), segment) if end else None
            while 0 < end < size and wrong is None:
                unused = used_from is not None and not used_from(segment, end)
                try:
                    behind = block_end(file, segment, end, size)
                    if unused or behind == size:
                        read_block(file, segment, end, size)
                    end = behind
                except Damage as damage:
                    if unused or damage.torn:
                        break
                    wrong = f"at offset {end:,}: {damage}"
        if wrong is not None:
            self._announce(f"{path} is damaged, and not written on. {wrong}")
            return
        if end < size:
            self._announce(f"{path}: {size - end:,} bytes of a block that was never finished are cut off")
        if end == 0:
            path.unlink()
            return
        os.truncate(path, end)
        self._open, self._end = segment, end


def _lots(entries: Sequence[Entry], lot_bytes: int) -> Iterator[list[list[Entry]]]:
    """Entries as blocks of about BLOCK_BYTES, and these in lots that are written at once, of about so many bytes."""
    blocks: list[list[Entry]] = []
    block_size = lot_size = 0
    for id, container in entries:
        if len(container) + 32 > MOST_BLOCK_BYTES:
            raise ValueError(f"record {id} has a container of {len(container):,} bytes, and {MOST_BLOCK_BYTES:,} are the most")
        if not blocks or block_size + len(container) > BLOCK_BYTES:
            if lot_size > lot_bytes:
                yield blocks
                blocks, lot_size = [], 0
            blocks.append([])
            block_size = 0
        blocks[-1].append((id, container))
        block_size += len(container)
        lot_size += len(container)
    if blocks:
        yield blocks


def _held(entries: list[Entry]) -> int:
    """Bytes of memory, about."""
    return sum(len(container) + 120 for _, container in entries)


def _sync(folder: Path) -> None:
    """Only then the names in a folder are safe. Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _refused(path: Path, error: OSError) -> NoReturn:
    raise StorageError(
        f"{path} cannot be written",
        why=f"{error.strerror or error}; records that are in the store already stay as they are",
        fix="make room, or see who may write there",
    ) from error
