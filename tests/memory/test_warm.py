"""The records in SQLite: what was acknowledged is there, whoever reads it, whatever was killed."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import string
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.memory.stores import bands, memory_folder, row, run, same, start

from pantheraml.errors import DataError, StorageError
from pantheraml.memory import tables
from pantheraml.memory.container import DELTA
from pantheraml.memory.ledger import What
from pantheraml.memory.pages import DB, HEAD, WAL
from pantheraml.memory.record import Origin
from pantheraml.memory.records import Use
from pantheraml.memory.rows import Row, pack_row, sound_seq, unpack_row
from pantheraml.memory.seal import Keys, Seal
from pantheraml.memory.warm import Warm

__all__ = ["memory_folder"]
KEYS = Keys(bytes(range(32)))
CPU = Origin(kind="c" + "pu", name="a machine", dtype="int16", batch=7)


@pytest.fixture
def store(memory_folder):
    with Warm(memory_folder / "s") as opened:
        yield opened


# Rows

names = st.text(st.characters(), max_size=60).filter(lambda text: len(text.encode("utf-8", "surrogatepass")) <= 255)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def rows(draw) -> Row:
    place = draw(st.sampled_from(["container", "cold", "same"]))
    container = draw(st.binary(max_size=400)) if place == "container" else None
    u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
    fidelity = draw(st.sampled_from(["exact", "gist"]))
    return Row(
        key=draw(names), kind=draw(names), tenant=draw(names), created=draw(st.integers(-(2**63), 2**63 - 1)),
        metadata=draw(st.dictionaries(names, json_values, max_size=3)), form=draw(st.sampled_from(["text", "bytes", "json"])),
        hash=draw(st.binary(min_size=32, max_size=32)), raw_size=draw(u32), codec=draw(st.integers(0, 6)), model=draw(st.binary(max_size=16)),
        stored_bytes=len(container) if container is not None else draw(u32) if place == "cold" else 0,
        origin=draw(st.none() | st.builds(Origin, kind=names, name=names, dtype=names, batch=u32)), container=container,
        cold=(draw(u32), draw(u64), draw(u32)) if place == "cold" else None, same_as=draw(u64) if place == "same" else None,
        vector=draw(st.binary(max_size=100)), fidelity=fidelity, score=draw(st.floats(0, 1)) if fidelity == "gist" else None,
    )  # fmt: skip


@pytest.mark.parametrize("seal", [None, Seal.create()])
@given(given_row=rows(), id=st.integers(1, 2**32), seq=st.integers(1, 2**63))
def test_a_row_comes_back_as_it_was(seal, given_row, id, seq):
    machines = {3: (given_row.origin.kind, given_row.origin.name, given_row.origin.dtype)} if given_row.origin else {}
    packed = pack_row(given_row, id, seq, 3 if given_row.origin else 0, seal)
    assert unpack_row(id, packed, machines, seal) == replace(given_row, id=id, seq=seq)
    assert sound_seq(id, packed) == seq
    assert len(packed) < 200 + sum(map(len, (given_row.container or b"", given_row.vector))) + 4 * len(repr(given_row))


def test_each_flipped_or_missing_byte_of_a_row_is_noticed():
    packed = pack_row(row(1, 20), 1, 1, 0, None)
    for i in range(len(packed)):
        assert sound_seq(1, packed[:i] + bytes([packed[i] ^ 1]) + packed[i + 1 :]) is None
        assert sound_seq(1, packed[:i]) is None
    assert sound_seq(2, packed) is None
    for nothing in (b"", None, 7, "R\x01"):
        assert sound_seq(1, nothing) is None  # type: ignore[arg-type]


def test_a_row_has_this_overhead():
    """82 bytes, and its key, tenant and kind."""
    assert len(pack_row(row(1, 0), 1, 1, 0, None)) == 11 + 63 + 8 + len("default" + "note" + "k1")


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"key": "k" * 65_536}, DataError, "65,536 bytes"),
        ({"tenant": "é" * 128}, DataError, "a tenant of 256 bytes"),
        ({"kind": "k" * 256}, DataError, "a kind of 256 bytes"),
        ({"metadata": {"a": float("nan")}}, DataError, "nan"),
        ({"raw_size": 2**32}, DataError, "4,294,967,296"),
        ({"cold": (1, 2, 3)}, ValueError, "one of the three"),
        ({"container": None}, ValueError, "one of the three"),
        ({"hash": b"short"}, ValueError, "a hash 32"),
        ({"vector": bytes(70_000)}, ValueError, "65,535"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(store, how, error, said):
    with pytest.raises(error, match=said):
        store.insert([row(1), replace(row(2), **how)])
    assert store.count() == 0 and store.insert([row(1)]) == [1]


# Putting, finding, changing


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(many=st.lists(rows().filter(lambda each: each.base is None), min_size=1, max_size=8, unique_by=lambda each: (each.tenant, each.key)))
def test_what_is_put_is_read_and_found(store, many):
    store.delete(list(store.rows(range(1, 10_000))))
    ids = store.insert(many)
    found = store.rows(ids)
    assert all(same(found[id], replace(each, id=id)) for id, each in zip(ids, many, strict=True))
    assert store.find_many([(each.tenant, each.key) for each in many]) == ids
    assert [store.find(each.tenant, each.key) for each in many] == ids
    for id, each in zip(ids, many, strict=True):
        other = store.by_hash(each.tenant, each.hash)
        assert (other is None) == (
            each.fidelity == "gist" and all(b.hash != each.hash for b in many if b.fidelity == "exact")
        ) or other == id
    assert store.find("no such tenant", many[0].key) is None and store.find(many[0].tenant, many[0].key + "?") is None
    assert [each.id for each in store.scan()] == sorted(ids)
    assert [each.id for each in store.scan(tier="cold")] == [id for id, each in zip(ids, many, strict=True) if each.cold]
    assert [each.id for each in store.scan(after_id=ids[0], tier="warm")] == [
        id for id, each in zip(ids, many, strict=True) if not each.cold and id > ids[0]
    ]


def test_a_tenant_does_not_find_what_is_another_ones(store):
    store.insert([row(1, tenant="a", key="k"), row(1, tenant="b", key="k")])
    assert (store.find("a", "k"), store.find("b", "k"), store.find("ab", ""), store.find("", "ak")) == (1, 2, None, None)
    assert (store.by_hash("a", row(1).hash), store.by_hash("b", row(1).hash), store.by_hash("c", row(1).hash)) == (1, 2, None)


def test_two_things_of_one_mark_are_kept_apart(store, monkeypatch):
    """A mark has 64 bits, so two keys may have the same one."""
    monkeypatch.setattr(store.marks, "key", lambda tenant, key: 5)
    monkeypatch.setattr(store.marks, "content", lambda tenant, hash: bytes(16))
    store.insert([row(1), row(2), row(3)])
    assert store.find_many([("default", f"k{i}") for i in (3, 1, 2, 4)]) == [3, 1, 2, None]
    assert store.by_hashes([("default", row(i).hash) for i in (2, 9, 3)]) == [2, None, 3]
    store.delete([1])
    assert store.find("default", "k2") == 2 and store.find("default", "k1") is None and store.verify() == []


def test_verify_finds_two_records_of_one_key(store):
    store.insert([row(1), row(2), row(1, tenant="other")])
    store.insert([row(9, key="k2")])
    assert [str(each) for each in store.verify()] == ["store.db, records 2 and 4: they have the same key ('k2')"]


def test_replacing(store):
    store.insert([row(1), row(2)])
    store.replace([replace(row(3), id=1, key="other", tenant="t")])
    assert store.find("default", "k1") is None and store.find("t", "other") == 1
    assert store.by_hash("default", row(1).hash) is None and store.by_hash("t", row(3).hash) == 1
    store.replace([replace(store.rows([2])[2], container=None, cold=(1, 2, 3), stored_bytes=9)], What.MOVE)
    assert store.rows([2])[2].cold == (1, 2, 3) and store.rows([2])[2].stored_bytes == 9 and store.by_hash("default", row(2).hash) == 2
    for wrong in ([replace(row(4), id=9)], [replace(row(4), id=1), replace(row(5), id=1)]):
        with pytest.raises(ValueError, match="no records to replace"):
            store.replace(wrong)
    assert store.verify() == []


def test_numbers_are_given_once(store, memory_folder):
    assert store.insert([row(1), row(2)]) == [1, 2]
    store.delete([2])
    assert store.insert([row(3)]) == [3]
    store.delete([3])
    store.close()
    with Warm(memory_folder / "s") as again:
        assert again.insert([row(4)]) == [4]
        with again.write():
            numbers = again.reserve(3)
            assert again.insert([replace(row(5), id=numbers[2]), row(6), replace(row(7), id=numbers[0])]) == [7, 8, 5]
        for id, said in ((7, "UNIQUE"), (99, "was not reserved")):
            with pytest.raises(ValueError, match=said):
                again.insert([replace(row(8), id=id)])
        again._next_id = 2**32 - 1
        with pytest.raises(StorageError, match="32 bits"):
            again.insert([row(9), row(10)])


def test_what_others_are_decoded_with_is_not_deleted_before_them(store):
    owner, same_as = store.insert([row(1)])[0], row(2, container=None, same_as=1)
    delta = replace(row(3), codec=DELTA, model=(1).to_bytes(8, "little"))
    assert store.insert([same_as, delta]) == [2, 3]
    assert store.referrers([owner, 2]) == {1: [2, 3]}
    with pytest.raises(ValueError, match=r"records \[2, 3\] cannot be decoded without record 1"):
        store.delete([1])
    with pytest.raises(ValueError, match=r"records \[77\] are not there"):
        store.insert([row(4, container=None, same_as=77)])
    store.replace([replace(row(3), id=3)])  # no delta any more
    assert store.referrers([1]) == {1: [2]} and store.by_hash("default", row(2).hash) is None
    assert store.delete([1, 2, 99]) == 2 and store.count() == 1 and store.verify() == []


def test_uses_are_kept_with_the_next_transaction(store, memory_folder):
    store.insert([row(1), row(2)])
    store.touch([1, 1, 2], 100)
    store.touch([1, 5], 200)
    assert store.uses() == {}
    with pytest.raises(RuntimeError), store.write():
        raise RuntimeError
    store.insert([row(3)])
    assert store.uses() == {1: Use(200, 3), 2: Use(100, 1)}
    store.touch([2], 50)
    store.close()
    with Warm(memory_folder / "s", readonly=True) as again:
        assert again.uses(after_id=1) == {2: Use(100, 2)}
        again.touch([1], 300)  # a reader's uses are not kept


def test_settings_are_kept_twice(store, memory_folder):
    store.set({"a": b"1", "b": b"2" * 5000})
    store.set({"a": b"3", "b": None, "c": b""})
    assert {name: store.settings().get(name) for name in "abc"} == {"a": b"3", "b": None, "c": b""}
    with store.write() as connection:
        connection.execute("UPDATE meta SET entry=x'00'")
    assert store.settings()["a"] == b"3" and store.settings()["version"] == b"1"
    assert "its copy is used" in str(store.verify()[0])


def test_origins_come_back_for_readers_too(store, memory_folder):
    with Warm(memory_folder / "s", readonly=True) as reader:
        store.insert([replace(row(1), origin=CPU), replace(row(2), origin=replace(CPU, dtype="x", batch=1)), row(3)])
        for each in (store, reader):
            assert [r.origin for r in each.scan()] == [CPU, replace(CPU, dtype="x", batch=1), None]
        with pytest.raises(RuntimeError), store.write():
            store.insert([replace(row(4), origin=replace(CPU, name="gone"))])
            raise RuntimeError
        store.insert([replace(row(5), origin=replace(CPU, name="new"))])
        assert [each.origin.name for each in reader.scan(after_id=3) if each.origin] == ["new"]


@pytest.mark.parametrize("batches", [[1] * 70, [30, 1, 1, 200, 7, 7, 7, 7, 7, 7, 7, 7, 7]])
def test_bands_find_what_a_search_over_all_finds(store, batches):
    rng = np.random.default_rng(0)
    all_bands = rng.integers(0, 50, (sum(batches), 4)) << 32  # few values, so that many meet
    done = 0
    for count in batches:
        store.insert([row(done + i, 5) for i in range(count)], all_bands[done : done + count])
        done += count
    gone = [3, 10]
    store.delete(gone)
    wanted = rng.integers(0, 60, (9, 4)) << 32
    for found, bands_ in zip(store.near(wanted, most=10_000), wanted, strict=True):
        shared = {i + 1: sum(len(set(np.flatnonzero(each == b))) > 0 for b in set(bands_.tolist())) for i, each in enumerate(all_bands)}
        assert set(found) == {id for id, count in shared.items() if count} - set(gone)
    runs = store.near(wanted, most=3)
    assert all(len(each) <= 3 for each in runs)
    with store.read() as connection:
        assert connection.execute("SELECT count(*) FROM bands").fetchone()[0] <= 21
    with Warm(store.folder, readonly=True) as reader:
        assert reader.near(wanted, most=10_000) == store.near(wanted, most=10_000)


def test_records_without_bands_are_known(store):
    store.insert([row(1), row(2)], bands(2))
    store.insert([row(3), row(4)])
    assert store.without_bands() == [3, 4]
    store.add_bands([4], bands(1, seed=5))
    assert store.without_bands() == [3] and store.near(bands(1, seed=5)) == [[4]]
    with pytest.raises(RuntimeError), store.write():
        store.add_bands([3], bands(1, seed=6))
        assert store.near(bands(1, seed=6)) == [[3]]
        raise RuntimeError
    assert store.near(bands(1, seed=6)) == [[]] and store.without_bands() == [3]


def test_marks_are_found_after_the_small_table_was_poured_into_the_large_one(store):
    for first in range(0, 24_000, 8_000):
        store.insert([row(first + i, 1) for i in range(8_000)])
    with store.read() as connection:
        assert connection.execute("SELECT count(*) FROM places").fetchone()[0] >= 32_000
        assert 0 < connection.execute("SELECT count(*) FROM recent").fetchone()[0] <= 20_000
    asked = random.Random(0).sample(range(24_000), 500)
    assert store.find_many([("default", f"k{i}") for i in asked]) == [i + 1 for i in asked]
    store.delete([1, 23_999])
    assert store.find("default", "k0") is None and store.find("default", "k23998") is None and store.verify() == []


# Transactions


def test_a_transaction_is_whole_or_not_at_all(store):
    store.insert([row(1)])
    before = store.tip
    with pytest.raises(RuntimeError), store.write():
        store.insert([row(2)], bands(1))
        store.delete([1])
        store.set({"x": b"y"})
        assert store.count() == 1 and store.find("default", "k2") == 2 and store.find("default", "k1") is None
        raise RuntimeError
    assert store.tip == before and [each.key for each in store.scan()] == ["k1"] and "x" not in store.settings()
    with store.write():
        pass
    assert store.tip == before
    with store.write():
        store.insert([row(2)])
        store.delete([1])
    assert [each.key for each in store.scan()] == ["k2"] and store.verify() == []


def test_a_part_that_has_failed_is_not_committed(store):
    with pytest.raises(ValueError, match="a part of this transaction has failed"), store.write():
        store.insert([row(1)])
        with pytest.raises(DataError):
            store.insert([row(2), replace(row(3), key="k" * 70_000)])
    assert store.count() == 0 and store.insert([row(1)]) == [1]


def test_an_interrupt_just_after_the_commit_leaves_the_truth(store, monkeypatch):
    real = store._head.write
    monkeypatch.setattr(store._head, "write", lambda tip: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.insert([row(1)])
    monkeypatch.setattr(store._head, "write", real)
    assert store.count() == 1 and store.insert([row(2)]) == [2] and store.verify() == []


def test_a_full_disk_loses_nothing_that_was_acknowledged(memory_folder):
    """A limit on the size of a file stands in for the disk: SQLite meets it in its log."""
    code = """
import resource
from pantheraml.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Warm(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
try:
    for i in range(1000):
        store.insert([row(10 * i + j) for j in range(10)])
        print(i, flush=True)
except StorageError as error:
    print("refused:", str(error).replace("\\n", " "), flush=True)
    print(store.count(), store.find("default", "k5"), flush=True)
    store.close()
"""
    done = run(code, memory_folder / "s")
    lines = done.stdout.splitlines()
    assert any(line.startswith("refused:") and "fix:" in line for line in lines), done
    count = len([line for line in lines if line.isdigit()])
    with Warm(memory_folder / "s") as store:
        assert store.problems == () and store.verify() == [] and store.count() == 10 * count
        store.insert([row(10**6)])


# Readers and threads


def test_one_writes_and_many_read(memory_folder):
    folder = memory_folder / "s"
    read = """
store = Warm(folder, readonly=True)
seen, version = 0, 0
print("ready", flush=True)
while True:
    if (now := store.data_version()) != version:
        version = now
        count = store.count()
        assert count % 25 == 0 and count >= seen, count  # a transaction is seen as a whole
        seen = count
        if count:
            key = f"k{count - 1}"
            id = store.find("default", key)
            assert store.rows([id])[id].key == key
            assert len(list(store.scan(after_id=count - 30))) >= 30 or count < 30
        print(seen, flush=True)
"""
    with Warm(folder, wal_bytes=200_000) as store:
        with start(read, folder) as one, start(read, folder) as other:
            for each in (one, other):
                assert each.stdout and each.stdout.readline() == "ready\n"
            with pytest.raises(StorageError, match="is being written by another process"):
                Warm(folder)
            refused = run("Warm(folder)", folder)
            assert "StorageError" in refused.stderr and "one process writes at a time" in refused.stderr
            for start_ in range(0, 1000, 25):
                store.insert([row(start_ + i) for i in range(25)])
            for each in (one, other):
                assert each.stdout and any(line == "1000\n" for line in each.stdout)
                assert each.poll() is None
        assert store.verify() == []


def test_a_reader_needs_a_store_and_writes_nothing(memory_folder):
    for create in (False, True):
        with pytest.raises(StorageError, match="there is no store"):
            Warm(memory_folder / "none", readonly=True, create=create)
    with pytest.raises(StorageError, match="there is no store"):
        Warm(memory_folder / "none", create=False)
    assert list(memory_folder.iterdir()) == []
    Warm(memory_folder / "s").close()
    with Warm(memory_folder / "s", readonly=True) as reader:
        for writing in (lambda: reader.insert([row(1)]), lambda: reader.set({"a": b""}), reader.checkpoint, lambda: reader.delete([1])):
            with pytest.raises(ValueError, match="opened for reading"):
                writing()
    with pytest.raises(ValueError, match="closed"):
        reader.count()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_can_be_read(memory_folder):
    with Warm(memory_folder / "s") as store:
        store.insert([row(1)])
    (memory_folder / "s").chmod(0o500)
    try:
        with Warm(memory_folder / "s", readonly=True) as store:
            assert store.count() == 1
        with pytest.raises(StorageError):
            Warm(memory_folder / "s")
    finally:
        (memory_folder / "s").chmod(0o700)


def test_threads_share_a_store(store):
    errors, counts = [], Counter[str]()

    def put(start: int) -> None:
        try:
            for i in range(15):
                store.insert([row(start + 10 * i + j) for j in range(10)])
                assert store.find("default", f"k{start + 10 * i}") is not None
                counts["put"] += 10
        except BaseException as error:
            errors.append(error)
            raise

    def read() -> None:
        try:
            while counts["put"] < 600:
                assert store.count() % 10 == 0
                for each in store.scan(after_id=random.randrange(600)):
                    assert each.container
                store.touch([1], 5)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=put, args=(1000 * i,)) for i in range(4)] + [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and store.count() == 600 and store.verify() == []


def test_a_thread_does_not_see_what_another_has_not_committed(store):
    seen: list[int] = []
    with store.write():
        store.insert([row(1)])
        thread = threading.Thread(target=lambda: seen.append(store.count()))
        thread.start()
        thread.join()
        seen.append(store.count())
    assert seen == [0, 1]


def test_a_fork_does_not_use_its_parents_store(memory_folder):
    code = """
import warnings
warnings.simplefilter("ignore")
store = Warm(folder)
store.insert([row(1)])
child = os.fork()
if not child:
    for use in (store.count, lambda: store.insert([row(2)])):
        try:
            use()
        except ValueError as error:
            print("refused", flush=True)
    sys.exit()
os.waitpid(child, 0)
store.insert([row(3)])
print(store.count(), store.verify(), flush=True)
"""
    assert run(code, memory_folder / "s").stdout.split("\n")[:3] == ["refused", "refused", "2 []"]


# Versions


def test_a_newer_format_is_refused(memory_folder, monkeypatch):
    monkeypatch.setattr(tables, "VERSION", 2)
    Warm(memory_folder / "s").close()
    monkeypatch.undo()
    for readonly in (False, True):
        with pytest.raises(StorageError, match="has format 2, and this program knows 1"):
            Warm(memory_folder / "s", readonly=readonly)


def test_an_older_format_is_brought_to_the_newest(memory_folder, monkeypatch):
    folder = memory_folder / "s"
    with Warm(folder) as store:
        store.insert([row(1)])
    monkeypatch.setattr(tables, "VERSION", 3)
    monkeypatch.setitem(tables.STEPS, 1, ("CREATE TABLE more(id INTEGER PRIMARY KEY)", "INSERT INTO more SELECT id FROM records"))
    monkeypatch.setitem(tables.STEPS, 2, ("INSERT INTO more VALUES(77)",))
    with pytest.raises(StorageError, match="open it for writing once"):
        Warm(folder, readonly=True)
    with Warm(folder) as store:
        with store.read() as connection:
            assert connection.execute("SELECT id FROM more").fetchall() == [(1,), (77,)]
        assert store.settings()["version"] == b"3" and store.count() == 1 and store.verify() == []
        assert [each.note for each in store.changes()][-1] == "format 1 to 3"
    monkeypatch.setitem(tables.STEPS, 3, ("CREATE TABLE less(id)", "a mistake"))
    monkeypatch.setattr(tables, "VERSION", 4)
    with pytest.raises(StorageError):
        Warm(folder)
    monkeypatch.setattr(tables, "VERSION", 3)
    with Warm(folder) as store:  # nothing of it was done
        assert store.settings()["version"] == b"3" and store.verify() == []


# Kills

PUT_UNTIL_KILLED = """
import random
store = Warm(folder, wal_bytes=int(sys.argv[3]))
rng = random.Random(int(sys.argv[2]))
n = int(sys.argv[2]) * 1_000_000
print("ready", flush=True)
while True:
    count = rng.choice((1, 1, 3, 40))
    with store.write():
        ids = store.insert([row(n + i, rng.choice((5, 150, 150, 6000))) for i in range(count)], bands(count) if rng.random() < .3 else None)
        gone = [id for id in ids if rng.random() < .1]
        store.delete(gone)
    print(*[f"+{n + i}" for i, id in enumerate(ids) if id not in gone], *[f"-{n + i}" for i, id in enumerate(ids) if id in gone], flush=True)
    n += count
    if rng.random() < .05: store.checkpoint()
    if rng.random() < .02: store.vacuum()
    if rng.random() < .1:
        store.touch(ids, 5)
        store.set({"n": b"%d" % n})
    if rng.random() < .02:
        store.close()
        store = Warm(folder, wal_bytes=int(sys.argv[3]))
"""


def test_killed_at_random_moments(memory_folder):
    """Twelve kills of one store: after each, everything is sound, and all that was acknowledged is there."""
    folder, rng = memory_folder / "s", random.Random(1)
    there: set[str] = set()
    for round_ in range(12):
        with start(PUT_UNTIL_KILLED, folder, round_, rng.choice((40_000, 10**7))) as writer:
            assert writer.stdout and writer.stdout.readline() == "ready\n"
            time.sleep(rng.random() * 0.5)
            writer.send_signal(signal.SIGKILL)
            said = writer.stdout.read()
        whole = said[: said.rfind("\n") + 1].split()
        there |= {f"k{each[1:]}" for each in whole if each[0] == "+"}
        gone = {f"k{each[1:]}" for each in whole if each[0] == "-"}
        with Warm(folder, readonly=True) as reader:
            assert reader.problems == () and reader.verify() == []
        with Warm(folder, check="full") as store:
            assert store.problems == () and store.verify() == []
            found = {each.key for each in store.scan()}
            assert there <= found and not gone & found
            for key in rng.sample(sorted(there), min(len(there), 20)):
                id = store.find("default", key)
                assert id
                expected, got = row(int(key[1:]), 1), store.rows([id])[id]
                assert got.hash == expected.hash and got.container == row(int(key[1:]), got.raw_size).container
            there = found  # the last one may have been committed and not told of
    assert len(there) > 100


def test_other_programs_can_read_it(memory_folder):
    """The format is SQLite's: any tool opens it, also while we write."""
    with Warm(memory_folder / "s") as store:
        store.insert([row(i) for i in range(1, 6)])
        other = sqlite3.connect(f"{(memory_folder / 's' / DB).as_uri()}?mode=ro", uri=True)
        assert other.execute("SELECT count(*) FROM records").fetchone() == (5,)
        assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        other.close()
        assert store.verify() == []


def test_a_store_whose_database_is_gone_is_not_made_anew(memory_folder):
    folder = memory_folder / "s"
    with Warm(folder) as store:
        store.insert([row(1)])
    (folder / DB).rename(folder / "elsewhere")
    for readonly in (False, True):
        with pytest.raises(StorageError, match="is missing"):
            Warm(folder, readonly=readonly)
    (folder / "elsewhere").rename(folder / DB)
    (folder / HEAD).unlink()
    said: list[str] = []
    with Warm(folder, announce=said.append) as store:
        assert store.readonly and "store.head, file: it is not there" in said[0] and store.count() == 1
    assert (folder / WAL).stat().st_size == 0


def test_names_with_odd_characters_are_folders_too(memory_folder):
    for name in ("a b?c#d%20e", "ünïcode", string.punctuation.replace("/", "")):
        with Warm(memory_folder / name) as store:
            store.insert([row(1)])
        with Warm(memory_folder / name, readonly=True) as store:
            assert store.count() == 1 and (memory_folder / name / DB).exists()


def test_nothing_heavy_is_imported():
    code = "import sys, pantheraml.memory.warm, pantheraml.memory.repair; print([m for m in ('torch', 'transformers', 'jax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert done.stdout.strip() == "[]"
