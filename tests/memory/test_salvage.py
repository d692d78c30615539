"""A flipped byte anywhere is found and named, and after a repair it has cost at most the row that it is in."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.memory.stores import FILL_AND_DIE, build, copy, fill, memory_folder, row, run, same

from pantheraml.errors import StorageError
from pantheraml.memory.examine import examine_files
from pantheraml.memory.ledger import What
from pantheraml.memory.pages import DB, HEAD, PAGE, QUARANTINE, SHM, SUMS, WAL, RawFile
from pantheraml.memory.records import Records
from pantheraml.memory.repair import Repaired, repair
from pantheraml.memory.rows import Row
from pantheraml.memory.salvage import Wreck, _blob, _cells
from pantheraml.memory.seal import Keys
from pantheraml.memory.swap import MARKER
from pantheraml.memory.wal import FRAME, HEADER
from pantheraml.memory.warm import Warm

__all__ = ["memory_folder"]
KEYS = Keys(bytes(range(32)))
STATES = ("closed", "killed")


def quietly(folder: Path, **how: object) -> Repaired:
    return repair(folder, announce=lambda said: None, **how)  # type: ignore[arg-type]


def make(folder: Path, state: str) -> dict[int, Row]:
    """A store of a few pages, closed or left by a kill, and what is in it."""
    if state == "closed":
        build(folder)
    else:
        assert run(FILL_AND_DIE, folder).returncode == -signal.SIGKILL
    with Records(copy(folder, folder.with_name("look")), readonly=True) as store:
        assert store.verify() == []
        return {each.id: each for each in store.scan()}


def flip(path: Path, at: int, by: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ by]))


def files(folder: Path) -> list[Path]:
    return [folder / name for name in (DB, WAL, SUMS, HEAD) if (folder / name).exists()]


def check(folder: Path, before: dict[int, Row], repaired: Repaired, keys: Keys | None = None) -> set[int]:
    """After a repair: all is sound and as it was but for what was lost, which is named, and the store goes on. Returns: what was lost."""
    with Warm(folder, keys=keys, check="full") as store:
        assert store.problems == () and store.verify() == []
        with store.read() as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [(b"ok",)]
        after = {each.id: each for each in store.scan()}
        assert set(after) <= set(before), "deleted records came back"
        assert all(same(after[id], before[id]) for id in after)
        lost = set(before) - set(after)
        assert repaired.kept == len(after) and lost <= {each.id for each in repaired.lost}
        # Where the entry that says so is lost, what was deleted before is missing as well.
        assert all("a change that is lost has deleted it" in each.why for each in repaired.lost if each.id not in lost)
        told = [each for each in store.changes() if each.what == What.REPAIR]
        assert len(told) == 1 and f"{len(repaired.lost)} records lost" in told[0].note
        assert {each.id for each in store.changes() if each.what == What.LOST} == {each.id for each in repaired.lost}
        for each in list(after.values())[:3]:
            assert store.find(each.tenant, each.key) == each.id
        new = store.insert([row(10**6)])
        assert new[0] > max(before) and store.verify() == []
    assert repaired.quarantine and repaired.quarantine.parent == folder / QUARANTINE
    return lost


@pytest.mark.parametrize("state", STATES)
def test_every_flipped_byte_is_found_and_named(memory_folder, state):
    """Every byte of every file of a small store; the last frame of a log is found by the number of the newest acknowledged change."""
    folder = memory_folder / "s"
    make(folder, state)
    rng = random.Random(0)
    last_frame = (folder / WAL).stat().st_size - FRAME if state == "killed" else 0
    left_to_the_head: list[int] = []
    for path in files(folder):
        size = path.stat().st_size
        stride = 1 if path.name in (SUMS, HEAD) else 7 if state == "closed" else 11
        for at in [*range(0, min(size, 200)), *range(rng.randrange(stride), size, stride), size - 1]:
            by = rng.randrange(1, 256)
            flip(path, at, by)
            raw = RawFile(folder / DB)
            _, found = examine_files(folder, raw, pages=None, live=False)
            raw.close()
            if found:
                first, _, last = found[0].where.partition("bytes ")[2].rstrip(")").partition(" to ")
                assert found[0].file == path.name and (path.name == HEAD or int(first) <= at <= int(last)), (at, found)
            else:
                assert path.name == WAL and at >= last_frame, (path.name, at)
                left_to_the_head.append(at)
            flip(path, at, by)
    for at in left_to_the_head[::29]:
        said: list[str] = []
        flip(folder / WAL, at, 1)
        Records(copy(folder, memory_folder / "t"), readonly=True, announce=said.append).close()
        assert "were acknowledged, and are not there" in said[0]
        flip(folder / WAL, at, 1)


@pytest.mark.parametrize("state", STATES)
def test_a_flipped_byte_costs_at_most_its_row(memory_folder, state):
    """A sample over all files. Record 42 has no content of its own, but record 1's."""
    folder = memory_folder / "s"
    before = make(folder, state)
    rng = random.Random(2)
    places = [(path.name, rng.randrange(path.stat().st_size)) for path in files(folder) for _ in range(20 if path.name in (DB, WAL) else 3)]
    for name, at in places:
        copy(folder, memory_folder / "t")
        flip(memory_folder / "t" / name, at, rng.randrange(1, 256))
        repaired = quietly(memory_folder / "t")
        lost = check(memory_folder / "t", before, repaired)
        assert len(lost - {42}) <= 1 and (42 not in lost or lost <= {1, 42}), (name, at)
        assert not lost or name in (DB, WAL)
        assert any(each.file == name for each in repaired.problems), (name, at, repaired.problems)


@pytest.mark.parametrize("state", STATES)
def test_the_first_page_costs_nothing(memory_folder, state):
    """SQLite may refuse to open it, or read a schema that was never written."""
    folder = memory_folder / "s"
    before = make(folder, state)
    for at in (0, 16, 18, 21, 24, 28, 44, 56, 99, 100, 103, 108, 3900, 4000, 4090):
        copy(folder, memory_folder / "t")
        flip(memory_folder / "t" / DB, at, 0xFF)
        assert check(memory_folder / "t", before, quietly(memory_folder / "t")) == set()
    for name in (SUMS, HEAD):
        copy(folder, memory_folder / "t")
        (memory_folder / "t" / name).unlink()
        assert check(memory_folder / "t", before, quietly(memory_folder / "t")) == set()


def test_a_whole_page_lost_costs_its_rows(memory_folder):
    folder = memory_folder / "s"
    before = make(folder, "closed")
    size = (folder / DB).stat().st_size // PAGE
    costs: dict[int, set[int]] = {}
    for page in range(size):
        copy(folder, memory_folder / "t")
        with (memory_folder / "t" / DB).open("r+b") as file:
            file.seek(page * PAGE)
            file.write(random.Random(page).randbytes(PAGE))
        costs[page] = check(memory_folder / "t", before, quietly(memory_folder / "t"))
    assert all(not (one & other) - {42} for a, one in costs.items() for b, other in costs.items() if a < b and 41 not in one & other)
    assert set().union(*costs.values()) == set(before)  # no row is in two places
    assert sum(not lost for lost in costs.values()) >= size - 8  # schema, settings, ledger, indexes, uses, bands


def test_the_shared_memory_file_does_not_matter(memory_folder):
    """SQLite makes it anew when the first connection comes."""
    folder = memory_folder / "s"
    before = make(folder, "killed")
    rng = random.Random(0)
    (folder / SHM).write_bytes(rng.randbytes((folder / SHM).stat().st_size))
    for readonly in (True, False):
        with Warm(copy(folder, memory_folder / "t"), readonly=readonly) as store:
            assert store.problems == () and store.verify() == [] and {each.id for each in store.scan()} == set(before)


def test_what_was_deleted_does_not_come_back(memory_folder):
    """Pages that are free, and older versions of pages, still have it."""
    folder = memory_folder / "s"
    with Warm(folder) as store:
        store._handles.writer.execute("PRAGMA secure_delete=OFF")  # type: ignore[union-attr]
        ids = store.insert([row(i, 1500) for i in range(300)])
        store.checkpoint()
        store.delete(ids[:290])
        before = {each.id: each for each in store.scan()}
    assert b"\x0d" in {(folder / DB).read_bytes()[at : at + 1] for at in range(0, (folder / DB).stat().st_size, PAGE)}
    with Wreck(folder) as wreck:
        assert len(set(wreck.read().id)) > 100  # they can be read
    for name, at in ((DB, 30), (SUMS, 3), (HEAD, 3)):
        copy(folder, memory_folder / "t")
        flip(memory_folder / "t" / name, at, 1)
        assert check(memory_folder / "t", before, quietly(memory_folder / "t")) == set()


def pages_of_the_ledger(folder: Path) -> Iterator[int]:
    data = (folder / DB).read_bytes()
    for at in range(0, len(data), PAGE):
        cells = [cell for cell, _ in _cells(data[at : at + PAGE], at // PAGE + 1)]
        if any(cell.local[(_blob(cell) or 0) :].startswith(b"L\x01") for cell in cells):
            yield at // PAGE


def test_where_the_ledger_is_lost_rows_are_kept(memory_folder):
    folder = memory_folder / "s"
    with Warm(folder) as store:
        for start in range(0, 1000, 100):
            store.insert([row(start + i, 100) for i in range(100)])
        store.delete([3, 4, 5])
        before = {each.id: each for each in store.scan()}
    ledger = list(pages_of_the_ledger(folder))
    assert len(ledger) > 8
    for page in (ledger[0], ledger[4], ledger[-1]):
        copy(folder, memory_folder / "t")
        with (memory_folder / "t" / DB).open("r+b") as file:
            file.seek(page * PAGE)
            file.write(bytes(PAGE))
        repaired = quietly(memory_folder / "t")
        assert repaired.missing and not repaired.doubtful
        assert {each.id for each in repaired.lost} <= {3, 4, 5} and all(
            "a change that is lost has deleted it" in each.why for each in repaired.lost
        )
        with Warm(memory_folder / "t") as store:
            assert store.verify() == [] and {each.id for each in store.scan()} == set(before)
            kept = [each.id for each in store.changes() if each.what == What.KEEP]
            assert len(kept) <= 100 and "changes" in next(each.note for each in store.changes() if each.what == What.REPAIR)


def test_a_row_whose_deletion_is_lost_is_named_as_doubtful(memory_folder):
    """It is there in an older version of a page alone, and what the ledger said of it is gone."""
    folder = memory_folder / "s"
    code = """
store = Warm(folder)
store.insert([row(i) for i in range(1, 11)])
store.checkpoint()
store.delete([2])
os.kill(os.getpid(), signal.SIGKILL)
"""
    run(code, folder)
    data = (folder / WAL).read_bytes()
    frame = next(at for at in range(HEADER, len(data), FRAME) if data[at + 24] == 0x0D and b"L\x01" in data[at : at + FRAME])
    flip(folder / WAL, frame + data[frame : frame + FRAME].index(b"L\x01") + 2, 1)
    flip(folder / WAL, frame + 24 + PAGE - 500, 1)
    repaired = quietly(folder)
    with Warm(folder) as store:
        assert store.verify() == []
        assert set(repaired.doubtful) <= {2} and {each.id for each in store.scan()} - {2} == {1, *range(3, 11)}
        assert (2 in {each.id for each in store.scan()}) == (2 in repaired.doubtful)


def test_a_record_that_may_be_deleted_does_not_hide_another_of_its_key(memory_folder):
    folder = memory_folder / "s"
    code = """
from dataclasses import replace
store = Warm(folder)
store.insert([row(i) for i in range(1, 11)])
store.checkpoint()
store.delete([2])
store.insert([replace(row(77), key="k2")])
os.kill(os.getpid(), signal.SIGKILL)
"""
    run(code, folder)
    data = (folder / WAL).read_bytes()
    blocks = [data.index(b"L\x01\x01\x00", HEADER)]  # one change each: what deletes is in all versions of the page
    while (at := data.find(data[blocks[0] : blocks[0] + 30], blocks[-1] + 1)) >= 0:
        blocks.append(at)
    for at in blocks:
        flip(folder / WAL, at + 2, 1)
    repaired = quietly(folder)
    with Warm(folder) as store:
        assert repaired.missing and store.verify() == []
        id = store.find("default", "k2")
        assert id and store.rows([id])[id].container == row(77).container
        assert repaired.doubtful == () and store.count() == 10


def test_an_older_version_of_a_replaced_row_does_not_stand_in_for_it(memory_folder):
    folder = memory_folder / "s"
    code = """
from dataclasses import replace
store = Warm(folder)
store.insert([row(i) for i in range(1, 11)])
store.checkpoint()
store.replace([replace(row(77), id=2, key="k2")])
store.replace([replace(row(3), id=3, vector=b"moved")], 4)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run(code, folder)
    data = (folder / WAL).read_bytes()
    for wanted in (row(77).container or b"", b"moved"):
        copy(folder, memory_folder / "t")
        for at in range(HEADER, len(data), FRAME):  # in all versions of the page that have the new row
            if wanted in data[at : at + FRAME]:
                flip(memory_folder / "t" / WAL, at + data[at : at + FRAME].index(wanted) + 2, 1)
        repaired = quietly(memory_folder / "t")
        with Warm(memory_folder / "t") as store:
            assert store.verify() == []
            if wanted == b"moved":  # the content is the same, so the older version will do
                assert store.rows([3])[3].container == row(3).container and 3 not in {each.id for each in repaired.lost}
            else:
                assert [each.id for each in repaired.lost] == [2] and store.rows([2]) == {} and store.find("default", "k2") is None
                assert "change" in repaired.lost[0].why


def test_a_sound_store_is_left_alone(memory_folder):
    for state in STATES:
        folder = memory_folder / state
        make(folder, state)
        seen = {path.name: path.read_bytes() for path in files(folder)}
        assert quietly(folder) == Repaired() and not (folder / QUARANTINE).exists()
        assert all((folder / name).read_bytes() == data for name, data in seen.items())
    with pytest.raises(StorageError, match="there is no store"):
        repair(memory_folder / "none")


def test_an_encrypted_store_is_repaired_with_its_key(memory_folder):
    folder = memory_folder / "s"
    with Warm(folder, keys=KEYS) as store:
        fill(store)
        before = {each.id: each for each in store.scan()}
    rng = random.Random(3)
    for at in (5, *(rng.randrange((folder / DB).stat().st_size) for _ in range(12))):
        copy(folder, memory_folder / "t")
        flip(memory_folder / "t" / DB, at, rng.randrange(1, 256))
        for keys, said in ((None, "no key is given"), (Keys(bytes(32)), "not that of this store")):
            with pytest.raises(StorageError, match=said):
                quietly(memory_folder / "t", keys=keys)
        lost = check(memory_folder / "t", before, quietly(memory_folder / "t", keys=KEYS), KEYS)
        assert len(lost - {42}) <= 1


@pytest.mark.parametrize("step", range(10))
def test_killed_while_a_repair_moves_files(memory_folder, step):
    folder = memory_folder / "s"
    before = make(folder, "killed")
    flip(folder / WAL, 5000, 1)
    code = """
from pathlib import Path
from pantheraml.memory import swap
from pantheraml.memory.repair import repair
seen = 0
def counted(name):
    real = getattr(Path, name)
    def told(self, *args, **how):
        global seen
        if swap.beside(folder, "store.head").exists() or (folder / swap.MARKER).exists():
            if seen == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
        return real(self, *args, **how)
    setattr(Path, name, told)
for name in ("rename", "replace", "write_text", "unlink", "mkdir"): counted(name)
repair(folder)
"""
    assert run(code, folder, step).returncode == -signal.SIGKILL
    if (folder / MARKER).exists() and not (folder / DB).exists():
        with pytest.raises(StorageError, match="is being repaired"):
            Warm(folder, readonly=True)
    store = Warm(folder, announce=lambda said: None)  # ends the move, or takes the old files as they are
    store.close()
    if not store.problems:
        assert not (folder / MARKER).exists()
    else:
        quietly(folder)
    with Warm(folder) as store:
        assert store.problems == () and store.verify() == [] and len(set(before) - {each.id for each in store.scan()}) <= 1
    assert not [path for path in folder.iterdir() if path.name.endswith((".repaired", ".part"))]


def test_readers_learn_that_a_store_was_repaired(memory_folder):
    folder = memory_folder / "s"
    make(folder, "closed")
    reader = Warm(folder, readonly=True)
    version = reader.data_version()
    assert reader.data_version() == version
    flip(folder / HEAD, 3, 1)
    repair(folder, announce=lambda said: None)
    with pytest.raises(StorageError, match="repaired since it was opened"):
        reader.data_version()
    assert reader.count() > 10  # what it had opened can still be read
    reader.close()


def test_nobody_repairs_what_is_being_written(memory_folder):
    with Warm(memory_folder / "s") as store:
        store.insert([row(1)])
        with pytest.raises(StorageError, match="being written by another process"):
            repair(memory_folder / "s")


def test_keys_of_lost_rows_are_named_where_they_can_be_read(memory_folder):
    folder, said = memory_folder / "s", []
    make(folder, "closed")
    data = (folder / DB).read_bytes()
    at = data.index(row(30).container or b"")
    flip(folder / DB, at + 20, 1)
    repaired = repair(folder, announce=said.append)
    assert [(each.id, each.key) for each in repaired.lost] == [(30, "k30")]
    assert f"store.db, page {at // PAGE + 1} (bytes " in said[0] and "record 30 ('k30') is lost: change 31 has written it" in said[-1]


def test_bands_and_uses_are_saved(memory_folder):
    from tests.memory.stores import bands

    folder = memory_folder / "s"
    make(folder, "closed")
    flip(folder / DB, 40, 1)
    repair(folder, announce=lambda said: None)
    with Warm(folder) as store:
        assert {id: use.times for id, use in store.uses().items()} == {1: 1, 2: 1, 3: 1}
        found = store.near(bands(40), most=1)
        assert [ids for i, ids in enumerate(found, 1) if i not in (5, 6)] == [[i] for i in range(1, 41) if i not in (5, 6)]
        assert found[4] == found[5] == [] and store.settings()["something"] == b"set" * 20
        assert store.without_bands() == [41, 42]


def test_what_is_saved_is_what_sqlite_reads(memory_folder):
    """The reader of pages against SQLite, over a store of many pages, overflow pages and a log with several versions of pages."""
    folder = memory_folder / "s"
    code = """
import random
rng = random.Random(0)
store = Warm(folder)
for i in range(40):
    ids = store.insert([row(100 * i + j, rng.choice((0, 10, 150, 3000, 4060, 4100, 9000, 30000))) for j in range(12)], bands(12, i))
    store.delete(ids[:3])
    if i == 20: store.checkpoint()
os.kill(os.getpid(), signal.SIGKILL)
"""
    run(code, folder)
    with Wreck(folder) as wreck:
        found = wreck.read()
        best = {found.id[i]: wreck.row(found, i) for i in found.best().tolist()}
        assert wreck.problems == []
    connection = sqlite3.connect(f"{(folder / DB).as_uri()}?mode=ro", uri=True)
    there = dict(connection.execute("SELECT id, row FROM records"))
    assert {id: best[id] for id in there} == there and len(there) == 360
    assert dict(connection.execute("SELECT seq, block FROM ledger")) == found.blocks
    connection.close()


def test_a_larger_store_with_many_damaged_pages(memory_folder):
    folder = memory_folder / "s"
    with Warm(folder) as store:
        for start in range(0, 6000, 1000):
            store.insert([row(start + i, 120) for i in range(1000)])
        store.delete(list(range(1, 6000, 7)))
        before = {each.id: each for each in store.scan()}
    rng = random.Random(5)
    size = (folder / DB).stat().st_size
    places = sorted(rng.sample(range(size // PAGE), 25))
    for page in places:
        flip(folder / DB, page * PAGE + rng.randrange(PAGE), rng.randrange(1, 256))
    repaired = quietly(folder)
    named = {int(each.where.split()[1]) for each in repaired.problems if each.where.startswith("page ")}
    assert {page + 1 for page in places} == named or 1 in named
    with Warm(folder, check="full") as store:
        assert store.problems == () and store.verify() == []
        after = {each.id: each for each in store.scan()}
        assert all(same(after[id], before[id]) for id in after if id in before)
        assert set(after) - set(before) <= set(repaired.doubtful)
        assert len(set(before) - set(after)) <= 25 and os.path.getsize(folder / DB) < 2 * size
