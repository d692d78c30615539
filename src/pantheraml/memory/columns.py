"""Rows of an index in memory, a column each: who they belong to, what filters ask for, and the codes of their vectors.

Rows stand in blocks that never move. One thread writes behind the last row and then raises the count, so that any number of others
may read at the same time without a lock. A row takes 1.125 * dimensions + 37 bytes, and 12 for each piece of its metadata.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import blake3
import numpy as np
from numpy.typing import NDArray

from pantheraml.memory.features import F32, I64, U64
from pantheraml.memory.quantise import Codes
from pantheraml.memory.record import JSON

BLOCK_ROWS = 65_536
_RECENT = 4096
SAVED = ("serial", "id", "tenant", "kind", "created", "alive", "scale", "code")
Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A record as the index knows it. created: microseconds since 1970."""

    id: int
    tenant: str
    kind: str
    created: int
    metadata: Mapping[str, JSON]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rows a search may find: one tenant's, of a kind if given, with all of the tags, created in since <= t < until."""

    tenant: int
    kind: int | None = None
    tags: tuple[int, ...] = ()
    since: int | None = None
    until: int | None = None


class Block:
    """Rows whose serial numbers rise. Columns are [capacity]; only the first `count` rows mean anything.

    Attributes:
        serial: given once and never again. id: of the record. alive: not deleted.
        code: int8 [capacity, D], and scale: the vectors, see quantise.py. bits: uint64 [D / 64, capacity], their signs.
        tag, tag_row: [tags] pieces of metadata, and the rows that they belong to; rising in tag_row.
    """

    def __init__(self, dimensions: int, capacity: int | None = None) -> None:
        capacity = BLOCK_ROWS if capacity is None else capacity
        self.capacity, self.count, self.dead, self.tags = capacity, 0, 0, 0
        self.serial, self.id, self.created = (np.empty(capacity, np.int64) for _ in range(3))
        self.tenant, self.kind = (np.empty(capacity, np.uint32) for _ in range(2))
        self.alive = np.zeros(capacity, bool)
        self.scale = np.empty(capacity, np.float32)
        # Memory that is not written to is not taken from the system, so a small store stays small.
        self.code = np.empty((capacity, dimensions), np.int8)
        self.bits = np.empty((-(-dimensions // 64), capacity), np.uint64)
        self.tag, self.tag_row = np.empty(0, np.uint64), np.empty(0, np.uint32)
        self.file: tuple[str, ...] | None = None
        """Where it is saved, and in which state; see index.py."""

    @property
    def room(self) -> int:
        """Rows that still fit."""
        return self.capacity - self.count

    def append(self, columns: Mapping[str, NDArray[Any]], tag: U64, tag_row: NDArray[np.uint32]) -> None:
        """Rows behind the last one; they are read from the moment that all of them stand there.

        Args:
            columns: those of SAVED. tag, tag_row: metadata, see `tags_flat`; rows count from the first of these.
        """
        begin, end = self.count, self.count + len(columns["id"])
        for name, column in columns.items():
            getattr(self, name)[begin:end] = column
        self.bits[:, begin:end] = signs(self.code[begin:end])
        last = self.tags + len(tag)
        if last > len(self.tag):
            # Readers that hold the old arrays see old rows only, and all of their tags.
            size = max(last, 2 * len(self.tag), 256)
            self.tag = np.concatenate([self.tag[: self.tags], np.empty(size - self.tags, np.uint64)])
            self.tag_row = np.concatenate([self.tag_row[: self.tags], np.empty(size - self.tags, np.uint32)])
        self.tag[self.tags : last], self.tag_row[self.tags : last] = tag, tag_row + np.uint32(begin)
        self.tags = last
        self.dead += int((~self.alive[begin:end]).sum())
        self.count = end

    def matching(self, wanted: Wanted, *, from_serial: int = 0, rows: Rows | None = None) -> Rows:
        """Which rows fit, rising; of all those from a serial number on, or of `rows` (rising, too)."""
        # First who is alive, then how many: of a record that is replaced meanwhile, one row or the other is met.
        alive = self.alive.copy() if rows is None else self.alive
        count = self.count
        if rows is None:
            begin = int(np.searchsorted(self.serial[:count], from_serial)) if from_serial else 0
            part: Any = slice(begin, count)
        else:
            begin, part = 0, rows
        fits = alive[part] & (self.tenant[part] == wanted.tenant)
        if wanted.kind is not None:
            fits &= self.kind[part] == wanted.kind
        if wanted.since is not None:
            fits &= self.created[part] >= wanted.since
        if wanted.until is not None:
            fits &= self.created[part] < wanted.until
        found = np.flatnonzero(fits) + begin if rows is None else rows[fits]
        for tag in wanted.tags:
            found = np.intersect1d(found, self._rows_with(tag), assume_unique=True)
        return found

    def _rows_with(self, tag: int) -> Rows:
        count = self.tags
        return self.tag_row[:count][self.tag[:count] == np.uint64(tag)].astype(np.intp)

    def without_dead(self, capacity: int) -> Block:
        """A block of the rows that are alive, with room for so many at least."""
        kept = np.flatnonzero(self.alive[: self.count])
        block = Block(self.code.shape[1], max(capacity, len(kept)))
        moved = np.full(self.count, -1)
        moved[kept] = np.arange(len(kept))
        row = moved[self.tag_row[: self.tags]]
        columns = {name: getattr(self, name)[kept] for name in SAVED}
        block.append(columns, self.tag[: self.tags][row >= 0], row[row >= 0].astype(np.uint32))
        return block

    def score(self, rows: Rows, query: F32) -> F32:
        """Dot products of some rows with a query."""
        return (self.code[rows].astype(np.float32) @ query) * self.scale[rows]

    def distance(self, rows: Rows, signs: U64) -> NDArray[np.uint16]:
        """In how many signs some rows differ from a query."""
        out = np.zeros(len(rows), np.uint16)
        whole = len(rows) > 0 and rows[-1] == len(rows) - 1  # the first ones, all of them: nothing needs to be picked
        for word, sign in zip(self.bits, signs, strict=True):
            out += np.bitwise_count((word[: len(rows)] if whole else word[rows]) ^ sign)
        return out


class Serials:
    """Serial numbers by record id: sorted arrays, and a few newer pairs beside them. About 16 bytes a record."""

    def __init__(self) -> None:
        self._ids: I64 = np.empty(0, np.int64)
        self._serials: I64 = np.empty(0, np.int64)
        self._recent: dict[int, int] = {}

    def put(self, ids: I64, serials: I64) -> None:
        """These records have these rows now."""
        self._recent.update(zip(ids.tolist(), serials.tolist(), strict=True))
        if len(self._recent) > max(_RECENT, len(self._ids) // 8):
            recent = np.fromiter(self._recent, np.int64, len(self._recent))
            values = np.fromiter(self._recent.values(), np.int64, len(self._recent))
            old = np.isin(self._ids, recent, invert=True) & (self._serials >= 0)
            every = np.concatenate([self._ids[old], recent[values >= 0]])
            order = np.argsort(every)
            self._serials = np.concatenate([self._serials[old], values[values >= 0]])[order]
            self._ids, self._recent = every[order], {}

    def get(self, ids: I64) -> I64:
        """The serial number of each; -1: there is none."""
        if not len(self._ids):
            found = np.full(len(ids), -1)
        else:
            place = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
            found = np.where(self._ids[place] == ids, self._serials[place], -1)
        if self._recent:
            found = np.array([self._recent.get(id, old) for id, old in zip(ids.tolist(), found.tolist(), strict=True)], np.int64)
        return found

    def drop(self, ids: I64) -> None:
        """These records have no row any more."""
        self.put(ids, np.full(len(ids), -1))


def signs(vectors: NDArray[Any]) -> U64:
    """[D / 64, N] one bit a number, set where it is above zero."""
    packed = np.packbits(vectors > 0, axis=1)
    padded = np.zeros((len(packed), -(-packed.shape[1] // 8) * 8), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return np.ascontiguousarray(padded.view(np.uint64).T)


def columns_of(entries: list[Entry], codes: Codes, serials: I64, tenants: list[int], kinds: list[int]) -> dict[str, NDArray[Any]]:
    """What `Block.append` takes."""
    return {
        "serial": serials,
        "id": np.array([each.id for each in entries], np.int64),
        "tenant": np.array(tenants, np.uint32),
        "kind": np.array(kinds, np.uint32),
        "created": np.array([each.created for each in entries], np.int64),
        "alive": np.ones(len(entries), bool),
        "scale": codes.scale,
        "code": codes.data,
    }


def tags_flat(tags: list[tuple[int, ...]]) -> tuple[U64, NDArray[np.uint32]]:
    """The tags of some rows one behind the other, and to which row each belongs."""
    rows = np.repeat(np.arange(len(tags), dtype=np.uint32), [len(row) for row in tags])
    return np.array([tag for row in tags for tag in row], np.uint64), rows


def tags_of(metadata: Mapping[str, JSON]) -> tuple[int, ...]:
    """A number for each piece of metadata; equal for equal name and value, where 1 and 1.0 are equal and 1 and true are not."""
    return tuple(_tag(name, json.dumps(_plain(value), sort_keys=True)) for name, value in metadata.items()) if metadata else ()


@functools.lru_cache(maxsize=4096)
def _tag(name: str, value: str) -> int:
    return int.from_bytes(blake3.blake3(f"{len(name)} {name}{value}".encode("utf-8", "surrogatepass")).digest(8), "little")


def _plain(value: JSON) -> JSON:
    """Floats that are whole numbers as such, however deep they stand."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return {name: _plain(each) for name, each in value.items()} if isinstance(value, dict) else value
