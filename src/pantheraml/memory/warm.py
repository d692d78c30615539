"""The records of a store in SQLite, written: each step is durable when it returns, and stands in the ledger."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pantheraml.errors import StorageError
from pantheraml.memory import tables
from pantheraml.memory.ledger import What
from pantheraml.memory.records import Records, Use
from pantheraml.memory.rows import Row, found_by, pack_row, sealed_in
from pantheraml.memory.seal import Keys


class Warm(Records):
    """The records of a store, to be read and written. See `Records` and `Database` for how it is opened, and for what can be asked."""

    def __init__(self, folder: Path, **how: Any) -> None:
        self._touched: dict[int, Use] = {}
        self._flushed: dict[int, Use] = {}
        super().__init__(folder, **how)

    def insert(self, rows: Sequence[Row], bands_NB: NDArray[np.int64] | None = None) -> list[int]:
        """Adds records whose keys are not taken (see `find_many`). Returns: their numbers.

        Args:
            rows: with id 0, or one that was reserved in this transaction. bands_NB: of each, for `near`.
        Raises: DataError for what does not fit into a row; ValueError for a number that is taken, or a base that is not there.
        """
        with self.write() as connection:
            fresh = iter(self.reserve(sum(not row.id for row in rows)))
            ids = [row.id or next(fresh) for row in rows]
            if max(ids, default=0) >= self._next_id:
                raise ValueError(f"record number {max(ids)} was not reserved")
            self._put(connection, "INSERT", What.PUT, rows, ids)
            if bands_NB is not None:
                self._band(connection, ids, bands_NB)
        return ids

    def replace(self, rows: Sequence[Row], what: What = What.REPLACE, bands_NB: NDArray[np.int64] | None = None) -> None:
        """Writes other rows in place of those with the same numbers. what: MOVE where the content is the same, but lies elsewhere.

        Raises: as `insert`; ValueError for a number that is not there.
        """
        with self.write() as connection:
            old = self.rows([row.id for row in rows])
            if len(old) != len(rows):
                raise ValueError(f"no records to replace, or two of one: {sorted({row.id for row in rows} - old.keys())[:5]}")
            self._take_out(connection, old.values())
            self._put(connection, "REPLACE", what, rows, [row.id for row in rows])
            if bands_NB is not None:
                self._band(connection, [row.id for row in rows], bands_NB)

    def delete(self, ids: Sequence[int]) -> int:
        """Takes records away. Returns: how many of them there were.

        Raises: ValueError if another record takes one of them to be decoded (`referrers`).
        """
        with self.write() as connection:
            old = self.rows(ids)
            for owner, referrers in self.referrers(list(old)).items():
                if left := [id for id in referrers if id not in old]:
                    raise ValueError(f"records {left[:5]} cannot be decoded without record {owner}")
            self._take_out(connection, old.values())
            for table in ("records", "uses"):
                connection.executemany(f"DELETE FROM {table} WHERE id=?", [(id,) for id in old])
            for row in old.values():
                self.change(What.DELETE, row.id, *self._marked(row))
        return len(old)

    def add_bands(self, ids: Sequence[int], bands_NB: NDArray[np.int64]) -> None:
        """Lets `near` find records."""
        with self.write() as connection:
            self._band(connection, ids, bands_NB)

    def note(self, what: What, text: str) -> None:
        """An entry in the ledger that is about no single record. It is not sealed: no secrets."""
        with self.write():
            self.change(what, note=text)

    def touch(self, ids: Sequence[int], now: int) -> None:
        """Records were used, at `now` (microseconds since 1970). Written with the next transaction, or when the store is closed."""
        if self._handles.writer:
            with self._pool:
                for id in ids:
                    self._touched[id] = Use(now, self._touched[id].times + 1 if id in self._touched else 1)

    # Keys

    def rotate(self, keys: Keys) -> None:
        """From now on another master key opens the store, and a new data key seals. `reseal` brings old records there."""
        if self.seal is None:
            raise StorageError(
                f"{self.folder} is not encrypted",
                why="it was made without a key",
                fix="make a store with a key, and import this one's export",
            )
        seal = self.seal.next_epoch()
        with self.write() as connection:
            seq = self.change(What.KEY, note=f"master key rotated, data key {seal.epoch}")
            tables.write_meta(connection, {"seal": seal.stored(keys)}, seq)
        self.seal, self._keys = seal, keys
        self.checkpoint()

    def reseal(self, after_id: int = 0, most: int = 10_000) -> int | None:
        """Seals up to so many records behind a number with the newest data key. Returns: the last number; None: there are no more."""
        with self.write() as connection:
            blobs = connection.execute("SELECT id, row FROM records WHERE id>? ORDER BY id LIMIT ?", (after_id, most)).fetchall()
            old = list(self._unpacked([each for each in blobs if self.seal and sealed_in(each[1]) != self.seal.epoch], None))
            if old:
                self._put(connection, "REPLACE", What.MOVE, old, [row.id for row in old], again=True)
        return blobs[-1][0] if blobs else None

    def retire(self, keep: frozenset[int] = frozenset()) -> frozenset[int]:
        """Gives up data keys, so that what they have sealed can never be read again. Returns: those given up.

        Args:
            keep: epochs that something outside of the records still needs (cold segments, indexes).
        """
        assert self.seal
        with self.write() as connection:
            used = {sealed_in(blob) for (blob,) in connection.execute("SELECT row FROM records")}
            seal = self.seal.only({epoch for epoch in used if epoch is not None} | keep)
            gone = self.seal.epochs - seal.epochs
            if gone and self._keys:
                seq = self.change(What.KEY, note=f"data keys given up: {sorted(gone)}")
                tables.write_meta(connection, {"seal": seal.stored(self._keys)}, seq)
        self.seal = seal
        return gone

    # Within

    def _marked(self, row: Row) -> tuple[bytes, int, bytes]:
        return self.marks.tenant(row.tenant), self.marks.key(row.tenant, row.key), self.marks.content(row.tenant, row.hash)

    def _put(
        self, connection: sqlite3.Connection, verb: str, what: What, rows: Sequence[Row], ids: list[int], *, again: bool = False
    ) -> None:
        packed: list[tuple[int, bytes]] = []
        places: list[tuple[int, int]] = []
        refs: list[tuple[int, int]] = []
        for row, id in zip(rows, ids, strict=True):
            tenant, key, content = self._marked(row)
            seq = self.change(what, id, tenant, key, content)
            packed.append((id, pack_row(row, id, seq, self._machine(row), self.seal)))
            places += found_by(row, id, key, content)
            if (base := row.base) is not None:
                refs.append((base, id))
        connection.executemany(f"{verb} INTO records VALUES(?, ?)", packed)
        if again:
            return
        self._places.add(connection, places, self._next_id)
        if refs:
            missing = {owner for owner, _ in refs} - self._there(connection, {owner for owner, _ in refs})
            if missing:
                raise ValueError(f"records {sorted(missing)[:5]} are not there, and others are to be decoded with them")
            connection.executemany("INSERT INTO refs VALUES(?, ?)", refs)

    def _take_out(self, connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
        places: list[tuple[int, int]] = []
        refs: list[tuple[int, int]] = []
        for row in rows:
            _, key, content = self._marked(row)
            places += found_by(row, row.id, key, content)
            if (base := row.base) is not None:
                refs.append((base, row.id))
        self._places.remove(connection, places)
        connection.executemany("DELETE FROM refs WHERE owner=? AND referrer=?", refs)

    def _band(self, connection: sqlite3.Connection, ids: Sequence[int], bands_NB: NDArray[np.int64]) -> None:
        with self._bands_lock:
            self._bands.add(connection, ids, bands_NB)

    def _machine(self, row: Row) -> int:
        if row.origin is None:
            return 0
        machine = row.origin.kind, row.origin.name, row.origin.dtype
        for number, known in self._machines.items():
            if known == machine:
                return number
        self._machines[len(self._machines) + 1] = machine
        self.set({"machines": json.dumps(list(self._machines.values())).encode()})
        return len(self._machines)

    def _before_commit(self, connection: sqlite3.Connection) -> None:
        with self._pool:
            self._touched, self._flushed = {}, self._touched
        connection.executemany(
            "INSERT INTO uses SELECT ?1, ?2, ?3 WHERE EXISTS (SELECT 1 FROM records WHERE id=?1)"
            " ON CONFLICT(id) DO UPDATE SET last=max(last, excluded.last), times=times+excluded.times",
            [(id, use.last, use.times) for id, use in self._flushed.items()],
        )

    def _after_commit(self) -> None:
        self._flushed = {}
        super()._after_commit()

    def _forget(self, connection: sqlite3.Connection) -> None:
        with self._pool:
            for id, use in self._flushed.items():
                again = self._touched.get(id, Use(0, 0))
                self._touched[id] = Use(max(use.last, again.last), use.times + again.times)
            self._flushed = {}
        with self._bands_lock:
            self._bands.forget()
        self._places.load(connection)
        self._learn()
