"""Connections to store.db: how they are made, in which order they are closed, and what their errors mean to a person."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pantheraml.errors import StorageError
from pantheraml.memory.pages import DB, LOCK, WAL, RawFile

REPAIR = "`pantheraml memory repair` saves what is sound; a copy of the folder beforehand does no harm"


class Handles:
    """What is open of a store, and the order in which it is closed; also when the program ends without closing it.

    The last connection that may write copies the log into store.db when it is closed, whose checksums nobody would know. So a connection
    of a reader, the guard, is closed after it, except where all of the log was copied before.
    """

    def __init__(self) -> None:
        self.lock: FileLock | None = None
        self.raw: RawFile | None = None
        self.guard: sqlite3.Connection | None = None
        self.writer: sqlite3.Connection | None = None
        self.idle: list[sqlite3.Connection] = []
        self._process = os.getpid()

    def close(self, *, copied: bool = False) -> None:
        """copied: all of the log is in store.db, and the last connection may remove it."""
        if os.getpid() != self._process:  # a fork: they are its parent's
            return
        last = [self.guard, self.writer] if copied else [self.writer, self.guard]
        for connection in [*self.idle, *last]:
            if connection is not None:
                with suppress(sqlite3.Error):
                    connection.close()
        self.idle, self.guard, self.writer = [], None, None
        if self.raw:
            self.raw.close()
        self.unlock()

    def unlock(self) -> None:
        """Another process may write."""
        if self.lock:
            self.lock.release()
            self.lock = None


def take_lock(folder: Path, wait_s: float) -> FileLock:
    """Raises: StorageError if another process writes for longer than that."""
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=wait_s)
    except Timeout as error:
        raise StorageError(
            f"{folder} is being written by another process",
            why="one process writes at a time, and any number may read",
            fix="open it for reading (readonly), or wait until the other one has closed it",
        ) from error
    return lock


def reading(folder: Path, cache_bytes: int) -> sqlite3.Connection:
    """A connection that can change nothing, not even copy the log."""
    uri = (folder / DB).absolute().as_uri()
    try:
        return _connect(f"{uri}?mode=ro", cache_bytes)
    except sqlite3.OperationalError:
        # Of a folder that may not be written, and of a store that was closed: no one can change it.
        if os.access(folder, os.W_OK) or (folder / WAL).exists():
            raise
        return _connect(f"{uri}?immutable=1", cache_bytes)


def writing(folder: Path, cache_bytes: int) -> sqlite3.Connection:
    """The connection that writes: its commits wait for the disk, and it never copies the log by itself."""
    connection = _connect(f"{(folder / DB).absolute().as_uri()}?mode=rw", cache_bytes)
    for setting in ("synchronous=FULL", "wal_autocheckpoint=0", "secure_delete=ON", "busy_timeout=100"):
        connection.execute(f"PRAGMA {setting}").fetchall()
    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    if mode != b"wal":
        raise StorageError(
            f"{folder / DB} cannot be used with a write-ahead log", why=f"its journal is {mode!r}", fix="put it on a local disk"
        )
    return connection


def _connect(uri: str, cache_bytes: int) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=5)
    connection.text_factory = bytes  # there is no text of ours; damaged bytes that claim to be some are no error here, and do not hold
    try:
        for setting in (f"cache_size=-{cache_bytes // 1024}", "cell_size_check=ON", "trusted_schema=OFF"):
            connection.execute(f"PRAGMA {setting}")
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


@contextmanager
def sqlite_errors(folder: Path) -> Iterator[None]:
    """Turns what SQLite says into what a person can act on."""
    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.IntegrityError) as error:
        raise ValueError(f"the store is closed, or was asked for something wrong: {error}") from error
    except sqlite3.Error as error:
        said = str(error)
        if "full" in said:
            why, fix = "what was committed before stands, and nothing of this was", "free space and try again"
        elif "locked" in said or "readonly" in said:
            why, fix = "another program holds it, or you may not write there", "close that program; correct the permissions of the folder"
        elif "disk I/O" in said:
            why, fix = (
                "the disk did not read or write",
                "see what the system says of the disk; then `pantheraml memory verify` names what it lost",
            )
        else:
            why, fix = "SQLite cannot make sense of it: a page may be damaged", f"`pantheraml memory verify` names it; {REPAIR}"
        raise StorageError(f"{folder / DB}: {said}", why=why, fix=fix) from error


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """The same for what the disk says."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or folder}: {error.strerror or error}",
            why="the folder or the disk refuses",
            fix="free space, correct the permissions, or choose another folder",
        ) from error
