"""A damaged store made whole: a new store.db from all that salvage.py can read, and the old files kept in quarantine.

A row counts if the ledger's newest change of it is the one that wrote it. Where that part of the ledger is lost, a row that is there is
rather kept than lost, and named. The chain of the ledger goes on with an entry that says what was lost.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from logging import getLogger
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pantheraml.errors import StorageError
from pantheraml.memory import tables
from pantheraml.memory.connections import disk_errors, sqlite_errors, take_lock
from pantheraml.memory.ledger import CHANGE, LIVE, START, Head, Marks, Tip, What, pack_blocks, pack_change, read_chain, repair_note
from pantheraml.memory.pages import DB, HEAD, SUMS, WAL, Problem, file_sums, write_sums
from pantheraml.memory.records import Records, load_machines, open_seal
from pantheraml.memory.rows import Machine, Row, found_by, pack_row, unpack_row
from pantheraml.memory.salvage import Wreck
from pantheraml.memory.seal import Keys
from pantheraml.memory.swap import beside, finish_swap, swap

_SKIPPED_IDS = 1 << 20
"""Numbers of records that are not given out after the end of the ledger was lost: some of them were given out in what was lost."""
_log = getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lost:
    """A record that could not be saved. key: what it seems to have been, where that could be read."""

    id: int
    key: str | None
    why: str


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair has done.

    Attributes:
        kept: records that are in the store now. lost: those that are not. problems: damage that was met.
        doubtful: records that were kept although the lost part of the ledger may have said that they were deleted or replaced.
        missing: (first, last) number of changes that the ledger has lost. quarantine: where the old files are; None: nothing was wrong.
    """

    kept: int = 0
    lost: tuple[Lost, ...] = ()
    doubtful: tuple[int, ...] = ()
    missing: tuple[tuple[int, int], ...] = ()
    problems: tuple[Problem, ...] = ()
    quarantine: Path | None = None


def repair(folder: Path, *, keys: Keys | None = None, announce: Callable[[str], None] = _log.warning) -> Repaired:
    """Looks at everything, and makes the store whole if something is damaged. No other process may write; readers must open it again.

    Args:
        keys: of an encrypted store. announce: hears of each problem, and of each record that is lost.
    Raises: StorageError if there is nothing to repair from, the keys are wrong or lost, or the disk refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise tables.no_store(folder)
    lock = take_lock(folder, 0.0)
    try:
        with disk_errors(folder), sqlite_errors(folder):
            finish_swap(folder)
            problems = _looked_at(folder, keys)
            if all(each.harmless for each in problems):
                lock.release()
                return _settled(folder, keys, problems, announce)
            with Wreck(folder) as wreck:
                rebuilt = _Rebuilt(wreck, keys, folder)
                rebuilt.write()
            when = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
            quarantine = swap(folder, when)
    finally:
        lock.release()  # also where it was before
    for problem in problems:
        announce(str(problem))
    for lost in rebuilt.lost:
        announce(f"record {lost.id}{f' ({lost.key!r})' if lost.key else ''} is lost: {lost.why}")
    return Repaired(rebuilt.kept, tuple(rebuilt.lost), tuple(rebuilt.doubtful), tuple(rebuilt.missing), tuple(problems), quarantine)


def _settled(folder: Path, keys: Keys | None, problems: list[Problem], announce: Callable[[str], None]) -> Repaired:
    """Where a loss of power has left what a writer puts in order by itself."""
    if problems:
        with Records(folder, keys=keys, announce=announce) as store:
            store.checkpoint()
            more = store.verify()
        if not all(each.harmless for each in more):
            return repair(folder, keys=keys, announce=announce)
    return Repaired(problems=tuple(problems))


def _looked_at(folder: Path, keys: Keys | None) -> list[Problem]:
    if not (folder / DB).exists():
        if not (folder / WAL).exists():
            tables.must_be_new(folder, create=False)
        return [Problem(DB, "file", "it is not there")]
    try:
        with Records(folder, keys=keys, readonly=True, announce=lambda said: None) as store:
            found = store.examine()
            return found if any(not each.harmless for each in found) else store.verify()
    except StorageError as error:
        with Wreck(folder) as wreck:
            settings = {name: value for name, (_, value) in wreck.read().settings.items() if value is not None}
            open_seal(folder, settings, keys)  # a wrong key is no damage
            return wreck.problems or [Problem(DB, "file", error.what)]


class _Rebuilt:
    """A new store.db and its side files, beside the old ones, from what was found."""

    def __init__(self, wreck: Wreck, keys: Keys | None, folder: Path) -> None:
        self._wreck, self._folder = wreck, folder
        self._found = found = wreck.read()
        self.kept = 0
        self.lost: list[Lost] = []
        self.doubtful: list[int] = []
        self._settings = {name: value for name, (_, value) in found.settings.items() if value is not None}
        self._seal = open_seal(folder, self._settings, keys)
        # Without the key of the marks, all changes must be marked anew: nobody can tell any more what the old ones are about.
        self._remarked = self._seal is None and "index_key" not in self._settings
        if self._remarked:
            self._settings["index_key"] = os.urandom(32)
        self._marks = Marks(self._seal.index_key if self._seal else self._settings["index_key"])
        self._machines = _Machines(load_machines(self._settings))
        self._history = read_chain(sorted(found.blocks.items()))
        self._tip = self._history.tip or Tip(0, START, 1)
        self._first = max(self._tip.seq, found.acknowledged or 0, max(found.seq, default=0)) + 1
        self._breaks = [*self._history.breaks, *([(self._tip.seq + 1, self._first)] if self._first > self._tip.seq + 1 else [])]
        self.missing = [(first, after - 1) for first, after in self._breaks if after > first and (first, after) not in self._history.told]
        self._newest = self._history.newest()
        self._ids = self._newest[1]["id"].astype(np.int64)
        self._changes = bytearray()
        self._places = array("q"), array("q")  # marks, and numbers of records
        self._keys: dict[int, tuple[int, int]] = {}  # of doubtful records: their mark and seq
        self._refs: list[tuple[int, int]] = []

    def write(self) -> None:
        """Writes it. Raises: OSError, sqlite3.Error."""
        beside(self._folder, DB).unlink(missing_ok=True)
        connection = tables.create_file(beside(self._folder, DB), fast=True)
        connection.executemany("INSERT INTO records VALUES(?, ?)", self._rows())
        ids = {id for (id,) in connection.execute("SELECT id FROM records")}
        marks, owners = (np.array(each, np.int64) for each in self._places)
        gone = self._without_key(marks, owners, ids) | self._without_base(ids)
        connection.executemany("DELETE FROM records WHERE id=?", [(id,) for id in gone])
        order = np.lexsort((owners, marks))
        for some in np.array_split(order, len(order) // 100_000 + 1):
            pairs = zip(marks[some].tolist(), owners[some].tolist(), strict=True)
            connection.executemany("INSERT OR IGNORE INTO places VALUES(?, ?)", [each for each in pairs if each[1] in ids])
        connection.executemany("INSERT OR IGNORE INTO refs VALUES(?, ?)", [each for each in self._refs if each[1] in ids])
        connection.executemany("INSERT INTO uses VALUES(?, ?, ?)", [(id, *use) for id, use in self._found.uses.items() if id in ids])
        self._write_bands(connection, ids)
        self.kept = len(ids)
        blocks = [*sorted(self._found.blocks.items()), *self._told(max(ids, default=0))]
        connection.executemany("INSERT INTO ledger VALUES(?, ?)", blocks)
        settings = {"store": secrets.token_hex(16).encode(), **self._settings, "version": b"%d" % tables.VERSION}
        tables.write_meta(connection, settings, self._tip.seq)
        tables.finish_file(connection)
        write_sums(beside(self._folder, SUMS), file_sums(beside(self._folder, DB)))
        Head(beside(self._folder, HEAD)).write(self._tip)

    def _rows(self) -> Iterator[tuple[int, bytes]]:
        found, (seqs, changes) = self._found, self._newest
        best = found.best()
        ids = np.array(found.id, np.int64)[best]
        at = np.searchsorted(self._ids, ids)
        for i, n in enumerate(best.tolist()):
            id, seq = found.id[n], found.seq[n]
            known = int(at[i]) if at[i] < len(seqs) and int(self._ids[at[i]]) == id else None
            newest = seq if known is None else int(seqs[known])
            if newest > seq and changes["what"][known] not in LIVE:
                continue
            blob = self._wreck.row(found, n)
            try:
                row = unpack_row(id, blob, self._machines, self._seal)
            except StorageError as error:
                self._lose(id, error.what)
                continue
            marks = self._marks.tenant(row.tenant), self._marks.key(row.tenant, row.key), self._marks.content(row.tenant, row.hash)
            if newest > seq and (self._remarked or changes["content"][known].tobytes() != marks[2]):
                self._lose(id, f"change {newest} has written it, and what is left of it is of change {seq}")
                continue
            if not found.current[n] and any(last > seq for _, last in self.missing):
                self.doubtful.append(id)
                self._keys[id] = marks[1], seq
            if known is None or newest != seq or self._remarked:
                self._changes += pack_change(What.KEEP, id, *marks)
                blob = pack_row(row, id, self._seq(), self._machine(row), self._seal)
            for mark, _ in found_by(row, id, marks[1], marks[2]):
                self._places[0].append(mark)
                self._places[1].append(id)
            if (base := row.base) is not None:
                self._refs.append((base, id))
            yield id, blob
        there = np.isin(self._ids, ids)
        for k in np.flatnonzero(np.isin(changes["what"], LIVE) & ~there).tolist():
            perhaps = ", or a change that is lost has deleted it" if any(last > seqs[k] for _, last in self.missing) else ""
            self._lose(int(self._ids[k]), f"change {seqs[k]} has written it, and no sound copy is left{perhaps}")

    def _without_key(self, marks: NDArray[np.int64], owners: NDArray[np.int64], ids: set[int]) -> set[int]:
        """Takes out doubtful records whose key another one has: they were deleted, or replaced under another number."""
        gone: set[int] = set()
        for id, (mark, seq) in self._keys.items():
            others = set(owners[marks == mark].tolist()) - {id} - gone
            if any(other not in self._keys or self._keys[other][1] > seq for other in others):
                self._lose(id, "another record has its key now, so it was deleted by a change that is lost")
                gone.add(id)
        self.doubtful = [id for id in self.doubtful if id not in gone]
        ids -= gone
        return gone

    def _without_base(self, ids: set[int]) -> set[int]:
        """Takes out what cannot be decoded any more; `ids` are those that are left."""
        gone: set[int] = set()
        while more := [(base, id) for base, id in self._refs if id in ids and base not in ids]:
            for base, id in more:
                if id in ids:
                    self._lose(id, f"it takes record {base} to decode it, which is lost")
                    ids.remove(id)
                    gone.add(id)
        return gone

    def _lose(self, id: int, why: str) -> None:
        k = int(np.searchsorted(self._ids, id))
        known = k < len(self._ids) and int(self._ids[k]) == id
        marks = self._newest[1][k].tobytes()[9:] if known else bytes(32)
        self._changes += pack_change(What.LOST, id)[:9] + marks
        self.lost.append(Lost(id, self._found.hurt.get(id), why))

    def _told(self, largest: int) -> list[tuple[int, bytes]]:
        """Blocks that go on behind the ledger, and say what was lost."""
        words = [f"{len(self.lost)} records lost"]
        words += [f"changes {first} to {last} lost" for first, last in self.missing]
        words += [f"{problem}" for problem in self._wreck.problems[:20]]
        self._changes += pack_change(What.REPAIR)
        next_id = max(self._tip.next_id, largest + 1, *(lost.id + 1 for lost in self.lost), 1)
        if self._first > self._tip.seq + 1:
            next_id = min(next_id + _SKIPPED_IDS, (1 << 32) - 1)
        start = Tip(self._first - 1, self._tip.hash, next_id)
        blocks, self._tip = pack_blocks(
            start, time.time_ns() // 1000, next_id, bytes(self._changes), repair_note(self._breaks, "; ".join(words))
        )
        return blocks

    def _seq(self) -> int:
        return self._first - 1 + len(self._changes) // CHANGE.itemsize

    def _machine(self, row: Row) -> int:
        if row.origin is None:
            return 0
        machine = row.origin.kind, row.origin.name, row.origin.dtype
        return next((number for number, known in self._machines.items() if known == machine), 0)

    def _write_bands(self, connection: sqlite3.Connection, ids: set[int]) -> None:
        entries = np.unique(np.concatenate([np.zeros(0, np.uint64), *self._found.bands]))
        entries = entries[np.isin(entries & np.uint64(0xFFFFFFFF), np.fromiter(ids, np.uint64, len(ids)))]
        if len(entries):
            connection.execute("INSERT INTO bands(run) VALUES(?)", (tables.pack_run(entries, max(len(entries).bit_length() // 3 - 3, 0)),))


class _Machines(dict[int, Machine]):
    """Machines by their numbers; a number that was lost is an unknown machine."""

    def __missing__(self, number: int) -> Machine:
        return "unknown", "unknown", "unknown"
