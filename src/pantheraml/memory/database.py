"""store.db as a file that loses nothing: one process writes, many read, a commit is on the disk, and what is damaged is found and named.

SQLite's log (WAL) is copied into store.db by ourselves and never by SQLite, so that the checksums of its pages are known before.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from logging import getLogger
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from pantheraml.errors import StorageError
from pantheraml.memory import tables
from pantheraml.memory.connections import REPAIR, Handles, disk_errors, reading, sqlite_errors, take_lock, writing
from pantheraml.memory.examine import examine_files, read_tip
from pantheraml.memory.ledger import CHANGE, Head, Tip, What, pack_blocks, pack_change
from pantheraml.memory.pages import DB, HEAD, PAGE, WAL, Log, Problem, RawFile, page_place
from pantheraml.memory.swap import finish_swap
from pantheraml.memory.wal import Wal

Check = Literal["quick", "full"]
_SMALL_BYTES = 64 << 20
_log = getLogger(__name__)


class Database:
    """An open store.db. Safe to use from several threads; not over a fork.

    Attributes:
        folder: of the store. readonly: nothing can be written; also where damage was found. problems: that were found, so far.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first: Callable[[], Mapping[str, bytes]] = dict,
        readonly: bool = False,
        create: bool = True,
        wal_bytes: int = 64 << 20,
        cache_bytes: int = 64 << 20,
        check: Check | None = None,
        wait_s: float = 0.0,
        announce: Callable[[str], None] = _log.warning,
    ) -> None:
        """Opens a store, or makes one. Where it is damaged, that is announced, and it can only be read.

        Args:
            first: settings of a new store. wal_bytes: of SQLite's log before it is copied into store.db. cache_bytes: of SQLite.
            check: pages that are compared with their checksums first: one ("quick"), or all ("full", 1 s a GB); None: all up to 64 MiB.
            wait_s: for another writer. announce: hears of each problem.
        Raises: StorageError if there is no store, it cannot be opened at all, or another process writes.
        """
        self.folder = Path(folder)
        self.readonly = readonly
        self.problems: tuple[Problem, ...] = ()
        self._announce = announce
        self._wal_bytes = self._copy_at = wal_bytes
        self._cache_bytes = cache_bytes
        self._lock = threading.RLock()
        self._pool = threading.Lock()
        self._depth, self._owner, self._broken = 0, 0, False
        self._changes, self._note = bytearray(), ""
        self._process = os.getpid()
        self._head = Head(self.folder / HEAD)
        self._wal = Wal(self.folder / WAL)
        self._handles = Handles()
        self._closer = weakref.finalize(self, self._handles.close)
        try:
            with disk_errors(self.folder), sqlite_errors(self.folder):
                self._open(first, create, check, wait_s)
        except BaseException:
            self._closer()
            raise

    def _open(self, first: Callable[[], Mapping[str, bytes]], create: bool, check: Check | None, wait_s: float) -> None:
        handles, at_rest = self._handles, not self.readonly
        if not self.readonly:
            if create:
                self.folder.mkdir(parents=True, exist_ok=True)
            elif not self.folder.is_dir():
                raise tables.no_store(self.folder)
            handles.lock = take_lock(self.folder, wait_s)
            finish_swap(self.folder)
        if not (self.folder / DB).exists():
            tables.must_be_new(self.folder, create and not self.readonly)
            tables.create_store(self.folder, first())
        handles.raw = RawFile(self.folder / DB)
        head = self._head.read()
        full = check == "full" or (check is None and os.fstat(handles.raw.handle).st_size <= _SMALL_BYTES)
        self._sums, found = examine_files(self.folder, handles.raw, pages=None if full else 1, live=not at_rest)
        for problem in found:
            self._say(problem)
            if problem.where == page_place(1) and not problem.harmless:
                raise tables.cannot_be_opened(self.folder, str(problem))
        try:
            handles.guard = reading(self.folder, self._cache_bytes // 8)
            self._tip, wrong = read_tip(handles.guard, head)
            version = int(tables.read_meta(handles.guard)["version"])
        except (sqlite3.Error, KeyError) as error:
            if isinstance(error, sqlite3.OperationalError) and not self.problems:
                raise  # no permission, or another program's lock
            raise tables.cannot_be_opened(self.folder, str(self.problems[0] if self.problems else repr(error))) from error
        for problem in wrong:
            self._say(problem)
        if self.readonly:
            tables.must_be_current(version)
            handles.unlock()
            return
        handles.writer = writing(self.folder, self._cache_bytes)
        self._next_id = self._tip.next_id
        self._wal.advance()
        if self._wal.salts == self._sums.covered[:2] and self._sums.settled:
            self._wal.finished = self._wal.told = self._sums.covered[2]
        self._seen = self._wal.salts, set(self._wal.pages)
        self._settle()
        if version != tables.VERSION:
            with self.write() as connection:
                tables.migrate(connection, version, self.change(What.META, note=f"format {version} to {tables.VERSION}"))

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees what is committed; within `write`, that one."""
        self._check_open()
        own = self._depth > 0 and self._owner == threading.get_ident()
        connection = self._handles.writer if own else self._idle()
        assert connection is not None
        try:
            with sqlite_errors(self.folder):
                yield connection
        finally:
            if not own:
                with self._pool:
                    if self._closer.alive:
                        self._handles.idle.append(connection)
                    else:
                        connection.close()

    def data_version(self) -> int:
        """Another number once something was committed, by this process or another.

        Raises: StorageError if the store was repaired since it was opened.
        """
        self._check_open()
        raw, guard = self._handles.raw, self._handles.guard
        assert raw and guard
        if not raw.is_at(self.folder / DB):
            raise StorageError(
                f"{self.folder / DB} is another file now",
                why="the store was repaired since it was opened here",
                fix="close it, and open it again",
            )
        with self._pool, sqlite_errors(self.folder):
            return guard.execute("PRAGMA data_version").fetchone()[0]

    def settings(self) -> dict[str, bytes]:
        """All that `set` has set."""
        with self.read() as connection:
            return tables.read_meta(connection)

    @property
    def tip(self) -> Tip:
        """Where the ledger ends: number of the newest change, and its hash."""
        with self.read() as connection:
            tip, wrong = read_tip(connection)
        if wrong:
            raise StorageError(str(wrong[0]), why="without it, the order of changes is not known", fix=REPAIR)
        return tip

    def examine(self, progress: Callable[[int, int], None] = lambda done, of: None) -> list[Problem]:
        """Compares every page, every frame of the log and the side files with their checksums."""
        self._check_open()
        head = self._head.read()
        raw, live = self._handles.raw, self._handles.writer is None
        assert raw
        with nullcontext() if live else self._lock, disk_errors(self.folder):
            _, found = examine_files(self.folder, raw, pages=None, live=live, progress=progress)
        with self.read() as connection:
            return [*found, *read_tip(connection, head)[1]]

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction: on the disk when this ends, and nothing of it if it ends in an error. Others of this thread join it.

        Raises: ValueError if the store was opened for reading; StorageError if it is damaged, or the disk refuses.
        """
        self._check_open()
        with self._lock:
            writer = self._must_write()
            if self._depth:
                self._depth += 1
                try:
                    yield writer
                except BaseException:
                    self._broken = True
                    raise
                finally:
                    self._depth -= 1
                return
            with sqlite_errors(self.folder):
                writer.execute("BEGIN IMMEDIATE")
                self._depth, self._owner, self._broken = 1, threading.get_ident(), False
                before = writer.total_changes
                try:
                    yield writer
                    if self._broken:
                        raise ValueError("a part of this transaction has failed, so it cannot be committed")
                    wrote = self._commit(writer, before)
                except BaseException:
                    self._roll_back(writer)
                    raise
                finally:
                    self._depth = 0
                    self._changes.clear()
                    self._note = ""
            if wrote:
                self._after_commit()

    def change(self, what: What, id: int = 0, tenant: bytes = bytes(8), key: int = 0, content: bytes = bytes(16), note: str = "") -> int:
        """Adds a change to the ledger, within `write`. Returns: its number."""
        assert self._depth
        self._changes += pack_change(what, id, tenant, key, content)
        self._note += note
        return self._tip.seq + len(self._changes) // CHANGE.itemsize

    def reserve(self, count: int) -> range:
        """Numbers for so many records, never given out before, within `write`."""
        assert self._depth
        start = self._next_id
        if start + count > 1 << 32:
            raise StorageError(
                f"the store has given out {start - 1:,} numbers", why="a record's number has 32 bits", fix="make another store"
            )
        self._next_id = start + count
        return range(start, start + count)

    def set(self, settings: Mapping[str, bytes | None]) -> None:
        """Keeps settings, each twice, or takes them away (None). They are not sealed: put no secrets there."""
        with self.write() as connection:
            tables.write_meta(connection, settings, self.change(What.META))

    def checkpoint(self) -> bool:
        """Copies SQLite's log into store.db. Returns: whether all of it is there now; a reader may hold some of it back for a while."""
        self._check_open()
        with self._lock, disk_errors(self.folder), sqlite_errors(self.folder):
            if self._depth:
                raise ValueError("not within a transaction")
            self._must_write()
            return self._checkpoint()

    def vacuum(self) -> None:
        """Writes store.db anew, without the room that deleted records have left."""
        with self._lock:
            with self.write():
                self.change(What.COMPACT, note="vacuum")
            with sqlite_errors(self.folder):
                self._must_write().execute("VACUUM")
            self._after_commit()
            self.checkpoint()

    def close(self) -> None:
        """Ends it. Where this process writes, all of the log is in store.db then, unless a reader elsewhere holds it."""
        with self._lock:
            if not self._closer.alive:
                return
            copied = False
            try:
                if self._handles.writer and not self.readonly and os.getpid() == self._process:
                    with self.write():
                        pass  # what was put off
                    copied = not self.readonly and self.checkpoint()
                    if copied:
                        self._sums.tidy(1.2)
            finally:
                self._closer.detach()
                with self._pool:
                    self._handles.close(copied=copied)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _before_commit(self, connection: sqlite3.Connection) -> None:
        """What was put off until something is written."""

    def _forget(self, connection: sqlite3.Connection) -> None:
        """What is remembered of the tables may have been rolled back."""

    def _commit(self, writer: sqlite3.Connection, before: int) -> bool:
        self._before_commit(writer)
        if writer.total_changes == before and not self._changes:
            writer.execute("ROLLBACK")
            return False
        if not self._changes:
            self.change(What.META)  # each commit is in the ledger, so that none is lost unnoticed
        blocks, tip = pack_blocks(self._tip, time.time_ns() // 1000, self._next_id, bytes(self._changes), self._note)
        writer.executemany("INSERT INTO ledger VALUES(?, ?)", blocks)
        writer.execute("COMMIT")
        self._tip = tip
        return True

    def _roll_back(self, writer: sqlite3.Connection) -> None:
        with suppress(sqlite3.Error):
            if writer.in_transaction:
                writer.execute("ROLLBACK")
        # An interrupt may have come just after the commit, so the truth is asked for.
        try:
            self._tip, wrong = read_tip(writer)
            self._next_id = self._tip.next_id
            self._forget(writer)
        except sqlite3.Error as error:
            wrong = [Problem(DB, "after a transaction that failed", str(error))]
        for problem in wrong:
            self._say(problem)

    def _after_commit(self) -> None:
        """The commit stands, whatever happens here: what goes wrong is announced, and the next write refused."""
        try:
            self._head.write(self._tip)
            if not self._follow():
                self._say(Problem(WAL, "its end", "the last commit is not in it"))
            if not self.readonly and self._wal.waiting_bytes > self._copy_at:
                self._checkpoint()
        except (OSError, sqlite3.Error) as error:
            self._say(Problem(DB, "after a commit", f"{error}; the commit itself stands"))

    def _follow(self) -> bool:
        """Reads what was committed, and looks whether the pages that were changed had been sound."""
        new, raw = set(self._wal.advance()), self._handles.raw
        assert raw
        seen = self._seen[1] if self._seen[0] == self._wal.salts else set[int]()
        for page in sorted(new - seen):
            image = os.pread(raw.handle, PAGE, (page - 1) * PAGE)
            if len(image) == PAGE and not self._sums.accepts(page, image):
                self._say(Problem(DB, f"page {page}", "it did not match its checksum when it was changed"))
        self._seen = self._wal.salts, seen | new
        return bool(new)

    def _checkpoint(self) -> bool:
        wal, writer = self._wal, self._handles.writer
        assert writer
        if wal.frames == wal.finished:
            return True
        log = Log(wal.salts, wal.frames, wal.size)
        self._sums.add(wal.pages[wal.told :], wal.sums[wal.told :], log)
        wal.told = wal.frames
        busy, there, copied = writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy and there != copied:
            self._copy_at = wal.waiting_bytes + self._wal_bytes // 4
            return False
        self._sums.promote(log)
        self._sums.tidy()
        wal.finished, self._copy_at = wal.frames, self._wal_bytes
        return True

    def _settle(self) -> None:
        """Ends a checkpoint during which the process was killed."""
        if self._sums.log and self._wal.frames:
            self._checkpoint()
        elif self._sums.log:  # SQLite had finished, and cut its log
            self._sums.promote(self._sums.log)

    def _say(self, problem: Problem) -> None:
        self.problems = (*self.problems, problem)
        self._announce(f"{problem}" if problem.harmless else f"{problem}; nothing is written any more: {REPAIR}")
        self.readonly = self.readonly or not problem.harmless

    def _must_write(self) -> sqlite3.Connection:
        writer = self._handles.writer
        if writer and not self.readonly:
            return writer
        harmful = [each for each in self.problems if not each.harmless]
        if not harmful:
            raise ValueError("the store was opened for reading")
        raise StorageError(
            f"{self.folder} is damaged, and open for reading only: {harmful[0]}",
            why="writing into a damaged file can destroy what is still sound",
            fix=REPAIR,
        )

    def _check_open(self) -> None:
        if os.getpid() != self._process or not self._closer.alive:
            raise ValueError("the store is closed, or was opened before a fork: open it again")

    def _idle(self) -> sqlite3.Connection:
        with self._pool:
            if self._handles.idle:
                return self._handles.idle.pop()
        with sqlite_errors(self.folder):
            return reading(self.folder, self._cache_bytes // 8)
