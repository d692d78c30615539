"""The records of a store in SQLite, read: found by key, content or likeness, and proved against their checksums and the ledger."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pantheraml.errors import StorageError
from pantheraml.memory import audit, tables
from pantheraml.memory.database import Database
from pantheraml.memory.ledger import Block, Change, Marks, unpack_block
from pantheraml.memory.pages import DB, Problem
from pantheraml.memory.record import Tier
from pantheraml.memory.rows import Machine, Row, content_mark, is_cold, unpack_row
from pantheraml.memory.seal import Cipher, Keys, Seal, UnknownEpoch

_SOME = 500  # rows that are read at once
Damaged = Callable[[int, StorageError], None]


class Use(NamedTuple):
    """How a record was used: when last, in microseconds since 1970, and how often."""

    last: int
    times: int


class Records(Database):
    """The records of a store.

    Attributes:
        seal: what seals them; None: the store is not encrypted. marks: by which the ledger knows them.
    """

    def __init__(self, folder: Path, *, keys: Keys | None = None, cipher: Cipher = "aes-256-gcm", **how: Any) -> None:
        """Opens a store, or makes one, which is encrypted if keys are given.

        Args:
            keys: of an encrypted store; kept in memory while it is open. how: see `Database`.
        Raises: StorageError as `Database` does; for no key or a wrong one; for a key where the store is not encrypted.
        """
        self._keys = keys
        self._places, self._bands, self._bands_lock = tables.Places(), tables.Bands(), threading.Lock()
        self._machines: dict[int, Machine] = {}
        self.seal: Seal | None = None

        def first() -> Mapping[str, bytes]:
            return {"seal": Seal.create(cipher).stored(keys)} if keys else {"index_key": os.urandom(32)}

        super().__init__(folder, first=first, **how)
        try:
            self._learn()
            with self.read() as connection:
                self._places.load(connection)
        except BaseException:
            self._closer()
            raise

    def _learn(self) -> None:
        """What the settings say: keys, and machines by their numbers."""
        settings = self.settings()
        self.seal = open_seal(self.folder, settings, self._keys)
        self.marks = Marks(self.seal.index_key if self.seal else settings["index_key"])
        self._machines = load_machines(settings)

    # Finding

    def find(self, tenant: str, key: str) -> int | None:
        """The number of a tenant's record of that key."""
        return self.find_many([(tenant, key)])[0]

    def find_many(self, wanted: Sequence[tuple[str, str]]) -> list[int | None]:
        """The same for many pairs of tenant and key."""
        found = self._placed([self.marks.key(tenant, key) for tenant, key in wanted])
        rows = self.rows([id for ids in found for id in ids])
        return [
            next((id for id in ids if id in rows and (rows[id].tenant, rows[id].key) == pair), None)
            for ids, pair in zip(found, wanted, strict=True)
        ]

    def by_hash(self, tenant: str, hash: bytes) -> int | None:
        """The number of a tenant's record that has that content, exact and not by way of another record."""
        return self.by_hashes([(tenant, hash)])[0]

    def by_hashes(self, wanted: Sequence[tuple[str, bytes]]) -> list[int | None]:
        """The same for many pairs of tenant and content hash."""
        found = self._placed([content_mark(self.marks.content(tenant, hash)) for tenant, hash in wanted])
        rows = self.rows([id for ids in found for id in ids])
        return [
            next((id for id in ids if id in rows and (rows[id].tenant, rows[id].hash) == pair and rows[id].same_as is None), None)
            for ids, pair in zip(found, wanted, strict=True)
        ]

    def near(self, bands_NB: NDArray[np.int64], most: int = 16) -> list[list[int]]:
        """For each of N, up to `most` records that have most of its bands (`same.bands`). Candidates of any tenant, to be compared."""
        with self.read() as connection, self._bands_lock:
            found = self._bands.near(connection, bands_NB, most)
            there = self._there(connection, {id for ids in found for id in ids})
        return [[id for id in ids if id in there] for ids in found]

    def without_bands(self) -> list[int]:
        """Records that `near` cannot find: they were inserted without bands, or a repair has lost them."""
        with self.read() as connection, self._bands_lock:
            ids = np.array(connection.execute("SELECT id FROM records ORDER BY id").fetchall(), np.int64).ravel()
            return np.setdiff1d(ids, self._bands.ids(connection), assume_unique=True).tolist()

    def referrers(self, ids: Sequence[int]) -> dict[int, list[int]]:
        """Records that take each of these to decode them (same content, or a delta of it); without those that none does."""
        found: dict[int, list[int]] = {}
        with self.read() as connection:
            for owner, referrer in connection.execute(
                "SELECT owner, referrer FROM refs WHERE owner IN (SELECT value FROM json_each(?)) ORDER BY 1, 2", (json.dumps(list(ids)),)
            ):
                found.setdefault(owner, []).append(referrer)
        return found

    # Reading

    def rows(self, ids: Sequence[int], damaged: Damaged | None = None) -> dict[int, Row]:
        """The records of these numbers, without those that are gone.

        Args:
            damaged: hears of each record that is damaged, which is left out; None: StorageError is raised.
        """
        found: dict[int, Row] = {}
        for start in range(0, len(ids), _SOME):
            part = ids[start : start + _SOME]
            try:
                with self.read() as connection:
                    if len(part) == 1:
                        blobs = connection.execute("SELECT id, row FROM records WHERE id=?", tuple(part)).fetchall()
                    else:
                        asked = "SELECT id, row FROM records WHERE id IN (SELECT value FROM json_each(?))"
                        blobs = connection.execute(asked, (json.dumps(list(part)),)).fetchall()
            except StorageError as error:
                if damaged is None:
                    raise
                if len(part) == 1:
                    damaged(part[0], error)
                else:
                    for id in part:
                        found |= self.rows([id], damaged)
                continue
            for row in self._unpacked(blobs, damaged):
                found[row.id] = row
        return found

    def scan(self, after_id: int = 0, tier: Tier | None = None, damaged: Damaged | None = None) -> Iterator[Row]:
        """All records behind a number, in rising order; changes meanwhile may be seen or not. damaged: as in `rows`."""
        while True:
            with self.read() as connection:
                blobs = connection.execute(f"SELECT id, row FROM records WHERE id>? ORDER BY id LIMIT {_SOME}", (after_id,)).fetchall()
            if not blobs:
                return
            after_id = blobs[-1][0]
            yield from self._unpacked([each for each in blobs if tier is None or is_cold(each[1]) == (tier == "cold")], damaged)

    def count(self) -> int:
        """Of all records."""
        with self.read() as connection:
            return connection.execute("SELECT count(*) FROM records").fetchone()[0]

    def uses(self, after_id: int = 0, most: int = 1 << 20) -> dict[int, Use]:
        """How records behind a number were used, in rising order; those that never were are not there."""
        with self.read() as connection:
            found = connection.execute("SELECT id, last, times FROM uses WHERE id>? ORDER BY id LIMIT ?", (after_id, most)).fetchall()
        return {id: Use(last, times) for id, last, times in found}

    def changes(self, after_seq: int = 0) -> Iterator[Change]:
        """What was changed since a change (`tip.seq`), in order."""
        while True:
            with self.read() as connection:
                asked = "SELECT seq, block FROM ledger WHERE seq >= coalesce((SELECT max(seq) FROM ledger WHERE seq<=?), 0) ORDER BY seq LIMIT 64"
                found = connection.execute(asked, (after_seq + 1,)).fetchall()
            new = [each for first, blob in found for each in unpack_block(first, blob) or _damaged_block(first) if each.seq > after_seq]
            if not new:
                return
            yield from new
            after_seq = new[-1].seq

    def verify(self, progress: Callable[[str, int, int], None] = lambda what, done, of: None) -> list[Problem]:
        """Everything that is not what was written: files, pages, frames, ledger, records, indexes. Reads the whole store.

        Args:
            progress: hears what is looked at, how many of it, and of how many.
        """
        found = self.examine(lambda done, of: progress("pages", done, of))
        try:
            with self.read() as connection:
                found += audit.audit(connection, lambda blobs: self._unpacked(blobs, None), self.marks, progress)
        except (StorageError, TypeError, ValueError, OverflowError) as error:  # a damaged page may hold anything
            if not found:
                raise
            found.append(
                Problem(DB, "tables", f"they cannot be read to the end: {error.what if isinstance(error, StorageError) else error}")
            )
        return found

    # Within

    def _placed(self, marks: Sequence[int]) -> list[list[int]]:
        with self.read() as connection:
            return self._places.find(connection, marks)

    def _there(self, connection: sqlite3.Connection, ids: set[int]) -> set[int]:
        asked = "SELECT id FROM records WHERE id IN (SELECT value FROM json_each(?))"
        return {id for (id,) in connection.execute(asked, (json.dumps(sorted(ids)),))} if ids else set()

    def _unpacked(self, blobs: Sequence[tuple[int, bytes]], damaged: Damaged | None) -> Iterator[Row]:
        for id, blob in blobs:
            try:
                try:
                    yield unpack_row(id, blob, self._machines, self.seal)
                except (KeyError, UnknownEpoch):  # another process has written since
                    self._learn()
                    yield unpack_row(id, blob, self._machines, self.seal)
            except StorageError as error:
                if damaged is None:
                    raise
                damaged(id, error)


def open_seal(folder: Path, settings: Mapping[str, bytes], keys: Keys | None) -> Seal | None:
    """What seals a store. Raises: StorageError for no key or a wrong one, and for a key where the store is not encrypted."""
    if "seal" in settings and keys is None:
        raise StorageError(
            f"{folder} is encrypted, and no key is given",
            why="without it, nothing in the store can be read",
            fix="set PANTHERAML_MEMORY_KEY, or PANTHERAML_MEMORY_KEY_FILE to a file with it",
        )
    if "seal" not in settings and keys:
        raise StorageError(
            f"{folder} is not encrypted, and a key is given",
            why="what you put would lie there in the clear, which is not what a key asks for",
            fix="give no key, or make a new store with one and import this one's export",
        )
    return Seal.load(settings["seal"], keys) if keys else None


def load_machines(settings: Mapping[str, bytes]) -> dict[int, Machine]:
    """The machines that have encoded records, by the numbers that rows keep."""
    return {number: (kind, name, dtype) for number, (kind, name, dtype) in enumerate(json.loads(settings.get("machines", b"[]")), 1)}


def _damaged_block(first: int) -> Block:
    raise StorageError(
        f"entry {first} of the ledger is damaged", why="its hash does not hold", fix="`pantheraml memory verify` names what is damaged"
    )
