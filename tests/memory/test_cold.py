"""What was appended reads back after any kill; a flipped byte is found, named, and costs the entries of its block; no reader trusts a size."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc

import blake3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pantheraml.errors import StorageError
from pantheraml.memory import segment as segment_file
from pantheraml.memory.cold import Cold, Place
from pantheraml.memory.segment import BLOCK_BYTES, BODY_SUM_BYTES, HEAD_BYTES, HEADER_BYTES


def containers(count: int, size: int = 60, seed: int = 0) -> list[tuple[int, bytes]]:
    rng = random.Random(seed)
    return [(rng.randrange(1 << 40), rng.randbytes(rng.randrange(size))) for _ in range(count)]


def filled(folder, batches: int = 4, each: int = 50):
    """A store of some blocks, and what reads back where."""
    cold = Cold(folder)
    known = {}
    for batch in range(batches):
        entries = containers(each, seed=batch)
        known |= dict(zip(cold.append(entries), entries, strict=True))
    return cold, known


def all_read_back(cold, known) -> bool:
    return all(cold.read(place, id) == container for place, (id, container) in known.items())


@given(st.lists(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=300)), max_size=8), max_size=5))
@settings(max_examples=50, deadline=None)
def test_entries_read_back_here_and_in_another_process(tmp_path_factory, batches):
    folder = tmp_path_factory.mktemp("cold")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pantheraml.memory.cold.BLOCK_BYTES", 200)
        cold, known = Cold(folder, segment_bytes=1000), {}
        for entries in batches:
            known |= dict(zip(cold.append(entries), entries, strict=True))
    assert len(known) == sum(map(len, batches))
    for reader in (cold, Cold(folder, readonly=True), Cold(folder, readonly=True, cache_bytes=0)):
        assert all_read_back(reader, known)
        assert not reader.verify()
    walked = [(block.segment, block.offset, block.ids) for number in cold.segments() for block in cold.blocks(number)]
    assert sum(len(ids) for _, _, ids in walked) == len(known)
    for number, offset, ids in walked:
        for entry, id in enumerate(ids):
            assert known[Place(number, offset, entry)][0] == id


def test_a_segment_can_be_read_by_its_description_alone(tmp_path):
    """A second reader, from the text at the top of segment.py."""
    cold, known = filled(tmp_path)

    def varint(data, at):
        number = shift = 0
        while True:
            byte, at = data[at], at + 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number, at

    data = cold.path(1).read_bytes()
    assert data[:8] == b"NBMF-SEG" and struct.unpack("<II", data[8:16]) == (1, 1)
    assert data[16:24] == blake3.blake3(data[:16]).digest()[:8]
    offset, found = 24, {}
    while offset < len(data):
        magic, length, count, told = struct.unpack("<4sII8s", data[offset : offset + 20])
        assert magic == b"NBMB"
        assert told == blake3.blake3(struct.pack("<IQ", 1, offset) + data[offset : offset + 12]).digest()[:8]
        body = data[offset + 20 : offset + 20 + length]
        assert data[offset + 20 + length : offset + 36 + length] == blake3.blake3(body).digest()[:16]
        at = id = 0
        sizes = []
        for _ in range(count):
            zigzag, at = varint(body, at)
            size, at = varint(body, at)
            id += zigzag // 2 if zigzag % 2 == 0 else -(zigzag + 1) // 2
            sizes.append((id, size))
        for entry, (id, size) in enumerate(sizes):
            found[1, offset, entry] = (id, body[at : at + size])
            at += size
        assert at == length
        offset += 36 + length
    assert found == {tuple(place): entry for place, entry in known.items()}


def test_blocks_are_of_about_their_size_and_a_large_container_has_its_own(tmp_path):
    cold = Cold(tmp_path)
    entries = [(i, bytes(1000)) for i in range(100)] + [(100, bytes(300_000)), (101, b"small")]
    places = cold.append(entries)
    sizes = {block.offset: block.size for block in cold.blocks(1)}
    assert len(sizes) == 100_000 // BLOCK_BYTES + 1 + 2
    assert sum(place.offset == places[100].offset for place in places) == 1
    assert max(size for offset, size in sizes.items() if offset != places[100].offset) < BLOCK_BYTES + 1000
    # A record of 100 bytes costs about three more.
    overhead = cold.size_bytes(1) - sum(len(container) for _, container in entries)
    assert overhead < 102 * 5 + len(sizes) * (HEAD_BYTES + BODY_SUM_BYTES) + HEADER_BYTES


def test_segments_are_ended_at_their_size_and_numbers_never_come_back(tmp_path):
    cold = Cold(tmp_path, segment_bytes=10_000)
    places = [cold.append([(i, bytes(4000))])[0] for i in range(9)]
    assert [place.segment for place in places] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    cold.start_segment()
    assert cold.append([(9, b"x")])[0].segment == 4
    cold.remove([4, 3])
    assert cold.append([(10, b"x")])[0].segment == 5
    assert cold.segments() == [1, 2, 5]
    big = Cold(tmp_path, segment_bytes=10_000).append([(i, bytes(4000)) for i in range(20, 40)])
    assert len({place.segment for place in big}) > 1


def test_appending_goes_on_where_the_last_process_ended(tmp_path):
    _, known = filled(tmp_path)
    size = (tmp_path / "000001.seg").stat().st_size
    again = Cold(tmp_path)
    place = again.append([(7, b"seven")])[0]
    assert place == (1, size, 0) and again.read(place, 7) == b"seven"
    assert all_read_back(again, known)


def test_a_place_of_another_record_is_refused(tmp_path):
    cold, known = filled(tmp_path)
    place, (id, _) = next(iter(known.items()))
    for wrong, said in (
        (place._replace(entry=1), "should be record"),
        (place._replace(entry=999), "none of its 50 entries"),
        (place._replace(entry=-1), "none of its 50 entries"),
        (place._replace(offset=25), "does not fit its checksum"),
        (place._replace(offset=1 << 40), "the file ends"),
        (place._replace(segment=9), "No such file"),
    ):
        with pytest.raises(StorageError) as refused:
            cold.read(wrong, id)
        assert said in str(refused.value) and str(cold.path(wrong.segment)) in str(refused.value)


# Damage.


def test_every_flipped_byte_is_found_named_and_costs_its_block_only(tmp_path):
    cold, known = filled(tmp_path, batches=4, each=8)
    path = cold.path(1)
    data = path.read_bytes()
    offsets = sorted({place.offset for place in known})
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes((data[at] ^ (1 << at % 8),)) + data[at + 1 :])
        reader = Cold(tmp_path, readonly=True)
        (wrong,) = reader.verify()
        hit = max((offset for offset in offsets if offset <= at), default=0)
        assert (wrong.segment, wrong.offset) == (1, hit)
        lost = {place for place, (id, container) in known.items() if not _reads(reader, place, id, container)}
        assert lost == {place for place in known if place.offset == hit}
    path.write_bytes(data)
    assert not cold.verify()


def _reads(reader, place, id, container) -> bool:
    try:
        return reader.read(place, id) == container
    except StorageError as error:
        assert f"offset {place.offset:,}" in str(error) and str(reader.path(place.segment)) in str(error)
        return False


def test_a_block_that_is_not_where_it_was_written_is_refused(tmp_path):
    """Blocks moved within a file, and files exchanged: every byte is sound, and nothing is where rows say."""
    cold = Cold(tmp_path)
    one, two = (cold.append([(1, b"same size %d" % i)])[0] for i in range(2))
    data = cold.path(1).read_bytes()
    path, end = cold.path(1), two.offset
    path.write_bytes(data[: one.offset] + data[end:] + data[one.offset : end])
    reader = Cold(tmp_path, readonly=True)
    assert [block.offset for block in reader.verify()] == [one.offset]  # one stretch, as no block there knows its end
    path.write_bytes(data)
    cold.path(2).write_bytes(data)
    assert [(block.segment, block.offset) for block in Cold(tmp_path, readonly=True).verify()] == [(2, 0), (2, HEADER_BYTES)]


def test_a_damaged_file_is_not_written_on_and_nothing_of_it_is_cut_off(tmp_path):
    cold, known = filled(tmp_path)
    path = cold.path(1)
    data = path.read_bytes()
    last = max(place.offset for place in known)
    for at in (3, last + 5, last + 40):
        damaged = data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]
        path.write_bytes(damaged)
        said: list[str] = []
        writer = Cold(tmp_path, announce=said.append)
        assert writer.append([(5, b"five")])[0].segment == 2
        assert path.read_bytes() == damaged
        assert len(said) == 1 and "not written on" in said[0] and str(path) in said[0]
        writer.remove([2])


@given(st.binary(max_size=300), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_any_bytes_behind_the_last_block_leave_the_others_readable(tmp_path_factory, rest, batches):
    folder = tmp_path_factory.mktemp("cold")
    _, known = filled(folder, batches=batches, each=3)
    path = folder / "000001.seg"
    path.write_bytes((path.read_bytes() if path.exists() else b"") + rest)
    for cold in (Cold(folder, readonly=True), Cold(folder, announce=lambda _: None)):
        assert all_read_back(cold, known)
        cold.verify()
    place = cold.append([(1, b"new")])[0]
    assert Cold(folder, readonly=True).read(place, 1) == b"new"


def test_sizes_are_not_believed(tmp_path):
    """Heads with sound checksums that promise gigabytes, and bodies whose tables do: a reader takes no more than the file has."""
    cold, known = filled(tmp_path)
    path = cold.path(1)
    data = path.read_bytes()
    last = max(place.offset for place in known)

    def block(length: int, count: int, body: bytes) -> bytes:
        head = b"NBMB" + struct.pack("<II", length, count)
        return head + blake3.blake3(struct.pack("<IQ", 1, last) + head).digest(8) + body + blake3.blake3(body).digest(16)

    huge = b"\x00" + b"\xff" * 8 + b"\x7f"
    for forged in (
        block(0xFFFFFFF0, 1, b"abc"),
        block(3, 0xFFFFFFFF, b"abc"),
        block(len(huge), 1, huge),
        block(12, 1, b"\x00" + b"\xff" * 11),
        block(4, 1, b"\x00\x01ab"),
    ):
        path.write_bytes(data[:last] + forged)
        tracemalloc.start()
        with pytest.raises(StorageError):
            Cold(tmp_path, readonly=True).read((1, last, 0), 1)
        assert len(Cold(tmp_path, readonly=True).verify()) == 1
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
        tracemalloc.stop()


# Kills.


def test_a_block_cut_anywhere_is_cut_off_by_the_next_writer_alone(tmp_path):
    cold, known = filled(tmp_path, batches=2, each=8)
    path = cold.path(1)
    data = path.read_bytes()
    last = max(place.offset for place in known)
    whole = {place: entry for place, entry in known.items() if place.offset < last}
    for end in range(len(data)):
        path.write_bytes(data[:end])
        Cold(tmp_path, readonly=True).verify()
        assert path.stat().st_size == end
        said: list[str] = []
        writer = Cold(tmp_path, announce=said.append)
        kept = path.stat().st_size if path.exists() else 0
        assert kept == max([0, *(each for each in (HEADER_BYTES, last) if each <= end)])
        assert len(said) == (kept != end)
        if kept == last:
            assert all_read_back(writer, whole)
        assert not writer.verify()
        place = writer.append([(1, b"new")])[0]
        assert writer.read(place, 1) == b"new"


def test_blocks_without_content_after_a_power_cut_are_cut_off_where_no_row_points_at_them(tmp_path):
    cold, known = filled(tmp_path, batches=3)
    path = cold.path(1)
    data = path.read_bytes()
    offsets = sorted({place.offset for place in known})
    path.write_bytes(data[: offsets[1] + 30] + bytes(len(data) - offsets[1] - 30))
    asked = []

    def used_from(segment: int, offset: int) -> bool:
        asked.append((segment, offset))
        return offset <= offsets[0]

    Cold(tmp_path, used_from=used_from, announce=lambda _: None)
    assert path.stat().st_size == offsets[1] and asked[-1] == (1, offsets[1])
    path.write_bytes(data[: offsets[1] + 30] + bytes(len(data) - offsets[1] - 30))
    Cold(tmp_path, used_from=lambda segment, offset: True, announce=lambda _: None)
    assert path.stat().st_size == len(data)


KILLED = """
import sys, pathlib
sys.path.insert(0, {tests!r})
from pantheraml.memory.cold import Cold
from tests.memory.test_cold import containers
cold = Cold(pathlib.Path(sys.argv[1]), segment_bytes=20_000)
seed = int(sys.argv[2])
while True:
    entries = containers(30, size=400, seed=seed)
    places = cold.append(entries)
    print(seed, " ".join(f"{{s}},{{o}},{{e}}" for s, o, e in places), flush=True)
    seed += 1
"""


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_kill(tmp_path):
    root = str(__file__).rsplit("/tests/", 1)[0]
    known, seed, rng = {}, 0, random.Random(0)
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED.format(tests=root), str(tmp_path), str(seed)], stdout=subprocess.PIPE, text=True
        )
        first = child.stdout.readline()
        time.sleep(rng.random() * 0.05)
        os.kill(child.pid, signal.SIGKILL)
        lines = [first, *child.communicate()[0].splitlines(keepends=True)]
        for line in lines:
            if line.endswith("\n") and line.strip():
                number, *places = line.split()
                seed = int(number) + 1
                for place, entry in zip(places, containers(30, size=400, seed=int(number)), strict=True):
                    known[Place(*map(int, place.split(",")))] = entry
        cold = Cold(tmp_path, segment_bytes=20_000, announce=lambda _: None)
        assert all_read_back(cold, known) and not cold.verify()
        seed += 1  # what was written and not told keeps its place
    assert len(known) >= 8 * 30


class Rows:
    """A stand-in for the database: places of records, changed all at once."""

    def __init__(self, places: dict[int, tuple[Place, bytes]]) -> None:
        self.places = places


def compact(cold: Cold, rows: Rows, worn: list[int], kill_before: int) -> None:
    """The order that cold.py prescribes, up to a step."""
    steps = [cold.start_segment]
    moved: dict[int, tuple[Place, bytes]] = {}

    def copy() -> None:
        alive = [(id, cold.read(place, id)) for id, (place, _) in rows.places.items() if place.segment in worn]
        for (id, container), place in zip(alive, cold.append(alive), strict=True):
            moved[id] = place, container

    def switch() -> None:
        rows.places = rows.places | moved

    steps += [copy, switch, lambda: cold.remove(worn)]
    for step in steps[:kill_before]:
        step()


@pytest.mark.parametrize("kill_before", range(5))
def test_a_compaction_that_is_killed_at_any_step_loses_nothing(tmp_path, kill_before):
    cold = Cold(tmp_path, segment_bytes=2000)
    entries = dict(containers(200))
    rows = Rows({id: (place, entries[id]) for id, place in zip(entries, cold.append(list(entries.items())), strict=True)})
    for id in list(entries)[::2]:
        del rows.places[id]
    worn = cold.segments()[:-1]
    compact(cold, rows, worn, kill_before)
    again = Cold(tmp_path, segment_bytes=2000)
    assert all(again.read(place, id) == container for id, (place, container) in rows.places.items())
    assert not again.verify()
    # The next compaction finds what nobody points at.
    pointed = {place.segment for place, _ in rows.places.values()}
    again.remove([number for number in again.segments() if number not in pointed])
    assert all(again.read(place, id) == container for id, (place, container) in rows.places.items())
    assert set(again.segments()) == pointed


def test_a_reader_is_told_that_a_segment_is_gone(tmp_path):
    cold, known = filled(tmp_path)
    reader = Cold(tmp_path, readonly=True)
    place, (id, container) = next(iter(known.items()))
    assert reader.read(place, id) == container
    cold.remove([1])
    other = next(each for each in known if each.offset != place.offset)
    with pytest.raises(StorageError, match=r"000001\.seg"):
        reader.read(other, known[other][0])
    with pytest.raises(StorageError, match=r"000001\.seg"):
        cold.read(place, id)  # whoever removed it does not read it from memory either


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path, monkeypatch):
    cold, known = filled(tmp_path)
    size = cold.size_bytes(1)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pantheraml.memory.cold.os.fsync", full)
    with pytest.raises(StorageError) as refused:
        cold.append(containers(10, seed=9))
    assert "No space left" in str(refused.value) and "make room" in str(refused.value)
    monkeypatch.undo()
    assert cold.size_bytes(1) == size and cold.segments() == [1]
    assert cold.append([(1, b"x")])[0].segment == 2  # nobody knows what the disk has of the other
    assert all_read_back(cold, known) and not cold.verify()


def test_reading_is_bounded_and_kept_in_memory_for_a_while(tmp_path, monkeypatch):
    cold, known = filled(tmp_path, batches=40)
    reads = []
    real = segment_file.read_block
    monkeypatch.setattr("pantheraml.memory.cold.read_block", lambda *args: reads.append(args[2]) or real(*args))
    place, (id, _) = next(iter(known.items()))
    for _ in range(5):
        cold.read(place, id)
    assert reads == [place.offset]
    small = Cold(tmp_path, readonly=True, cache_bytes=20_000)
    assert all_read_back(small, known)
    assert 0 < small._cached <= 20_000
    assert small._cached == sum(sum(len(container) + 120 for _, container in block) for block in small._cache.values())


def test_many_threads_read_while_one_appends(tmp_path):
    cold, known = filled(tmp_path)
    places, wrong = dict(known), []

    def read(seed):
        rng = random.Random(seed)
        for _ in range(200):
            place, (id, container) = rng.choice(list(places.items()))
            if cold.read(place, id) != container:
                wrong.append(place)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for batch in range(10):
        entries = containers(20, seed=100 + batch)
        added = dict(zip(cold.append(entries), entries, strict=True))
        places = {**places, **added}
    for thread in threads:
        thread.join()
    assert not wrong and all_read_back(cold, places)


def test_what_is_read_only_is_not_written(tmp_path):
    folder = tmp_path / "not there"
    cold = Cold(folder, readonly=True)
    assert cold.segments() == [] and cold.verify() == [] and not folder.exists()
    with pytest.raises(ValueError, match="to be read"):
        cold.append([(1, b"x")])
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        Cold(tmp_path / "file")
