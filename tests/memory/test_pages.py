"""Checksums of pages and frames, and that there is a moment at which a kill makes them wrong: there is none."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests.memory.stores import PRELUDE, ROOT, memory_folder, row, run, start

from pantheraml.errors import StorageError
from pantheraml.memory.pages import (
    DB,
    HEAD,
    PAGE,
    SUMS,
    WAL,
    Log,
    RawFile,
    Sums,
    check_pages,
    file_sums,
    page_sum,
    read_sums,
    write_sums,
)
from pantheraml.memory.wal import FRAME, HEADER, Wal, committed, examine, read_frames, read_header
from pantheraml.memory.warm import Warm

__all__ = ["memory_folder"]


def flip(path: Path, at: int, by: int = 0x10) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ by]))


def logged(folder: Path, transactions: int = 12) -> tuple[sqlite3.Connection, Path]:
    """A database with a log that was not copied."""
    connection = sqlite3.connect(folder / "x.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA wal_autocheckpoint=0")
    connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, b BLOB)")
    rng = random.Random(0)
    for _ in range(transactions):
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO t(b) VALUES(?)", [(rng.randbytes(200),)] * 40)
        connection.execute("COMMIT")
    return connection, folder / "x.db-wal"


# SQLite's log


def by_the_book(data: bytes) -> list[tuple[int, int]]:
    """Running checksums of a log, by the loop in the format's description: after the header and after each frame."""

    def more(state: tuple[int, int], part: bytes) -> tuple[int, int]:
        a, b = state
        for x, y in struct.iter_unpack("<II", part):
            a = (a + x + b) & 0xFFFFFFFF
            b = (b + y + a) & 0xFFFFFFFF
        return a, b

    found = [more((0, 0), data[:24])]
    for at in range(HEADER, len(data) - FRAME + 1, FRAME):
        found.append(more(more(found[-1], data[at : at + 8]), data[at + 24 : at + FRAME]))
    return found


def test_checksums_of_the_log_are_those_of_the_format(tmp_path):
    connection, log = logged(tmp_path)
    data = log.read_bytes()
    expected = by_the_book(data)
    header = read_header(data)
    assert header and header.sound and header.computed == expected[0]
    frames = read_frames(log, header)
    assert frames.computed.tolist() == [list(each) for each in expected[1:]] and frames.holds.all() and frames.salted.all()
    (_, there, _) = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    assert committed(frames) == there == len(frames)
    connection.close()


def test_following_the_log_gives_each_committed_page_once(tmp_path):
    connection, log = logged(tmp_path, 1)
    wal = Wal(log)
    assert wal.advance() and wal.advance() == []
    for _ in range(5):
        connection.execute("INSERT INTO t(b) VALUES(zeroblob(9000))")
        assert len(wal.advance()) >= 3
    data = log.read_bytes()
    assert len(wal.pages) == wal.frames == (len(data) - HEADER) // FRAME
    for i in (0, wal.frames - 1):
        start = HEADER + i * FRAME
        assert wal.pages[i] == int.from_bytes(data[start : start + 4], "big")
        assert wal.sums[i] == page_sum(wal.pages[i], data[start + 24 : start + FRAME])
    assert wal.size == connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute("BEGIN")
    connection.execute("INSERT INTO t(b) VALUES(zeroblob(9000))")
    assert wal.advance() == []  # not committed
    connection.execute("COMMIT")
    assert wal.advance()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert wal.advance() == [] and wal.frames == 0
    connection.execute("INSERT INTO t(b) VALUES(1)")
    assert wal.advance() and 0 < wal.frames < 5  # a log begun anew
    connection.close()


def test_a_call_that_was_interrupted_is_made_up_for(tmp_path):
    connection, log = logged(tmp_path)
    wal = Wal(log)
    wal.advance()
    frames = wal.frames
    connection.execute("INSERT INTO t(b) VALUES(1)")
    wal.sums.append(7)  # as far as an interrupt let it come
    assert wal.advance() and len(wal.pages) == len(wal.sums) == wal.frames > frames and 7 not in wal.sums
    connection.close()


def test_a_damaged_frame_is_named_and_what_it_would_cost(tmp_path):
    connection, log = logged(tmp_path)
    data = log.read_bytes()
    frames = (len(data) - HEADER) // FRAME
    header = read_header(data)
    assert header and examine(log)[1:] == (frames, [])
    offsets = {"page": 100, "number": 3, "salt": 9, "checksum": 17}
    for k in (0, 5, frames - 2):
        for what, offset in offsets.items():
            log.write_bytes(data)
            flip(log, HEADER + k * FRAME + offset)
            _, taken, found = examine(log)
            assert taken <= k and [each.where.split(" (")[0] for each in found] == [f"frame {k + 1}"], (k, what)
            assert "SQLite drops all from here on" in found[0].what and found[0].harmless
            assert not examine(log, (*header.salts, frames))[2][0].harmless
    for at in range(HEADER):
        log.write_bytes(data)
        flip(log, at)
        _, _, found = examine(log)
        assert found and found[0].where.startswith("header"), at
    connection.close()


def test_frames_of_an_older_log_and_a_torn_end_are_no_damage(tmp_path):
    connection, log = logged(tmp_path)
    reader = sqlite3.connect(tmp_path / "x.db")
    connection.execute("PRAGMA wal_checkpoint(FULL)").fetchone()
    connection.execute("INSERT INTO t(b) VALUES(1)")  # from the start of the file again, before what is there
    _, taken, found = examine(log)
    assert found == [] and taken == 1 and log.stat().st_size > HEADER + 20 * FRAME
    flip(log, HEADER + 5 * FRAME + 100)
    assert examine(log)[2] == []  # nothing that counts
    data = log.read_bytes()
    for cut in (0, 10, 31, HEADER, HEADER + 3, HEADER + FRAME - 1):
        log.write_bytes(data[:cut])
        assert examine(log)[1:] == (0, [])
    reader.close()
    connection.close()


def test_what_a_checkpoint_has_begun_with_must_be_there(tmp_path):
    connection, log = logged(tmp_path)
    frames, taken, _ = examine(log)
    assert frames is not None
    salts = read_header(log.read_bytes()).salts  # type: ignore[union-attr]
    flip(log, HEADER + (taken - 1) * FRAME + 50)
    assert [each.harmless for each in examine(log)[2]] == [True]  # may never have been finished
    assert [each.where.split(" (")[0] for each in examine(log, (*salts, taken))[2]] == [f"frame {taken}"]
    assert [each.harmless for each in examine(log, (salts[0], salts[1] ^ 1, taken))[2]] == [True]  # of another log
    log.write_bytes(log.read_bytes()[: HEADER + 4 * FRAME])
    assert "are missing" in examine(log, (*salts, taken))[2][0].what
    connection.close()


# store.sums


def some_pages(count: int) -> list[bytes]:
    return [random.Random(i).randbytes(PAGE) for i in range(count)]


def test_sums_know_a_page_and_its_place():
    a, b = some_pages(2)
    assert page_sum(1, a) == page_sum(1, a) != page_sum(2, a) != page_sum(2, b)
    for i in (0, 1, 2047, 4095):
        assert page_sum(1, a[:i] + bytes([a[i] ^ 1]) + a[i + 1 :]) != page_sum(1, a)


def test_a_page_is_old_or_new_until_the_checkpoint_is_done(tmp_path):
    old, new, newer, other = some_pages(4)
    write_sums(tmp_path / SUMS, np.array([page_sum(1, old), page_sum(2, old), 0], np.uint64))
    sums = read_sums(tmp_path / SUMS)
    assert sums.settled and sums.accepts(3, bytes(PAGE)) and not sums.accepts(1, bytes(PAGE))

    sums.add([2, 4, 2], [page_sum(2, new), page_sum(4, new), page_sum(2, newer)], Log((1, 2), 3, 4))
    for each in (sums, read_sums(tmp_path / SUMS)):
        assert not each.settled and each.sizes() == (3, 4) and each.covered == (1, 2, 3)
        assert all(each.accepts(2, image) for image in (old, new, newer)) and not each.accepts(2, other)
        assert each.accepts(4, new) and not each.accepts(1, new)

    sums.promote(Log((1, 2), 3, 4))
    for each in (sums, read_sums(tmp_path / SUMS)):
        assert each.settled and each.sizes() == (4, 4)
        assert each.accepts(2, newer) and not each.accepts(2, old) and not each.accepts(2, new) and each.accepts(1, old)


def test_a_log_begun_anew_means_that_the_last_checkpoint_was_done(tmp_path):
    old, new, newer, _ = some_pages(4)
    write_sums(tmp_path / SUMS, np.array([page_sum(i, old) for i in range(1, 5)], np.uint64))
    sums = read_sums(tmp_path / SUMS)
    sums.add([1], [page_sum(1, new)], Log((1, 2), 1, 2))  # two pages were cut off
    assert sums.accepts(4, old) and sums.accepts(4, bytes(PAGE))
    sums.add([2], [page_sum(2, newer)], Log((5, 6), 1, 4))  # and came back, one of them never written
    for each in (sums, read_sums(tmp_path / SUMS)):
        assert not each.accepts(1, old) and each.accepts(1, new) and each.accepts(2, old) and each.accepts(2, newer)
        assert each.accepts(4, bytes(PAGE)) and not each.accepts(4, old)


def test_killed_at_any_byte_of_an_append_the_sums_are_those_before_or_after(tmp_path):
    old, new, _, _ = some_pages(4)
    path = tmp_path / SUMS
    write_sums(path, np.array([page_sum(1, old)], np.uint64))
    sums = read_sums(path)
    sizes = [sums.end]
    for step in (lambda: sums.add([1], [page_sum(1, new)], Log((1, 2), 1, 1)), lambda: sums.promote(Log((1, 2), 1, 1))):
        step()
        sizes.append(sums.end)
    data = path.read_bytes()
    for length in range(sizes[0], len(data)):
        path.write_bytes(data[:length])
        torn = read_sums(path)
        assert torn.problems == [] and torn.end == (sizes[0] if length < sizes[1] else sizes[1])
        assert (torn.accepts(1, old), torn.accepts(1, new)) == ((True, False) if length < sizes[1] else (True, True))
        torn.add([1], [page_sum(1, new)], Log((1, 2), 1, 1))  # goes on behind what counts
        assert read_sums(path).problems == [] and read_sums(path).accepts(1, new)
    path.write_bytes(data[: sizes[0]] + bytes(500))  # room that a loss of power left empty
    assert read_sums(path).problems == [] and read_sums(path).end == sizes[0]


def test_each_flipped_byte_of_the_sums_is_named(tmp_path):
    path = tmp_path / SUMS
    pages_ = some_pages(6)
    write_sums(path, np.array([page_sum(i, image) for i, image in enumerate(pages_, 1)], np.uint64))
    sums = read_sums(path)
    for i in range(3):
        sums.add([i + 1], [page_sum(i + 1, pages_[i])], Log((1, 2), i + 1, 6))
        sums.promote(Log((1, 2), i + 1, 6))
    sums.add([1, 2], [1, 2], Log((3, 4), 1, 6))
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data)
        flip(path, at)
        (problem, *_) = read_sums(path).problems
        first, _, last = problem.where.removeprefix("bytes ").partition(" to ")
        assert problem.file == SUMS and int(first) <= at <= int(last), (at, problem)
    path.unlink()
    assert read_sums(path).problems[0].what == "it is not there"
    path.write_bytes(data[:50])
    assert read_sums(path).problems[0].what == "it ends before it says anything"


def test_the_file_of_sums_does_not_grow_without_end(memory_folder):
    path, image = memory_folder / SUMS, some_pages(1)[0]
    write_sums(path, np.full(100, page_sum(1, image), np.uint64))
    sums = read_sums(path)
    for i in range(3000):
        sums.add([1], [page_sum(1, image)], Log((i, 2), 1, 100))
        sums.promote(Log((i, 2), 1, 100))
        sums.tidy()
    assert path.stat().st_size < 3 * 800 + (1 << 16) + 200
    assert read_sums(path).base.tolist() == sums.base.tolist() and read_sums(path).covered == (2999, 2, 1)
    assert [each.name for each in memory_folder.iterdir()] == [SUMS]


def test_pages_that_do_not_match_are_named(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"".join(some_pages(600)))
    sums = Sums(tmp_path / SUMS, base=file_sums(path))

    def found(live: bool = False, in_log: frozenset[int] = frozenset()) -> list[str]:
        handle = os.open(path, os.O_RDONLY)
        try:
            return [f"{each} {each.harmless}" for each in check_pages(handle, lambda: sums, lambda: in_log, live=live)]
        finally:
            os.close(handle)

    assert found() == []
    flip(path, 599 * PAGE + 5)
    flip(path, 0)
    assert [each.split(": ")[0] for each in found()] == [
        "store.db, page 1 (bytes 0 to 4095)",
        "store.db, page 600 (bytes 2453504 to 2457599)",
    ]
    assert [each.split()[-1] for each in found(in_log=frozenset({1}))] == ["False", "False"]
    sums.add([1], [1], Log((1, 2), 1, 600))
    assert [each.split()[-1] for each in found(in_log=frozenset({1}))] == ["True", "False"]
    with path.open("ab") as file:
        file.write(b"?")
    sums.promote(Log((1, 2), 1, 600))
    assert "should have 600" in found()[0]


# The store


def test_closing_one_of_two_raw_files_lets_go_of_no_lock(tmp_path):
    (tmp_path / "f").write_bytes(bytes(PAGE))
    one, other = RawFile(tmp_path / "f"), RawFile(tmp_path / "f")
    assert one.handle == other.handle
    one.close()
    one.close()
    assert os.pread(other.handle, 1, 0) == b"\0" and other.is_at(tmp_path / "f")
    (tmp_path / "g").write_bytes(b"")
    (tmp_path / "g").replace(tmp_path / "f")
    assert not other.is_at(tmp_path / "f")
    other.close()
    with pytest.raises(OSError):
        os.fstat(other.handle)


def test_readers_in_the_process_that_writes_do_not_let_go_of_its_locks(memory_folder):
    """POSIX: closing any descriptor of a file drops the process's locks on it. SQLite's would be gone, and others could cut its log."""
    with Warm(memory_folder / "s") as store:
        store.insert([row(1)])
        for _ in range(3):
            with Warm(memory_folder / "s", readonly=True) as reader:
                assert reader.count() == 1 and reader.verify() == []
        code = """
import sqlite3
connection = sqlite3.connect(folder / "store.db")
connection.execute("SELECT count(*) FROM records").fetchone()
connection.close()  # would copy and remove the log if it thought itself alone
print((folder / "store.db-wal").stat().st_size)
"""
        assert int(run(code, memory_folder / "s").stdout) > 0
        store.insert([row(2)])
        assert store.verify() == []


@pytest.mark.parametrize("how", ["exit", "del", "kill", "raise"])
def test_a_store_that_is_not_closed_leaves_its_log(memory_folder, how):
    ends = {"exit": "", "del": "del store", "kill": "os.kill(os.getpid(), signal.SIGKILL)", "raise": "raise SystemExit(3)"}
    run(f"store = Warm(folder)\nstore.insert([row(i) for i in range(1, 50)])\n{ends[how]}", memory_folder / "s")
    assert (memory_folder / "s" / WAL).stat().st_size > 0 and (memory_folder / "s" / DB).stat().st_size == 10 * PAGE
    with Warm(memory_folder / "s", readonly=True) as store:
        assert store.verify() == [] and store.problems == () and store.count() == 49
    with Warm(memory_folder / "s") as store:
        assert store.verify() == [] and store.problems == () and store.count() == 49
    assert sorted(each.name for each in (memory_folder / "s").iterdir()) == ["lock", DB, HEAD, SUMS]


STOP_AT = """
from pantheraml.memory import database, pages, tables
step, count = sys.argv[2], int(sys.argv[3])
seen = 0
def die(*_, **__):
    global seen
    seen += 1
    if seen == count:
        os.kill(os.getpid(), signal.SIGKILL)
def before(owner, name):
    real = getattr(owner, name)
    def told(*args, **how):
        die()
        return real(*args, **how)
    setattr(owner, name, told)
def after(owner, name):
    real = getattr(owner, name)
    def told(*args, **how):
        found = real(*args, **how)
        die()
        return found
    setattr(owner, name, told)
if step == "before pending": before(pages.Sums, "add")
if step == "after pending": after(pages.Sums, "add")
if step == "before promoted": before(pages.Sums, "promote")
if step == "after promoted": after(pages.Sums, "promote")
if step == "before head": before(database.Head, "write")
if step == "after head": after(database.Head, "write")
if step == "before sums anew": before(pages, "write_sums")
if step == "after sums anew": after(pages, "write_sums")
if step == "in creation": before(tables, "write_sums")
if step == "at the end of creation": before(pages.Path, "rename")
store = Warm(folder, wal_bytes=40_000)
for i in range(1, 400):
    store.insert([row(4 * i + j) for j in range(4)])
    print(i, flush=True)
    if i % 3 == 0: store.delete([4 * i - 7])
    if i % 50 == 0: store.vacuum()
"""


@pytest.mark.parametrize(
    ("step", "count"),
    [
        *((step, count) for step in ("before pending", "after pending", "before promoted", "after promoted") for count in (1, 5)),
        ("before head", 20), ("after head", 21), ("before sums anew", 1), ("after sums anew", 1),
        ("in creation", 1), ("at the end of creation", 1),
    ],
)  # fmt: skip
def test_killed_between_the_steps_of_a_checkpoint(memory_folder, step, count):
    done = run(STOP_AT, memory_folder / "s", step, count)
    assert done.returncode == -signal.SIGKILL, done.stderr
    acknowledged = [4 * int(i) + j for i in done.stdout.split() for j in range(4)]
    for readonly in (True, False) if (memory_folder / "s" / DB).exists() else (False,):
        with Warm(memory_folder / "s", readonly=readonly) as store:
            assert store.problems == () and store.verify() == []
            there = {each.key for each in store.scan()}
            deleted = {4 * int(i) - 7 for i in done.stdout.split() if int(i) % 3 == 0}
            keys = {f"k{n}" for n in acknowledged}
            assert len(keys - there) <= len(deleted) + 1  # the last deletion may have been done and not told of
    with Warm(memory_folder / "s") as store:
        store.insert([row(10**6)])


def test_a_reader_that_stays_holds_back_the_log_and_harms_nothing(memory_folder):
    folder = memory_folder / "s"
    with Warm(folder, wal_bytes=500_000) as store:
        store.insert([row(1)])
        held = sqlite3.connect(f"{(folder / DB).as_uri()}?mode=ro", uri=True, isolation_level=None)
        held.execute("BEGIN")
        assert held.execute("SELECT count(*) FROM records").fetchone() == (1,)
        for i in range(60):
            store.insert([row(100 * i + j + 2) for j in range(20)])
        assert not store.checkpoint() and store.verify() == []
        log = (folder / WAL).stat().st_size
        assert log > 1_000_000
        assert held.execute("SELECT count(*) FROM records").fetchone() == (1,)
        held.execute("COMMIT")
        assert store.checkpoint() and (folder / WAL).stat().st_size == 0
        held.close()
        store.insert([row(10**6)])
        assert store.verify() == [] and store.count() == 1202


def test_damage_met_while_writing_is_not_covered_up(memory_folder):
    """A page that was damaged is read by SQLite, changed, and would be given a new checksum."""
    folder, said = memory_folder / "s", []
    with Warm(folder) as store:
        store.insert([row(i) for i in range(1, 30)])
    data = (folder / DB).read_bytes()
    at = data.index(row(3).container or b"")
    flip(folder / DB, at + 10)
    with Warm(folder, announce=lambda said: None) as store:
        assert store.readonly  # a small store is looked at whole
    store = Warm(folder, check="quick", announce=said.append)
    assert store.problems == ()
    with pytest.raises(StorageError, match="record number 3 is damaged"):
        store.rows([3])
    assert store.rows([2, 4]).keys() == {2, 4}
    store.delete([4])  # on the same page
    assert "did not match its checksum when it was changed" in said[0]
    with pytest.raises(StorageError, match="damaged, and open for reading only"):
        store.insert([row(99)])
    assert [each.file for each in store.verify()].count(DB) >= 1
    store.close()
    assert (folder / WAL).stat().st_size > 0  # nothing was copied over it
    with Warm(folder, check="full", announce=said.append) as store:
        assert store.readonly and str(at // PAGE + 1) in str(store.problems[0])
    assert "pantheraml memory repair" in said[-1]


def test_a_page_torn_while_it_was_copied_does_not_stop_the_store(memory_folder):
    """What a loss of power can leave: the log still has the page, and the next checkpoint writes it anew."""
    folder, said = memory_folder / "s", []
    assert run(STOP_AT, folder, "after pending", 1).returncode == -signal.SIGKILL
    page = max(page for entries in read_sums(folder / SUMS).held for page, _ in entries.tolist() if page <= 10)
    flip(folder / DB, page * PAGE - 9)
    with Warm(folder, readonly=True) as store:
        (problem,) = store.verify()
        assert problem.harmless and f"page {page} " in str(problem)
    with Warm(folder, check="full", announce=said.append) as store:
        assert "it was being copied there from the log" in said[0] and not store.readonly
        store.insert([row(10**6)])
        store.checkpoint()
        assert store.verify() == []


def test_nobody_else_copies_the_log(memory_folder):
    """SQLite would copy and remove it when the last connection is closed, and no sums would be known."""
    folder = memory_folder / "s"
    store = Warm(folder)
    store.insert([row(1)])
    store._closer()
    assert (folder / WAL).stat().st_size > 0 and read_sums(folder / SUMS).base.size * PAGE == (folder / DB).stat().st_size
    with Warm(folder) as store:
        assert store.count() == 1 and store.verify() == []


def test_vacuum_gives_room_back(memory_folder):
    folder = memory_folder / "s"
    with Warm(folder) as store:
        ids = store.insert([row(i, 2000) for i in range(500)])
        store.checkpoint()
        large = (folder / DB).stat().st_size
        store.delete(ids[:450])
        store.vacuum()
        assert (folder / DB).stat().st_size < large / 4 and (folder / WAL).stat().st_size == 0
        assert store.verify() == [] and store.count() == 50
        store.insert([row(i, 2000) for i in range(1000, 1400)])
    with Warm(folder, check="full") as store:
        assert store.problems == () and store.verify() == [] and store.count() == 450


def test_verify_beside_a_process_that_writes(memory_folder):
    folder = memory_folder / "s"
    code = """
store = Warm(folder, wal_bytes=60_000)
for i in range(10**6):
    store.insert([row(10 * i + j) for j in range(10)])
    if i % 7 == 0: store.delete(store.insert([row(-i - 1, 9000)]))
    if i == 20: print("ready", flush=True)
"""
    with start(code, folder) as writer:
        assert writer.stdout and writer.stdout.readline() == "ready\n"
        end = time.monotonic() + 3
        looked = 0
        while time.monotonic() < end or looked < 3:
            with Warm(folder, readonly=True, check="full") as store:
                assert store.problems == () and store.verify() == []
            looked += 1
        assert writer.poll() is None
    with Warm(folder) as store:
        assert store.verify() == []


def test_a_commit_waits_for_the_disk(memory_folder):
    """The head, which is written as soon as a commit is done, comes when the last that was written to the log is on the disk."""
    with Warm(memory_folder / "s") as store:
        writer = store._handles.writer
        assert writer
        said = [writer.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode", "wal_autocheckpoint")]
        assert said == [2, b"wal", 0]
    strace, trace = shutil.which("strace"), memory_folder / "trace"
    if not strace:
        pytest.skip("no strace: what SQLite does was not watched")
    code = "store = Warm(folder)\nfor i in range(5): store.insert([row(i)])\nos.kill(os.getpid(), signal.SIGKILL)"
    watch = [strace, "-f", "-y", "-e", "trace=pwrite64,fsync,fdatasync", "-o", str(trace)]
    subprocess.run([*watch, sys.executable, "-c", PRELUDE + code, str(memory_folder / "t")], cwd=ROOT, check=False)
    calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
    calls = [call for call in calls if f"{WAL}>" in call or f"{HEAD}>" in call]
    heads = [i for i, call in enumerate(calls) if call.startswith("pwrite64") and f"{HEAD}>" in call][1:]  # the first is of its making
    assert len(heads) == 5
    for i in heads:
        assert calls[i - 1].startswith(("fdatasync", "fsync")) and f"{WAL}>" in calls[i - 1] and calls[i - 2].startswith("pwrite64")
