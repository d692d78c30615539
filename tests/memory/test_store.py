"""The memory as a whole: what was put is what comes back, for its tenant alone, in whatever tier, after whatever happened."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.memory.stores import lines

from pantheraml.errors import DataError, RecipeError, StorageError
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


CONTENTS = [TEXT, "", b"\x00\xff" * 40, {"a": [1, 2.5, None, {"x": "ü"}]}, [], 7, "x" * 100_000, lines(50), "\ud800 alone"]


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: repr(content)[:20])
def test_what_was_put_comes_back(memory: Memory, content):
    memory.put("k", content, kind="any", metadata={"a": 1})
    found = memory.get("k")
    assert found.content == content and type(found.content) is type(content)
    assert found.exact and found.score is None
    assert found.info.stored_bytes <= found.info.raw_bytes + 64
    assert found.info.metadata == {"a": 1} and found.info.kind == "any"


def test_it_is_there_when_the_store_is_opened_again(tmp_path: Path):
    with Memory.open(tmp_path) as memory:
        memory.put_many([Record(key=str(i), content=c) for i, c in enumerate(CONTENTS)])
    with Memory.open(tmp_path, readonly=True) as memory:
        assert [memory.get(str(i)).content for i in range(len(CONTENTS))] == CONTENTS
        assert memory.search("the third of May", 1)[0].key == "0"
        with pytest.raises(ValueError, match="reading"):
            memory.put("k", "v")


def test_a_missing_record_is_an_error_that_names_it(memory: Memory):
    with pytest.raises(DataError, match="there is no record 'gone' of 'default'"):
        memory.get("gone")
    assert "gone" not in memory and not memory.delete("gone") and memory.search("anything") == []


def test_no_query_sees_another_tenant(memory: Memory):
    other = memory.of("other")
    memory.put("k", TEXT)
    other.put("k", "Another text about a meeting in Paris in May.")
    other.put("secret", TEXT)
    assert memory.get("k").content == TEXT and other.get("k").content != TEXT
    assert "secret" not in memory and not memory.delete("secret")
    assert {hit.key for hit in memory.search("meeting in Paris in May", 10)} == {"k"}
    assert {hit.tenant for hit in other.search("meeting in Paris in May", 10)} == {"other"}
    assert memory.near("k") == [] and [info.key for info in memory.infos()] == ["k"]
    assert memory.stats().records == 1 and other.stats().records == 2
    # Equal contents of two tenants are two contents: whether another one has a text is nobody's business.
    assert other.get("secret").info.stored_bytes > 0
    with pytest.raises(ValueError, match=r"memory\.of"):
        memory.put_many([Record(key="x", content="y", tenant="other")])


def test_equal_contents_are_stored_once_and_outlive_each_other(memory: Memory):
    assert memory.put("a", TEXT).same_as is None
    assert memory.put("b", TEXT).same_as == "a" and memory.put("c", TEXT).same_as == "a"
    memory.delete("a")
    assert memory.get("b").content == TEXT and memory.get("c").content == TEXT
    memory.put("b", "now another")
    assert memory.get("c").content == TEXT
    stored = memory.put_many([Record(key=f"d{i}", content="five times the same") for i in range(5)])
    assert [each.same_as for each in stored] == [None, "d0", "d0", "d0", "d0"]
    assert memory.verify().problems == ()


def test_putting_the_same_again_changes_nothing_else(memory: Memory):
    memory.put("a", TEXT)
    memory.put("b", TEXT)
    memory.put("a", TEXT, metadata={"new": True})
    assert memory.get("a").content == memory.get("b").content == TEXT and memory.get("a").info.metadata == {"new": True}
    assert memory.verify().problems == ()


def test_a_version_of_a_record_is_kept_as_what_differs_and_outlives_it(memory: Memory):
    first, second = lines(60), lines(60).replace("job 7 ", "job seven ")
    memory.put("v1", first)
    done = memory.put("v2", second)
    assert done.near == "v1" and done.codec == "delta" and done.stored_bytes < len(first) / 10
    ((key, likeness),) = memory.near("v2")
    assert key == "v1" and not likeness.same and likeness.similarity > 0.9
    memory.delete("v1")
    assert memory.get("v2").content == second and memory.get("v2").info.codec != "delta"


def test_amounts_are_never_the_same_record(memory: Memory):
    text = lines(20)
    memory.put("a", f"{text} We owe them $100 now.")
    memory.put("b", f"{text} We owe them $900000 now.")
    assert memory.get("a").content != memory.get("b").content and "$100 " in str(memory.get("a").content)


def test_searches_filter(memory: Memory):
    start = datetime(2026, 1, 1, tzinfo=UTC)
    memory.put_many(
        [
            Record(
                key=str(i),
                content=f"note {i} about boats",
                kind="even" if i % 2 == 0 else "odd",
                created=start + timedelta(days=i),
                metadata={"i": i},
            )
            for i in range(20)
        ]
    )
    assert {hit.key for hit in memory.search("boats", 30, kind="even")} == {str(i) for i in range(0, 20, 2)}
    assert [hit.key for hit in memory.search("boats", 30, metadata={"i": 7})] == ["7"]
    found = memory.search("boats", 30, since=start + timedelta(days=5), until=start + timedelta(days=8))
    assert {hit.key for hit in found} == {"5", "6", "7"}
    with pytest.raises(ValueError, match="time zone"):
        memory.search("boats", since=datetime(2026, 1, 1))


def test_age_brings_records_to_the_cold_tier_and_use_brings_them_back(tmp_path: Path):
    created = datetime(2026, 1, 1, tzinfo=UTC)
    now = created.timestamp() + 100 * DAY
    with Memory.open(tmp_path, budgets=Budgets(hot_bytes=0)) as memory:
        texts = {f"k{i}": lines(10, i) for i in range(200)}
        memory.put_many([Record(key=key, content=text, created=created) for key, text in texts.items()])
        done = memory.compact(now=now)
        assert done.to_cold == 200 and done.dictionaries == ("note",)
        assert memory.stats().by_tier == {"cold": 200}
        assert memory.get("k3").info.tier == "cold" and all(memory.get(key).content == text for key, text in texts.items())
        assert memory.search(texts["k5"][:60], 1)[0].key == "k5"
        assert memory.verify().problems == ()
    with Memory.open(tmp_path, budgets=Budgets(hot_bytes=0)) as memory:  # all were used just now
        done = memory.compact()
        assert done.to_warm == 200 and done.segments_removed == 1 and memory.stats().by_tier == {"warm": 200}
        assert all(memory.get(key).content == text for key, text in texts.items())
        assert memory.verify().problems == ()


def test_what_is_hot_lies_decoded_in_memory(memory: Memory):
    memory.put("often", lines(9))
    for _ in range(5):
        memory.get("often")
    assert memory.compact().hot == 1
    assert memory.get("often").info.tier == "hot" and memory.get("often").content == lines(9)
    memory.put("often", "now another")
    assert memory.get("often").content == "now another" and memory.get("often").info.tier == "warm"


def test_compacting_makes_it_smaller_and_gives_space_back(memory: Memory):
    memory.put_many([Record(key=str(i), content=lines(6, i)) for i in range(1000)])
    before = memory.stats()
    done = memory.compact()
    assert done.encoded_again > 900 and memory.stats().stored_bytes < 0.8 * before.stored_bytes
    assert memory.delete_many([str(i) for i in range(1000) if i % 4 != 1]) == 750
    assert memory.compact().after_bytes < done.after_bytes
    assert memory.get("1").content == lines(6, 1) and memory.verify().problems == ()


def test_an_encrypted_store_shows_nothing_and_takes_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    key, new = Keys.generate(), Keys.generate()
    words = "confidential-word"
    old = datetime(2020, 1, 1, tzinfo=UTC)
    with Memory.open(tmp_path, keys=Keys.from_text(key)) as memory:
        memory.put("warm", f"{words} warm {lines(5)}", metadata={"m": words}, kind=words)
        memory.put("cold", f"{words} cold {lines(5)}", created=old)
        memory.put_many([Record(key=str(i), content=f"{words} {lines(6, i)}") for i in range(150)])
        assert memory.compact().dictionaries == ("note",) and memory.train(model=False).embedder
        assert memory.get("cold").info.tier == "cold" and memory.search(words, 2)
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert words.encode() not in everything and b"INFO worker" not in everything and b"warm" not in everything.replace(b"nbmf", b"")
    for wrong in (None, Keys.from_text(new)):
        with pytest.raises(StorageError) as error:
            Memory.open(tmp_path, keys=wrong)
        assert key not in str(error.value)
    with Memory.open(tmp_path, keys=Keys.from_text(key)) as memory:
        memory.rotate(Keys.from_text(new))
        assert memory.compact().sealed_again == 152
        assert memory.verify().problems == ()
    with Memory.open(tmp_path, keys=Keys.from_text(new)) as memory:
        assert str(memory.get("cold").content).startswith(words) and str(memory.get("warm").content).startswith(words)
        assert memory.parts.records.seal and len(memory.parts.records.seal.epochs) == 1


def test_export_can_be_read_again(memory: Memory, tmp_path: Path):
    memory.put("text", TEXT)
    memory.put("bytes", b"\xff\x00")
    memory.put("json", {"a": 1})
    assert memory.export(tmp_path / "out.jsonl") == 3
    rows = {row["key"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert rows["text"]["content"] == TEXT and rows["json"]["content"] == {"a": 1} and rows["bytes"]["base64"] == "/wA="


def test_another_embedder_than_its_own_is_refused(tmp_path: Path):
    with Memory.open(tmp_path) as memory:
        memory.put("k", TEXT)
        memory.parts.warm.set({"embedder": b"lexical"})
    with pytest.raises(RecipeError, match="finds its records by lexical"):
        Memory.open(tmp_path, embedder="model tiny:llama")


def test_a_reader_sees_what_is_written_meanwhile(memory: Memory):
    with Memory.open(memory.parts.path, readonly=True) as reader:
        assert reader.search("Paris") == []
        memory.put("k", TEXT)
        assert [hit.key for hit in reader.search("Paris")] == ["k"] and reader.get("k").content == TEXT
        memory.delete("k")
        assert reader.search("Paris") == []
    with pytest.raises(StorageError, match="another process"):
        Memory.open(memory.parts.path)


def test_learned_vectors_replace_the_first_ones(memory: Memory):
    draw = random.Random(1)
    words = [[f"{topic}{i}" for i in range(12)] for topic in ("boat", "bread", "stone", "cloud", "violin", "engine")]
    texts = [" ".join(draw.choices(draw.choice(words), k=14)) for _ in range(300)]
    memory.put_many([Record(key=str(i), content=text) for i, text in enumerate(texts)])
    done = memory.train(model=False)
    assert done.embedder and memory.stats().embedder == done.embedder
    hits = memory.search("boat3 boat7", 10)
    assert len(hits) == 10 and all("boat" in str(memory.get(hit.key).content) for hit in hits)
    with Memory.open(memory.parts.path, readonly=True) as reader:
        assert [hit.key for hit in reader.search("boat3 boat7", 10)] == [hit.key for hit in hits]


def test_a_flipped_byte_in_a_cold_block_costs_its_records_and_no_other(tmp_path: Path):
    old = datetime(2020, 1, 1, tzinfo=UTC)
    with Memory.open(tmp_path) as memory:
        memory.put_many([Record(key=str(i), content=random.Random(i).randbytes(9_000), created=old) for i in range(40)])
        memory.compact()
    (segment,) = (tmp_path / "cold").glob("*.seg")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 4
    segment.write_bytes(data)
    with Memory.open(tmp_path) as memory:
        found = memory.verify()
        assert any(segment.name in each and "offset" in each for each in found.problems)
        lost = {str(i) for i in range(40)} - set(memory_readable(memory))
        assert 1 <= len(lost) <= 5 and memory.stats().quarantined == len(lost)
        key = min(lost)
        with pytest.raises(StorageError, match=f"record '{key}'"):
            memory.get(key)
        memory.put(key, "put again")
        assert memory.get(key).content == "put again" and memory.stats().quarantined == len(lost) - 1


def memory_readable(memory: Memory) -> list[str]:
    found: list[str] = []
    for i in range(40):
        try:
            assert memory.get(str(i)).content == random.Random(i).randbytes(9_000)
            found.append(str(i))
        except StorageError:
            pass
    return found


def test_a_gist_keeps_what_a_record_is_about_and_says_so(tmp_path: Path):
    text = "Sales of anchors rose in spring, and fell in autumn. " * 20
    with Memory.open(tmp_path, summarise=lambda texts: ["anchors sold well" for _ in texts]) as memory:
        memory.put("exact", text)
        memory.put("gist", text, fidelity="gist")
        found = memory.get("gist")
        assert not found.exact and found.content == "anchors sold well" and found.info.fidelity == "gist"
        assert found.score is not None and 0 < found.score < 1 and found.info.stored_bytes < 60
        assert {hit.key for hit in memory.search("sales of anchors", 2)} == {"exact", "gist"}
        memory.delete("exact")
        assert memory.put("again", text).same_as is None and memory.get("again").content == text
        with pytest.raises(DataError, match="is bytes"):
            memory.put("b", b"123", fidelity="gist")
        assert memory.compact() and memory.verify().problems == ()
