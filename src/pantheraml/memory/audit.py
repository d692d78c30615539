"""Whether the tables agree: the ledger's chain, the records with what it says of them, the indexes with the records."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pantheraml.errors import StorageError
from pantheraml.memory.ledger import LIVE, History, Marks, read_chain
from pantheraml.memory.pages import DB, Problem
from pantheraml.memory.rows import Row, found_by
from pantheraml.memory.tables import Places, unpack_meta, unpack_run

_SOME = 2000
_NAMED = 20
"""Problems of one kind that are told one by one."""


def audit(
    connection: sqlite3.Connection,
    unpack: Callable[[Sequence[tuple[int, bytes]]], Iterable[Row]],
    marks: Marks,
    progress: Callable[[str, int, int], None],
) -> list[Problem]:
    """Reads all tables as they were at one moment, and gives what does not agree.

    Args:
        unpack: gives rows for (number, bytes), or raises StorageError. progress: hears what is looked at, how many, and of how many.
    """
    connection.execute("BEGIN")
    try:
        history = read_chain(connection.execute("SELECT seq, block FROM ledger ORDER BY seq"))
        found = list(_chain(history))
        progress("ledger", len(history.seq), len(history.seq))
        seen = _Seen()
        found += _few("records", seen.walk(connection, unpack, marks, history, progress))
        found += _few("indexes", _indexes(connection, seen))
        found += _few("keys", _twice(connection, unpack, np.concatenate(seen.keys)))
        found += _settings(connection)
        for id, blob in connection.execute("SELECT id, run FROM bands"):
            if unpack_run(blob) is None:
                found.append(Problem(DB, f"bands, run {id}", "it does not match its checksum"))
    finally:
        connection.execute("ROLLBACK")
    return found


def _chain(history: History) -> Iterator[Problem]:
    for first in history.damaged[:_NAMED]:
        yield Problem(DB, f"ledger, entry {first}", "it is not what was written")
    for missing, present in history.breaks:
        if (missing, present) not in history.told:
            what = (
                f"changes {missing} to {present - 1} are missing" if present > missing else "its hash does not go on from the entry before"
            )
            yield Problem(DB, f"ledger, entry {present}", what)


class _Seen:
    """What a walk over the records has found: where they should be found again, and what refers to what."""

    def __init__(self) -> None:
        self.places = [np.zeros((0, 2), np.int64)]
        self.keys = [np.zeros((0, 2), np.int64)]
        self.refs: set[tuple[int, int]] = set()
        self.ids = np.zeros(0, np.int64)

    def walk(
        self,
        connection: sqlite3.Connection,
        unpack: Callable[[Sequence[tuple[int, bytes]]], Iterable[Row]],
        marks: Marks,
        history: History,
        progress: Callable[[str, int, int], None],
    ) -> Iterator[Problem]:
        seqs, changes = history.newest()
        live = np.isin(changes["what"], LIVE)
        seqs, changes = seqs[live], changes[live]
        self.ids = changes["id"].astype(np.int64)
        there, after, done = np.zeros(len(self.ids), bool), 0, 0
        while blobs := connection.execute(f"SELECT id, row FROM records WHERE id>? ORDER BY id LIMIT {_SOME}", (after,)).fetchall():
            after, done = blobs[-1][0], done + len(blobs)
            ids = np.array([id for id, _ in blobs])
            at = np.minimum(np.searchsorted(self.ids, ids), max(len(self.ids) - 1, 0))
            known = (self.ids[at] == ids).tolist() if len(self.ids) else [False] * len(ids)
            there[at[known]] = True
            said = (seqs[at].tolist(), changes["key"][at].tolist(), changes["content"][at].tobytes()) if len(self.ids) else ([], [], b"")
            places: list[tuple[int, int]] = []
            keys: list[tuple[int, int]] = []
            for i, each in enumerate(blobs):
                try:
                    (row,) = unpack([each])
                except StorageError as error:
                    yield Problem(DB, f"record {each[0]}", error.what)
                    continue
                key, content = marks.key(row.tenant, row.key), marks.content(row.tenant, row.hash)
                if not known[i]:
                    yield Problem(DB, f"record {row.id} ({row.key!r})", "the ledger does not know it, or says that it was deleted")
                elif (said[0][i], said[1][i], said[2][16 * i : 16 * i + 16]) != (row.seq, key, content):
                    yield Problem(
                        DB, f"record {row.id} ({row.key!r})", f"it is of change {row.seq}, the ledger says {said[0][i]}, or another"
                    )
                places += found_by(row, row.id, key, content)
                keys.append((key, row.id))
                if (base := row.base) is not None:
                    self.refs.add((base, row.id))
            self.places.append(np.array(places, np.int64).reshape(-1, 2))
            self.keys.append(np.array(keys, np.int64).reshape(-1, 2))
            progress("records", done, len(self.ids))
        for i in np.flatnonzero(~there).tolist():
            yield Problem(DB, f"record {self.ids[i]}", f"it is missing: change {seqs[i]} has put it there")


def _indexes(connection: sqlite3.Connection, seen: _Seen) -> Iterator[Problem]:
    should = np.concatenate(seen.places)
    there = Places.all(connection)
    for mark, id in _without(should, there):
        yield Problem(DB, f"record {id}", f"it cannot be found by its key or its content (mark {mark})")
    for mark, id in _without(there, should):
        yield Problem(DB, f"places, mark {mark}", f"it leads to record {id}, which is not there or another")
    refs = set(connection.execute("SELECT owner, referrer FROM refs"))
    ids = set(seen.ids.tolist()) if seen.refs else set[int]()
    for owner, referrer in sorted(refs ^ seen.refs):
        yield Problem(DB, f"record {referrer}", f"that it takes record {owner} to decode it is not noted, or noted and not so")
    for owner, referrer in sorted(seen.refs):
        if owner not in ids:
            yield Problem(DB, f"record {referrer}", f"it takes record {owner} to decode it, which is not there")


def _twice(
    connection: sqlite3.Connection, unpack: Callable[[Sequence[tuple[int, bytes]]], Iterable[Row]], keys: NDArray[np.int64]
) -> Iterator[Problem]:
    """Records with one key; two keys may have one mark, so they are compared themselves."""
    keys = keys[np.argsort(keys[:, 0], kind="stable")]
    for k in np.flatnonzero(keys[1:, 0] == keys[:-1, 0]).tolist():
        asked = "SELECT id, row FROM records WHERE id IN (?, ?) ORDER BY id"
        one, other = unpack(connection.execute(asked, (int(keys[k, 1]), int(keys[k + 1, 1]))).fetchall())
        if (one.tenant, one.key) == (other.tenant, other.key):
            yield Problem(DB, f"records {one.id} and {other.id}", f"they have the same key ({one.key!r})")


def _without(one: NDArray[np.int64], other: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Pairs of the one that are not in the other; both without pairs that come twice."""
    both = np.concatenate([one, other, other])  # what is in the one alone comes once
    order = np.lexsort((both[:, 1], both[:, 0]))
    both = both[order]
    starts = np.flatnonzero(np.append(True, (both[1:] != both[:-1]).any(axis=1))) if len(both) else np.zeros(0, np.int64)
    alone = starts[np.diff(np.append(starts, len(both))) == 1]
    return [(mark, id) for mark, id in both[alone].tolist()]


def _settings(connection: sqlite3.Connection) -> Iterator[Problem]:
    copies: list[dict[int, bytes]] = []
    for table in ("meta", "meta_copy"):
        copies.append(dict(connection.execute(f"SELECT id, entry FROM {table}").fetchall()))
        for id, blob in copies[-1].items():
            if unpack_meta(blob) is None:
                yield Problem(DB, f"{table}, entry {id}", "it does not match its checksum; its copy is used")
    if copies[0] != copies[1]:
        yield Problem(DB, "meta and meta_copy", "they are not the same")


def _few(kind: str, problems: Iterable[Problem]) -> list[Problem]:
    found: list[Problem] = []
    count = 0
    for problem in problems:
        count += 1
        if count <= _NAMED:
            found.append(problem)
    return found + ([Problem(DB, kind, f"and {count - _NAMED} more of this kind")] if count > _NAMED else [])
