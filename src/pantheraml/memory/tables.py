"""The tables of store.db, and how each is written and asked. What cannot be made again from elsewhere says itself what it is:
rows (R), blocks of the ledger (L), settings (M, in two tables) and runs of bands (B) begin with a mark and end with a checksum.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import blake3
import numpy as np
from numpy.typing import NDArray

from pantheraml.errors import StorageError
from pantheraml.memory.ledger import START, Head, Tip, What, pack_blocks, pack_change
from pantheraml.memory.pages import DB, HEAD, PAGE, SUMS, WAL, file_sums, fsync, write_sums
from pantheraml.memory.swap import unfinished

VERSION = 1
"""Of the tables; `migrate` brings an older one here."""
SCHEMA = (
    "CREATE TABLE records(id INTEGER PRIMARY KEY, row BLOB NOT NULL)",
    "CREATE TABLE ledger(seq INTEGER PRIMARY KEY, block BLOB NOT NULL)",
    "CREATE TABLE meta(id INTEGER PRIMARY KEY, entry BLOB NOT NULL)",
    "CREATE TABLE places(mark INTEGER NOT NULL, id INTEGER NOT NULL, PRIMARY KEY(mark, id)) WITHOUT ROWID",
    "CREATE TABLE recent(mark INTEGER NOT NULL, id INTEGER NOT NULL, PRIMARY KEY(mark, id)) WITHOUT ROWID",
    "CREATE TABLE bands(id INTEGER PRIMARY KEY, run BLOB NOT NULL)",
    "CREATE TABLE uses(id INTEGER PRIMARY KEY, last INTEGER NOT NULL, times INTEGER NOT NULL)",
    "CREATE TABLE refs(owner INTEGER NOT NULL, referrer INTEGER NOT NULL, PRIMARY KEY(owner, referrer)) WITHOUT ROWID",
    "CREATE TABLE meta_copy(id INTEGER PRIMARY KEY, entry BLOB NOT NULL)",
)
Migration = tuple[str, ...]
STEPS: dict[int, Migration] = {}
"""What brings a store of version N to N + 1: SQL statements."""

_META = struct.Struct("<2sQHI")
META_MARK, BAND_MARK = b"M\x01", b"B\x01"
_DELETED = 0xFFFFFFFF
_BAND = struct.Struct("<2sBI")
_RUNS_OF_A_LEVEL = 8
_LARGEST_RUN = 1 << 24  # entries, 128 MiB: what is larger is not merged any more


def create_file(path: Path, *, fast: bool = False) -> sqlite3.Connection:
    """An empty database with our tables, in a transaction that the caller ends with `finish_file`. fast: the disk is not waited for."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA page_size={PAGE}")
    connection.execute("PRAGMA auto_vacuum=NONE")
    connection.execute(f"PRAGMA journal_mode={'OFF' if fast else 'MEMORY'}")
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("PRAGMA cache_size=-65536")
    connection.execute("BEGIN")
    for statement in SCHEMA:
        connection.execute(statement)
    return connection


def finish_file(connection: sqlite3.Connection) -> None:
    """Commits and closes a file of `create_file`, to be opened with a write-ahead log from now on."""
    connection.execute("COMMIT")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.close()


def migrate(connection: sqlite3.Connection, version: int, seq: int) -> None:
    """Runs the steps from a version to the newest, in the caller's transaction. seq: of the change that says so.

    Raises: StorageError for a version that is newer than this program.
    """
    must_be_current(version, may_be_older=True)
    while version < VERSION:
        for statement in STEPS[version]:
            connection.execute(statement)
        version += 1
    write_meta(connection, {"version": b"%d" % version}, seq)


def must_be_current(version: int, *, may_be_older: bool = False) -> None:
    """Raises: StorageError for tables that this program cannot read."""
    if version > VERSION:
        raise StorageError(
            f"the store has format {version}, and this program knows {VERSION}",
            why="it was written by a newer version, whose tables may mean something else",
            fix="pip install -U pantheraml",
        )
    if version < VERSION and not may_be_older:
        raise StorageError(
            f"the store has format {version}, and this program reads {VERSION}",
            why="bringing it there is writing",
            fix="open it for writing once: that does it",
        )


def no_store(folder: Path) -> StorageError:
    """The error where nothing is."""
    return StorageError(f"there is no store in {folder}", why=f"it has no {DB}", fix="check the path; writing makes a new one")


def cannot_be_opened(folder: Path, what: str) -> StorageError:
    """The error where SQLite cannot read what it must know first."""
    return StorageError(
        f"{folder / DB} cannot be opened: {what}",
        why="the page with what SQLite must know first, or both with the settings, are damaged",
        fix="`pantheraml memory repair` saves what is sound; a copy of the folder beforehand does no harm",
    )


def must_be_new(folder: Path, create: bool) -> None:
    """Raises: StorageError if a folder without store.db is not one where a store may be made."""
    if unfinished(folder):
        raise StorageError(
            f"{folder} is being repaired, or a repair was killed",
            why="its files are being moved into their places",
            fix="wait for it; if none runs, open the store for writing once, which ends it",
        )
    head = Head(folder / HEAD).read()
    logged = (folder / WAL).exists() and (folder / WAL).stat().st_size > 0  # a reader may leave an empty one
    if logged or (isinstance(head, tuple) and head[0] > 1):
        raise StorageError(
            f"{folder / DB} is missing",
            why="other files of the store are there, so it was not empty",
            fix="put it back, or `pantheraml memory repair`: it saves what the others hold",
        )
    if not create:
        raise no_store(folder)


def create_store(folder: Path, settings: Mapping[str, bytes]) -> None:
    """A new store: it is there, whole, when store.db is. Raises: OSError."""
    part = folder / f"{DB}.part"
    for leftover in folder.glob(f"{DB}.part*"):
        leftover.unlink()
    connection = create_file(part)
    settings = {"version": b"%d" % VERSION, "store": secrets.token_hex(16).encode(), **settings}
    write_meta(connection, settings, 1)
    blocks, tip = pack_blocks(Tip(0, START, 1), time.time_ns() // 1000, 1, pack_change(What.META), "created")
    connection.executemany("INSERT INTO ledger VALUES(?, ?)", blocks)
    finish_file(connection)
    write_sums(folder / SUMS, file_sums(part))
    Head(folder / HEAD).write(tip)
    for path in (folder / HEAD, part):
        fsync(path)
    part.rename(folder / DB)
    fsync(folder)


# Settings: each in two tables, which lie on different pages.


def pack_meta(name: str, value: bytes | None, seq: int) -> bytes:
    """One setting. value: None where it was taken away. seq: of the newest change then; the newer of two copies counts."""
    text = name.encode()
    body = _META.pack(META_MARK, seq, len(text), _DELETED if value is None else len(value)) + text + (value or b"")
    return body + blake3.blake3(body).digest(8)


def unpack_meta(blob: bytes) -> tuple[int, str, bytes | None] | None:
    """seq, name and value of a setting; None if the bytes are not what was written."""
    if (
        not isinstance(blob, bytes)
        or len(blob) < _META.size + 8
        or blob[:2] != META_MARK
        or blake3.blake3(blob[:-8]).digest(8) != blob[-8:]
    ):
        return None
    _, seq, name, size = _META.unpack_from(blob)
    start = _META.size + name
    return seq, blob[_META.size : start].decode(), None if size == _DELETED else blob[start : start + size]


def read_meta(connection: sqlite3.Connection) -> dict[str, bytes]:
    """All settings, each from the sound copy that is the newest."""
    found: dict[str, tuple[int, bytes | None]] = {}
    for table in ("meta", "meta_copy"):
        try:
            entries = connection.execute(f"SELECT entry FROM {table}").fetchall()
        except sqlite3.DatabaseError:  # a damaged page: the other table has it all
            continue
        for (blob,) in entries:
            entry = unpack_meta(blob)
            if entry and entry[0] >= found.get(entry[1], (-1, b""))[0]:
                found[entry[1]] = entry[0], entry[2]
    return {name: value for name, (_, value) in found.items() if value is not None}


def write_meta(connection: sqlite3.Connection, settings: Mapping[str, bytes | None], seq: int) -> None:
    """Sets some, or takes them away (None), in both tables."""
    known = {entry[1]: id for id, blob in connection.execute("SELECT id, entry FROM meta") if (entry := unpack_meta(blob))}
    for name, value in settings.items():
        id = known.setdefault(name, max(known.values(), default=0) + 1)
        for table in ("meta", "meta_copy"):
            connection.execute(f"REPLACE INTO {table} VALUES(?, ?)", (id, pack_meta(name, value, seq)))


# Where records are: marks of keys and of contents lead to numbers of records. New ones go into a small table, since a mark belongs
# anywhere in the large one, and 10,000 of them would touch most of its pages; now and then the small one is poured into the large one.


@dataclass(slots=True)
class Places:
    """The tables `places` and `recent`. count: entries of the latter."""

    count: int = 0

    def load(self, connection: sqlite3.Connection) -> None:
        """Counts anew."""
        (self.count,) = connection.execute("SELECT count(*) FROM recent").fetchone()

    def add(self, connection: sqlite3.Connection, entries: Sequence[tuple[int, int]], records: int) -> None:
        """Adds (mark, id). records: about how many the store has."""
        connection.executemany("INSERT OR IGNORE INTO recent VALUES(?, ?)", sorted(entries))
        self.count += len(entries)
        if self.count > max(20_000, records // 4):
            connection.execute("INSERT OR IGNORE INTO places SELECT mark, id FROM recent ORDER BY mark, id")
            connection.execute("DELETE FROM recent")
            self.count = 0

    def remove(self, connection: sqlite3.Connection, entries: Iterable[tuple[int, int]]) -> None:
        """Takes (mark, id) away."""
        entries = sorted(entries)
        for table in ("recent", "places"):
            connection.executemany(f"DELETE FROM {table} WHERE mark=? AND id=?", entries)

    @staticmethod
    def find(connection: sqlite3.Connection, marks: Sequence[int]) -> list[list[int]]:
        """The records of each mark; nearly always one or none, but two things may have one mark."""
        if len(marks) == 1:
            asked = "SELECT id FROM recent WHERE mark=?1 UNION ALL SELECT id FROM places WHERE mark=?1"
            return [[id for (id,) in connection.execute(asked, (marks[0],)) if isinstance(id, int)]]
        found: list[list[int]] = [[] for _ in marks]
        order = sorted(range(len(marks)), key=marks.__getitem__)
        asked = json.dumps([marks[i] for i in order])
        for table in ("recent", "places"):
            for i, id in connection.execute(f"SELECT j.key, p.id FROM json_each(?) j CROSS JOIN {table} p ON p.mark = j.value", (asked,)):
                if isinstance(id, int):  # a damaged page may hold anything
                    found[order[i]].append(id)
        return found

    @staticmethod
    def all(connection: sqlite3.Connection) -> NDArray[np.int64]:
        """[N, 2] of mark and id, in no order."""
        parts = [np.zeros((0, 2), np.int64)]
        for table in ("recent", "places"):
            asked = connection.execute(f"SELECT mark, id FROM {table}")
            while some := asked.fetchmany(100_000):
                parts.append(np.array(some, np.int64))
        return np.concatenate(parts)


# Bands: numbers that records which are alike have in common. They are kept in sorted runs, eight of which become one of the next level,
# since a tree of single entries would take eight random insertions a record.


@dataclass(slots=True)
class Bands:
    """The table `bands`. A run is an array of uint64, the upper half of a band and the number of a record, sorted."""

    _runs: dict[int, NDArray[np.uint64]] = field(default_factory=dict[int, NDArray[np.uint64]])
    _levels: dict[int, int] = field(default_factory=dict[int, int])

    def forget(self) -> None:
        """What was read may have been rolled back."""
        self._runs.clear()
        self._levels.clear()

    def add(self, connection: sqlite3.Connection, ids: Sequence[int], bands_NB: NDArray[np.int64]) -> None:
        """Adds the bands of some records. bands_NB: see `same.bands`."""
        entries = _entries(bands_NB) | np.array(ids, np.uint64)[:, None]
        self._load(connection)
        self._write(connection, np.unique(entries), 0)
        level = 0
        while len(runs := [id for id, each in self._levels.items() if each == level]) >= _RUNS_OF_A_LEVEL:
            if sum(len(self._runs[id]) for id in runs) > _LARGEST_RUN:
                break
            merged = np.unique(np.concatenate([self._runs[id] for id in runs]))
            level += 1
            self._write(connection, merged, level)  # before the others go, so that its number was never another run's
            connection.executemany("DELETE FROM bands WHERE id=?", [(id,) for id in runs])
            for id in runs:
                del self._runs[id], self._levels[id]

    def near(self, connection: sqlite3.Connection, bands_NB: NDArray[np.int64], most: int) -> list[list[int]]:
        """For each of N, records with most bands in common, of which some may be gone or changed. Bands of over 1,000 say nothing."""
        self._load(connection)
        wanted = _entries(bands_NB).ravel()
        order = np.argsort(wanted)
        wanted = wanted[order]
        found: list[list[int]] = [[] for _ in bands_NB]
        for run in self._runs.values():
            first = np.searchsorted(run, wanted)
            there = np.flatnonzero(run[np.minimum(first, len(run) - 1)] >> np.uint64(32) == wanted >> np.uint64(32)) if len(run) else []
            end = np.searchsorted(run, wanted[there] | np.uint64(0xFFFFFFFF), side="right")
            for i, a, b in zip(order[there].tolist(), first[there].tolist(), end.tolist(), strict=True):
                if b - a <= 1000:
                    found[i // bands_NB.shape[1]] += (run[a:b] & np.uint64(0xFFFFFFFF)).tolist()
        return [_most_frequent(each, most) for each in found]

    def ids(self, connection: sqlite3.Connection) -> NDArray[np.int64]:
        """Records that have bands, sorted; some may be gone."""
        self._load(connection)
        parts = [np.unique(run & np.uint64(0xFFFFFFFF)) for run in self._runs.values()]
        return np.unique(np.concatenate([np.zeros(0, np.uint64), *parts])).astype(np.int64)

    def _load(self, connection: sqlite3.Connection) -> None:
        there = {id for (id,) in connection.execute("SELECT id FROM bands")}
        for id in self._runs.keys() - there:
            del self._runs[id], self._levels[id]
        for id in sorted(there - self._runs.keys()):
            (blob,) = connection.execute("SELECT run FROM bands WHERE id=?", (id,)).fetchone()
            run = unpack_run(blob)
            # A damaged run costs candidates for deltas and nothing else; `verify` names it.
            self._levels[id], self._runs[id] = run if run else (-1, np.zeros(0, np.uint64))

    def _write(self, connection: sqlite3.Connection, entries: NDArray[np.uint64], level: int) -> None:
        id = connection.execute("INSERT INTO bands(run) VALUES(?)", (pack_run(entries, level),)).lastrowid or 0
        self._runs[id], self._levels[id] = entries, level


def pack_run(entries: NDArray[np.uint64], level: int) -> bytes:
    """A sorted run of bands."""
    body = _BAND.pack(BAND_MARK, level, len(entries)) + entries.astype("<u8").tobytes()
    return body + blake3.blake3(body).digest(8)


def unpack_run(blob: bytes) -> tuple[int, NDArray[np.uint64]] | None:
    """Level and entries of a run; None if the bytes are not what was written."""
    if (
        not isinstance(blob, bytes)
        or len(blob) < _BAND.size + 8
        or blob[:2] != BAND_MARK
        or blake3.blake3(blob[:-8]).digest(8) != blob[-8:]
    ):
        return None
    _, level, count = _BAND.unpack_from(blob)
    return level, np.frombuffer(blob, "<u8", count, _BAND.size).astype(np.uint64)


def _entries(bands_NB: NDArray[np.int64]) -> NDArray[np.uint64]:
    return bands_NB.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)


def _most_frequent(ids: list[int], most: int) -> list[int]:
    if len(ids) < 2:
        return ids
    values, counts = np.unique(np.array(ids), return_counts=True)
    return values[np.argsort(-counts, kind="stable")][:most].tolist()
