"""What a memory does when something goes wrong in the middle: a transaction that fails, values that cannot be, damage, others at work."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sqlite3
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from tests.memory.stores import lines

from pantheraml.errors import DataError, StorageError
from pantheraml.memory.aio import AsyncMemory
from pantheraml.memory.connections import sqlite_errors
from pantheraml.memory.database import Database
from pantheraml.memory.policy import Budgets
from pantheraml.memory.record import Record
from pantheraml.memory.seal import Keys
from pantheraml.memory.store import Memory

DAY = 86_400.0
TEXT = "The meeting in Paris is on the third of May."


@pytest.fixture
def memory(tmp_path: Path):
    with Memory.open(tmp_path / "store") as opened:
        yield opened


def test_a_transaction_that_fails_leaves_the_search_as_it_was(tmp_path, monkeypatch):
    """A full disk, say: what was not deleted is still found, what was not put is not, now and after the next start."""

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    with Memory.open(tmp_path) as memory:
        memory.put("boat", "the boat leaves oslo on friday")
        memory.put("car", "the car stays in bergen")
        before = memory.search("boat in oslo")
        with monkeypatch.context() as patched:
            patched.setattr(Database, "_commit", full)
            for change in (lambda: memory.delete("boat"), lambda: memory.put("car", "zebras"), lambda: memory.put("ghost", "boat in oslo")):
                with pytest.raises(StorageError, match="full"):
                    change()
        assert memory.search("boat in oslo") == before
    with Memory.open(tmp_path) as memory:
        assert memory.search("boat in oslo") == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": 5},
        {"kind": None},
        {"kind": 5},
        {"metadata": [1]},
        {"metadata": "ab"},
        {"created": "2020-01-01"},
        {"created": datetime.min.replace(tzinfo=timezone(timedelta(hours=14)))},
        {"created": datetime.max.replace(tzinfo=timezone(-timedelta(hours=12)))},
        {"fidelity": "bogus"},
    ],
    ids=repr,
)
def test_what_could_not_be_given_back_is_not_taken(memory: Memory, wrong: dict[str, Any]):
    """A wrong fidelity made a row that `verify` calls damaged; a time that Python cannot say made `infos` and `export` fail for good."""
    with pytest.raises((DataError, ValueError), match=r"text|names|datetime|years|fidelity"):
        memory.put_many([Record(**{"key": "k", "content": "c", **wrong})])
    assert memory.verify().problems == () and list(memory.infos()) == []


def test_another_tenants_records_do_not_change_what_is_near(tmp_path: Path):
    """Candidates are few: those of another tenant must not take the place of one's own, or what a put says tells what the other has."""
    words = [f"word{i} and thing{i * 7}" for i in range(80)]
    like = " ".join(f"other{i} xx{i}" if i % 9 == 0 else word for i, word in enumerate(words))

    def put(name: str, others: int):
        with Memory.open(tmp_path / name) as memory:
            memory.of("other").put_many([Record(key=str(i), content=" ".join(words) + f" end {i}") for i in range(others)])
            memory.put("mine", like)
            return memory.put("guess", " ".join(words)), [key for key, _ in memory.near("guess")]

    (alone, near), (beside, still_near) = put("alone", 0), put("beside", 20)
    assert (
        (alone.near, alone.codec, alone.stored_bytes)
        == (beside.near, beside.codec, beside.stored_bytes)
        == ("mine", "delta", alone.stored_bytes)
    )
    assert near == still_near == ["mine"]


def test_settings_of_an_encrypted_store_tell_nothing_of_its_records(tmp_path: Path):
    """Neither which kinds there are, nor which records were damaged; and both outlive a rotation that gives the old data key up."""
    keys = Keys.from_text(Keys.generate())
    with Memory.open(tmp_path, keys=keys) as memory:
        memory.put_many(Record(key=f"secretkey{i}", content=lines(4, i), kind="secretkind") for i in range(100))
        assert memory.compact().dictionaries == ("secretkind",)
        memory.parts.quarantine({1: "record 'secretkey0' gives other bytes"})
        memory.rotate(keys)
        memory.compact()
    found = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"secretkind" not in found and b"secretkey" not in found
    with Memory.open(tmp_path, keys=keys) as memory:
        assert list(memory.parts.zstd.dictionaries) == ["secretkind"] and list(memory.parts.quarantined) == [1]
        assert memory.verify().problems == ()


def test_what_is_in_quarantine_is_not_found_again_by_itself(tmp_path: Path):
    """Neither when the index is made anew, nor by a reader that was open before."""
    store = tmp_path / "store"
    with Memory.open(store) as memory:
        memory.put("bad", "the boat leaves oslo")
        memory.put("good", "the boat stays in bergen")
        with Memory.open(store, readonly=True) as reader:
            assert len(reader.search("boat")) == 2
            memory.parts.quarantine({1: "it was damaged"})
            assert [hit.key for hit in reader.search("boat")] == [hit.key for hit in memory.search("boat")] == ["good"]
    shutil.rmtree(store / "index")
    with Memory.open(store) as memory:
        assert [hit.key for hit in memory.search("boat")] == ["good"]
        memory.put("bad", "the boat leaves oslo")
        assert len(memory.search("boat")) == 2


def test_repair_takes_damaged_cold_blocks_out(tmp_path: Path):
    """What is sound in their segment stays, what lay in them or needs it is named and goes, and then `verify` is content."""
    store, text = tmp_path / "store", lines(30)
    with Memory.open(store, budgets=Budgets(warm_bytes=0)) as memory:
        memory.put("base", text)
        memory.put("delta", text + "\none more line")
        memory.put("large", random.Random(0).randbytes(50_000))  # a block for itself
        memory.put("twin", text)
        memory.compact()
    with Memory.open(store) as memory:
        memory.put("late", text + "\nanother line")  # lies warm, and needs a record that lies cold
    segment = store / "cold" / "000001.seg"
    data = bytearray(segment.read_bytes())
    data[60] ^= 1
    segment.write_bytes(data)
    repaired = Memory.repair(store, announce=lambda said: None)
    assert sorted(each.key or "" for each in repaired.lost) == ["base", "delta", "late", "twin"] and repaired.kept == 1
    assert repaired.quarantine and (repaired.quarantine / "cold" / segment.name).read_bytes() == bytes(data)
    with Memory.open(store) as memory:
        assert memory.verify().problems == () and memory.stats().quarantined == 0
        assert [info.key for info in memory.infos()] == ["large"] and len(memory.get("large").content) == 50_000
        assert memory.put("base", text).codec == "zstd" and memory.search("INFO worker finished job")[0].key == "base"
    again = Memory.repair(store)
    assert (again.kept, again.lost, again.problems, again.quarantine) == (2, (), (), None)


def test_an_export_goes_on_where_a_record_goes_meanwhile(memory: Memory, tmp_path: Path):
    """Another thread, or the process that writes, may delete at any time; kind and content of a row are of one version."""
    memory.put_many(Record(key=str(i), content=i) for i in range(3))
    infos = list(memory.infos())
    memory.delete("1")
    memory.put("2", "new", kind="new")
    memory.infos = lambda: iter(infos)
    assert memory.export(tmp_path / "out.jsonl") == 2
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["key"], row["content"], row["kind"]) for row in rows] == [("0", 0, "note"), ("2", "new", "new")]


def test_all_that_a_memory_does_it_does_for_asyncio():
    """docs/memory.md says so; what needs no disk (`of`, `repair`, `open`) is left out."""
    methods = {name for name in vars(Memory) if not name.startswith("_")}
    assert methods - {"of", "repair"} <= {name for name in vars(AsyncMemory) if not name.startswith("_")}


def test_a_close_that_is_cancelled_still_closes(tmp_path: Path):
    async def work() -> None:
        memory = AsyncMemory(Memory.open(tmp_path))
        puts = [asyncio.create_task(memory.put(f"k{i}", lines(20, i))) for i in range(20)]
        closing = asyncio.create_task(memory.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, *puts, return_exceptions=True)
        for _ in range(500):
            with suppress(StorageError):
                return Memory.open(tmp_path).close()
            await asyncio.sleep(0.02)
        raise AssertionError("it is still locked")

    asyncio.run(work())


def test_of_equal_records_those_put_first_are_found_first(tmp_path: Path):
    """Also where rows of the index lie otherwise: after others were deleted, and after the next start."""
    with Memory.open(tmp_path) as memory:
        memory.put_many(Record(key=f"other {i}", content=f"tie {i} number {i * i}") for i in range(7))
        memory.put_many(Record(key=str(i), content="the same tie text") for i in range(31))
        wanted = [str(i) for i in range(31)]
        assert [hit.key for hit in memory.search("the same tie text", 31)] == wanted
        memory.delete("other 3")
        memory.put("0", "the same tie text", kind="again")  # now its row is the last one
        assert [hit.key for hit in memory.search("the same tie text", 31)] == wanted
    with Memory.open(tmp_path) as memory:
        assert [hit.key for hit in memory.search("the same tie text", 31)] == wanted


def test_an_export_says_which_records_are_gists_and_comes_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, pair = tmp_path / "out.jsonl", "\ud83d\ude00"  # two lone surrogates, which are no character together
    with Memory.open(tmp_path / "s", summarise=lambda texts: ["a summary"] * len(texts)) as memory:
        memory.put("short", TEXT, fidelity="gist")
        memory.put("pair", pair)
        assert memory.export(out) == 2
        rows = {row["key"]: row for row in map(json.loads, out.read_text("utf-8", "surrogatepass").splitlines())}
        assert rows["short"]["fidelity"] == "gist" and rows["short"]["content"] == "a summary" and "fidelity" not in rows["pair"]
        assert rows["pair"]["content"] == pair
        before = out.read_bytes()
        whole = memory.get_many

        def damaged(keys: list[str]) -> Any:
            if keys == ["pair"]:
                raise StorageError("record 'pair' is damaged", why="a byte has changed", fix="repair it")
            return whole(keys)

        monkeypatch.setattr(memory, "get_many", damaged)
        with pytest.raises(StorageError, match="pair"):
            memory.export(out)
        assert out.read_bytes() == before and [each.name for each in tmp_path.glob("out*")] == ["out.jsonl"]


def test_what_was_put_here_is_taken_into_the_index_once(memory: Memory):
    """A search after a put read all that was put since the start once more, and what a graph had was no longer in it."""
    memory.put_many(Record(key=str(i), content=f"{TEXT} {i}") for i in range(50))
    before = memory.parts.finder.hot.next_serial
    assert memory.search(TEXT, 3) and memory.parts.finder.hot.next_serial == before
    memory.put("1", "Something else.")
    assert memory.search("something else", 1)[0].key == "1" and memory.parts.finder.hot.next_serial == before + 1


def test_texts_of_a_training_that_was_killed_go_when_the_store_is_next_written(tmp_path: Path):
    """They are in the clear, so they lie in the store and not where others may look, and do not stay there."""
    Memory.open(tmp_path / "s").close()
    left = tmp_path / "s" / "training" / "rows.jsonl"
    left.parent.mkdir()
    left.write_text(TEXT)
    Memory.open(tmp_path / "s", readonly=True).close()
    assert left.exists()
    Memory.open(tmp_path / "s").close()
    assert not left.parent.exists()


def test_a_disk_that_does_not_read_is_not_called_a_damaged_page(tmp_path: Path):
    def trouble(said: str) -> StorageError:
        with pytest.raises(StorageError) as caught, sqlite_errors(tmp_path):
            raise sqlite3.OperationalError(said)
        return caught.value

    assert "did not read or write" in trouble("disk I/O error").why
    assert "page may be damaged" in trouble("database disk image is malformed").why
