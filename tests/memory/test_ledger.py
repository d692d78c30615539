"""The ledger: its chain shows what was changed, taken out or put in, and its head how far it had gone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import blake3
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.memory.stores import memory_folder, row

from pantheraml.memory.ledger import (
    CHANGE,
    LIVE,
    PER_BLOCK,
    START,
    Head,
    Marks,
    Tip,
    What,
    pack_blocks,
    pack_change,
    read_chain,
    repair_note,
    unpack_block,
)
from pantheraml.memory.warm import Warm

__all__ = ["memory_folder"]
NOTHING = Tip(0, START, 1)


def chain(*counts: int, note: str = "") -> list[tuple[int, bytes]]:
    """A block or more for each count of changes, of records 1, 2, 3 and so on."""
    blocks, tip, id = [], NOTHING, 1
    for count in counts:
        changes = b"".join(pack_change(What.PUT, id + i, b"tenant--", id + i, bytes([i % 256]) * 16) for i in range(count))
        id += count
        more, tip = pack_blocks(tip, 1_700_000_000_000_000, id, changes, note)
        blocks += more
    return blocks


def test_blocks_are_what_the_format_says():
    """Read with nothing but the description."""
    (first, blob), *_ = blocks = chain(2, 1, note="a note")
    assert first == 1 and blob[:2] == b"L\x01"
    assert int.from_bytes(blob[2:4], "little") == 2 and int.from_bytes(blob[12:20], "little") == 3  # changes, next record
    assert datetime.fromtimestamp(int.from_bytes(blob[4:12], "little") / 1e6, UTC).year == 2023
    change = blob[24 : 24 + 41]
    assert change[0] == 1 and int.from_bytes(change[1:9], "little") == 1 and change[9:17] == b"tenant--"
    assert int.from_bytes(change[17:25], "little", signed=True) == 1 and change[25:41] == bytes(16)
    assert blob[24 + 82 : 24 + 82 + int.from_bytes(blob[20:24], "little")] == b"a note"
    assert blob[-40:-8] == bytes(32)
    hash = blake3.blake3((1).to_bytes(8, "little") + blob[:-8]).digest()
    assert blob[-8:] == hash[:8] and blocks[1][1][-40:-8] == hash


def test_many_changes_are_several_blocks_that_fit_a_page():
    blocks = chain(3 * PER_BLOCK + 5)
    assert [first for first, _ in blocks] == [1, 98, 195, 292]
    assert all(len(blob) + 10 <= 4096 - 35 for _, blob in blocks)
    history = read_chain(blocks)
    assert (history.breaks, history.damaged, len(history.seq)) == ((), (), 296)
    assert history.tip and history.tip.seq == 296 and history.tip.next_id == 297


def test_each_flipped_byte_of_a_block_is_noticed():
    first, blob = chain(3, note="note")[0]
    for i in range(len(blob)):
        assert unpack_block(first, blob[:i] + bytes([blob[i] ^ 1]) + blob[i + 1 :]) is None
    assert unpack_block(first + 1, blob) is None
    for length in range(len(blob)):
        assert unpack_block(first, blob[:length]) is None


def test_what_is_taken_out_put_in_or_put_elsewhere_breaks_the_chain():
    blocks = chain(2, 3, 4, 5)
    assert read_chain(blocks).breaks == ()
    assert read_chain(blocks[:1] + blocks[2:]).breaks == ((3, 6),)
    other = chain(2, 3, 4, 5, note="another past")
    assert read_chain([*blocks[:2], other[2], blocks[3]]).breaks == ((6, 6), (10, 10))
    assert read_chain(blocks[1:]).breaks == ((1, 3),)
    damaged = [blocks[0], (3, blocks[1][1][:-1] + b"?"), *blocks[2:]]
    assert read_chain(damaged).damaged == (3,) and read_chain(damaged).breaks == ((3, 6),)


def test_a_break_that_a_repair_tells_of_is_known():
    blocks = chain(2, 3, 4)
    kept = [blocks[0], blocks[2]]
    history = read_chain(kept)
    assert history.tip
    more, _ = pack_blocks(history.tip, 0, 99, pack_change(What.LOST, 3) + pack_change(What.REPAIR), repair_note(history.breaks, "words"))
    again = read_chain([*kept, *more])
    assert set(again.breaks) == again.told == {(3, 6)}


@given(st.lists(st.tuples(st.sampled_from(sorted(What)), st.integers(0, 5)), max_size=300), st.integers(1, 50))
def test_newest_changes(changes, at_once):
    blocks, tip = [], NOTHING
    for i in range(0, len(changes), at_once):
        part = b"".join(pack_change(what, id) for what, id in changes[i : i + at_once])
        more, tip = pack_blocks(tip, 0, 9, part)
        blocks += more
    seqs, newest = read_chain(blocks).newest()
    expected = {id: (seq, what) for seq, (what, id) in enumerate(changes, 1) if id}
    assert {int(c["id"]): (int(s), What(c["what"])) for s, c in zip(seqs, newest, strict=True)} == expected
    assert newest["id"].tolist() == sorted(expected)


def test_marks_are_keyed_and_apart():
    one, other = Marks(bytes(32)), Marks(bytes(31) + b"\1")
    assert one.key("a", "b") == Marks(bytes(32)).key("a", "b")
    assert len({one.key("a", "b"), other.key("a", "b"), one.key("ab", ""), one.key("", "ab"), one.key("b", "a")}) == 5
    assert len({one.content("a", b"h"), one.content("b", b"h"), other.content("a", b"h")}) == 3
    assert one.tenant("\ud800") and -(2**63) <= one.key("x", "y") < 2**63


def test_head(tmp_path):
    head = Head(tmp_path / "head")
    assert head.read() == "it is not there"
    head.write(Tip(5, bytes(range(32)), 1))
    head.write(Tip(6, bytes(range(1, 33)), 1))
    assert head.read() == (6, bytes(range(1, 33)))
    data = (tmp_path / "head").read_bytes()
    assert len(data) == 64 and data[:4] == b"NBMH" and int.from_bytes(data[8:16], "little") == 6
    assert data[-8:] == blake3.blake3(data[:-8]).digest(8)
    for i in range(64):
        (tmp_path / "head").write_bytes(data[:i] + bytes([data[i] ^ 0x80]) + data[i + 1 :])
        assert head.read() == "its checksum does not hold"
    for length in range(64):
        (tmp_path / "head").write_bytes(data[:length])
        assert isinstance(head.read(), str)


def test_a_store_writes_down_what_is_done(memory_folder: Path):
    with Warm(memory_folder / "s") as store:
        before = store.tip.seq
        store.insert([row(1, tenant="x"), row(2)])
        store.delete([1])
        store.note(What.COMPACT, "segment 3 written")
        changes = list(store.changes(before))
        assert [(each.what, each.id) for each in changes] == [(What.PUT, 1), (What.PUT, 2), (What.DELETE, 1), (What.COMPACT, 0)]
        assert [each.seq for each in changes] == list(range(before + 1, before + 5)) and store.tip.seq == before + 4
        assert changes[0].key == changes[2].key != changes[1].key and changes[0].tenant != changes[1].tenant
        assert changes[3].note == "segment 3 written"
        assert abs((changes[0].time - datetime.now(UTC)).total_seconds()) < 60
        assert store.rows([2])[2].seq == before + 2
        assert list(store.changes(store.tip.seq)) == [] and len(list(store.changes())) == before + 4
    seen = (memory_folder / "s" / "store.db").read_bytes()
    assert b"L\x01" in seen


def test_changes_are_told_from_any_number_on(memory_folder: Path):
    with Warm(memory_folder / "s") as store:
        for start in range(0, 2000, 250):
            store.insert([row(start + i, 10) for i in range(250)])
        all_of_them = [(each.seq, each.id) for each in store.changes()]
        assert [seq for seq, _ in all_of_them] == list(range(1, store.tip.seq + 1))
        for after in (0, 1, 97, 98, 99, 1000, store.tip.seq - 1, store.tip.seq):
            assert [(each.seq, each.id) for each in store.changes(after)] == all_of_them[after:]


def test_live_and_change_agree_with_the_format():
    assert CHANGE.itemsize == 41 and {int(each) for each in LIVE} == {1, 2, 4, 10}
    assert np.frombuffer(pack_change(What.MOVE, 2**40, b"abcdefgh", -5, b"0123456789abcdef"), CHANGE)[0]["key"] == -5


@pytest.mark.parametrize("damage", ["row", "ledger"])
def test_verify_compares_the_records_with_the_ledger(memory_folder: Path, damage):
    with Warm(memory_folder / "s") as store:
        store.insert([row(i) for i in range(1, 4)])
        with store.write() as connection:  # what a mistake of the program could do
            if damage == "row":
                connection.execute("DELETE FROM records WHERE id=2")
            else:
                connection.execute("DELETE FROM ledger WHERE seq=2")
        said = "; ".join(map(str, store.verify()))
        assert ("record 2: it is missing: change 3" in said) if damage == "row" else ("changes 2 to 4 are missing" in said)
