"""The ledger: what was changed, in order, each block of changes chained to the one before it by its hash.

It holds numbers, times and keyed hashes, never a key, a tenant's name or content. A chain shows that nothing in its middle was changed,
taken out or put in; who can write the whole store can write a new chain, unless its newest hash is kept elsewhere.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from functools import lru_cache
from pathlib import Path

import blake3
import numpy as np
from numpy.typing import NDArray

MARK = b"L\x01"
CHANGE = np.dtype([("what", "u1"), ("id", "<u8"), ("tenant", "<u8"), ("key", "<i8"), ("content", "<u8", (2,))])
"""41 bytes. A block is `L 1 | count | time | next id | note bytes | changes | note | hash of the block before | checksum`."""
PER_BLOCK = 97
"""Changes that fill a page of 4096 bytes."""
START = bytes(32)
"""What the first block has for the hash of the one before it."""
_HEAD = struct.Struct("<2sHqQI")
_CHANGE = struct.Struct("<BQ8sq16s")
_FILE = struct.Struct("<4sIQ32s8x")
_FILE_MAGIC = b"NBMH"


class What(IntEnum):
    """Kinds of changes. Of one record: put, replace, delete, move, keep, lost. Of none (id 0): the others."""

    PUT = 1
    REPLACE = 2
    DELETE = 3
    MOVE = 4  # the same content elsewhere, or encoded or sealed anew
    COMPACT = 5
    KEY = 6  # the master key was rotated, or data keys given up
    REPAIR = 7  # the note says what was lost
    LOST = 8  # by damage
    META = 9  # settings, or uses of records
    KEEP = 10  # saved by a repair, which did not find the change that wrote it


LIVE = (What.PUT, What.REPLACE, What.MOVE, What.KEEP)


@dataclass(frozen=True, slots=True)
class Change:
    """One change. tenant, key and content are keyed hashes in hex; see `Marks`. note: of the block that it stands in."""

    seq: int
    time: datetime
    what: What
    id: int
    tenant: str
    key: str
    content: str
    note: str


@dataclass(frozen=True, slots=True)
class Block:
    """Some changes that were made at once. time: microseconds since 1970. next_id: the first record number that was never given out."""

    first: int
    time: int
    next_id: int
    changes: NDArray[np.void]
    note: str
    previous: bytes
    hash: bytes

    @property
    def tip(self) -> Tip:
        """Where the chain ends if this block is the newest."""
        return Tip(self.first + len(self.changes) - 1, self.hash, self.next_id)

    def __iter__(self) -> Iterator[Change]:
        time = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=self.time)
        raw = self.changes.tobytes()
        for i in range(len(self.changes)):
            what, id, tenant, key, content = _CHANGE.unpack_from(raw, i * CHANGE.itemsize)
            yield Change(
                self.first + i, time, What(what), id, tenant.hex(), key.to_bytes(8, "little", signed=True).hex(), content.hex(), self.note
            )


@dataclass(frozen=True, slots=True)
class Tip:
    """Where the chain ends: number of the newest change, hash of the newest block, first record number never given out."""

    seq: int
    hash: bytes
    next_id: int


class Marks:
    """Keyed hashes by which the ledger and the indexes know tenants, keys and contents without telling what they are."""

    def __init__(self, index_key: bytes) -> None:
        self._key = index_key
        self.tenant = lru_cache(4096)(self._tenant)

    def _tenant(self, tenant: str) -> bytes:
        return self._hash(b"t" + tenant.encode("utf-8", "surrogatepass"), 8)

    def key(self, tenant: str, key: str) -> int:
        """Of a key of a tenant: a signed 64-bit number, as SQLite keeps it."""
        return int.from_bytes(self._hash(b"k" + self.tenant(tenant) + key.encode("utf-8", "surrogatepass"), 8), "little", signed=True)

    def content(self, tenant: str, hash: bytes) -> bytes:
        """Of the content hash of a record of a tenant: 16 bytes."""
        return self._hash(b"c" + self.tenant(tenant) + hash, 16)

    def bands(self, tenant: str) -> int:
        """What the bands of a tenant's records are mixed with: 64 bits, which stand nowhere in the store."""
        return int.from_bytes(self._hash(b"b" + self.tenant(tenant), 8), "little")

    def _hash(self, data: bytes, length: int) -> bytes:
        return blake3.blake3(data, key=self._key).digest(length)


def pack_change(what: What, id: int = 0, tenant: bytes = bytes(8), key: int = 0, content: bytes = bytes(16)) -> bytes:
    """One change, as blocks hold it."""
    return _CHANGE.pack(what, id, tenant, key, content)


def pack_blocks(tip: Tip, time: int, next_id: int, changes: bytes, note: str = "") -> tuple[list[tuple[int, bytes]], Tip]:
    """Blocks that go on behind a tip: the number of the first change of each, its bytes, and the new tip. The note stands in the last."""
    blocks: list[tuple[int, bytes]] = []
    for start in range(0, len(changes), PER_BLOCK * CHANGE.itemsize):
        part = changes[start : start + PER_BLOCK * CHANGE.itemsize]
        said = note.encode() if start + len(part) == len(changes) else b""
        count = len(part) // CHANGE.itemsize
        body = _HEAD.pack(MARK, count, time, next_id, len(said)) + part + said + tip.hash
        hash = _block_hash(tip.seq + 1, body)
        blocks.append((tip.seq + 1, body + hash[:8]))
        tip = Tip(tip.seq + count, hash, next_id)
    return blocks, tip


def unpack_block(first: int, blob: bytes) -> Block | None:
    """A block from its bytes; None if they are not what was written."""
    if not isinstance(blob, bytes) or len(blob) < _HEAD.size + 40 or blob[:2] != MARK:
        return None
    _, count, time, next_id, note = _HEAD.unpack_from(blob)
    end = _HEAD.size + count * CHANGE.itemsize
    hash = _block_hash(first, blob[:-8])
    if len(blob) != end + note + 40 or hash[:8] != blob[-8:]:
        return None
    changes = np.frombuffer(blob, CHANGE, count, _HEAD.size)
    return Block(first, time, next_id, changes, blob[end : end + note].decode(), blob[-40:-8], hash)


@dataclass(frozen=True, slots=True)
class History:
    """All changes of a chain.

    Attributes:
        seq: [N] of each change, rising. changes: [N] of CHANGE. tip: where it ends.
        breaks: (first missing, first present again) of each place where the chain is broken; the two are equal where only hashes differ.
        told: those of them that a later repair has told of. damaged: numbers of blocks that are not what was written.
    """

    seq: NDArray[np.int64]
    changes: NDArray[np.void]
    tip: Tip | None
    breaks: tuple[tuple[int, int], ...]
    told: frozenset[tuple[int, int]]
    damaged: tuple[int, ...]

    def newest(self) -> tuple[NDArray[np.int64], NDArray[np.void]]:
        """The newest change of each record, sorted by its number: [M] seq, [M] change."""
        of_records = np.flatnonzero(self.changes["id"])
        ids = self.changes["id"][of_records]
        order = np.argsort(ids, kind="stable")
        last = np.append(ids[order][1:] != ids[order][:-1], True) if len(order) else np.zeros(0, bool)
        found = of_records[order[last]]
        return self.seq[found], self.changes[found]


def read_chain(rows: Iterable[tuple[int, bytes]]) -> History:
    """Walks over a ledger, (number of the first change, bytes) in rising order."""
    seqs: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    changes: list[NDArray[np.void]] = [np.zeros(0, CHANGE)]
    breaks: list[tuple[int, int]] = []
    told: set[tuple[int, int]] = set()
    damaged: list[int] = []
    tip = Tip(0, START, 1)
    block = None
    for first, blob in rows:
        block = unpack_block(first, blob)
        if block is None:
            damaged.append(first)
            continue
        if first != tip.seq + 1 or block.previous != tip.hash:
            breaks.append((tip.seq + 1, first))
        if (block.changes["what"] == What.REPAIR).any():
            told |= _told(block.note)
        seqs.append(np.arange(first, first + len(block.changes)))
        changes.append(block.changes)
        tip = block.tip
    return History(
        np.concatenate(seqs), np.concatenate(changes), tip if len(seqs) > 1 else None, tuple(breaks), frozenset(told), tuple(damaged)
    )


def _told(note: str) -> set[tuple[int, int]]:
    first_line = note.partition("\n")[0]
    return {(int(a), int(b)) for a, _, b in (each.partition("-") for each in first_line.removeprefix("breaks ").split())}


def repair_note(breaks: Iterable[tuple[int, int]], words: str) -> str:
    """The note of a repair: which breaks of the chain it has met, and in words what was lost."""
    return "breaks " + " ".join(f"{a}-{b}" for a, b in breaks) + "\n" + words


class Head:
    """The file that keeps the newest acknowledged change: `NBMH | version | seq | hash | zeros | checksum`, 64 bytes.

    It is written over after each commit without waiting for the disk: after a loss of power it may be older than the ledger, never newer.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, tip: Tip) -> None:
        """In place and at once; made if it is not there."""
        body = _FILE.pack(_FILE_MAGIC, 1, tip.seq, tip.hash)
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(handle, body + blake3.blake3(body).digest(8), 0)
        finally:
            os.close(handle)

    def read(self) -> tuple[int, bytes] | str:
        """Number and hash of the newest acknowledged change; or in words what is wrong with the file."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return "it is not there"
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        body, checksum = data[:-8], data[-8:]
        if len(data) != _FILE.size + 8 or blake3.blake3(body).digest(8) != checksum or body[:4] != _FILE_MAGIC:
            return "its checksum does not hold"
        _, _, seq, hash = _FILE.unpack(body)
        return seq, hash


def _block_hash(first: int, body: bytes) -> bytes:
    return blake3.blake3(first.to_bytes(8, "little") + body).digest()
