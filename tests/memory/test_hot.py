"""Searches find what comparing every vector by hand finds, one tenant's only, whatever is filtered, deleted, saved or going on meanwhile."""

from __future__ import annotations

import json
import random
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pantheraml.errors import StorageError
from pantheraml.memory import columns as columns_file
from pantheraml.memory import hot as hot_file
from pantheraml.memory.columns import Entry, Serials, signs, tags_of
from pantheraml.memory.features import unit
from pantheraml.memory.hot import Hot
from pantheraml.memory.index import MANIFEST, load_index, save_index
from pantheraml.memory.quantise import decode, encode

D = 64


def vectors_of(count: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around some directions, as those of texts are."""
    rng = np.random.default_rng(seed)
    middles = rng.standard_normal((30, D))
    return unit((middles[rng.integers(0, 30, count)] + 0.8 * rng.standard_normal((count, D))).astype(np.float32))


def entry_of(id: int, tenant: str = "a", kind: str = "note", created: int = 0, **metadata) -> Entry:
    return Entry(id=id, tenant=tenant, kind=kind, created=created, metadata=metadata)


def some_entries(count: int) -> list[Entry]:
    """Three tenants, four kinds, rising times, and metadata on every second."""
    return [
        entry_of(i + 1, "abc"[i % 3], f"kind{i % 4}", i * 10, **({"page": i % 5, "tags": ["x", i % 2]} if i % 2 else {}))
        for i in range(count)
    ]


class ByHand:
    """What an index should say: a dictionary, and a product with every vector."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[Entry, np.ndarray]] = {}

    def add(self, entries, vectors):
        stored = decode(encode(unit(vectors), "int8"))
        self.rows |= {entry.id: (entry, vector) for entry, vector in zip(entries, stored, strict=True)}

    def search(self, query, k, *, tenant, kind=None, metadata=None, since=None, until=None):
        found = []
        for entry, vector in self.rows.values():
            if (
                entry.tenant == tenant
                and (kind is None or entry.kind == kind)
                and all(name in entry.metadata and entry.metadata[name] == value for name, value in (metadata or {}).items())
                and (since is None or entry.created >= since)
                and (until is None or entry.created < until)
            ):
                found.append((-float(vector @ query), entry.id))
        return [(id, -score) for score, id in sorted(found)[:k]]


def same(found, expected) -> bool:
    """Equal but for the order of scores that are equal to rounding."""
    if len(found) != len(expected):
        return False
    scores = [score for _, score in expected]
    return np.allclose(found.scores, scores, atol=2e-5) and all(
        id == mine or abs(score - theirs) < 2e-5
        for (id, score), mine, theirs in zip(expected, found.ids.tolist(), found.scores.tolist(), strict=True)
    )


FILTERS = [
    {},
    {"kind": "kind1"},
    {"metadata": {"page": 3}},
    {"metadata": {"page": 3, "tags": ["x", 1]}},
    {"since": 500, "until": 900},
    {"kind": "kind3", "since": 100, "metadata": {"tags": ["x", 1]}},
    {"kind": "no such kind"},
    {"metadata": {"no such": 1}},
]


@pytest.fixture(scope="module")
def filled():
    hot, by_hand = Hot(D), ByHand()
    entries, vectors = some_entries(400), vectors_of(400)
    hot.add(entries, vectors)
    by_hand.add(entries, vectors)
    return hot, by_hand


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_search_finds_what_comparing_by_hand_finds(filled, filters):
    hot, by_hand = filled
    for query in vectors_of(10, seed=1):
        for tenant in ("a", "b", "c", "nobody"):
            for k in (1, 7, 500):
                found = hot.search(query, k, tenant=tenant, **filters)
                assert same(found, by_hand.search(query, k, tenant=tenant, **filters))


def test_a_tenant_must_be_named(filled):
    with pytest.raises(TypeError, match="tenant"):
        filled[0].search(vectors_of(1)[0], 5)  # type: ignore[call-arg]


def test_queries_that_make_no_sense_are_refused(filled):
    for query, k in ((np.zeros(3, np.float32), 1), (np.full(D, np.nan, np.float32), 1), (np.ones(D, np.float32), 0)):
        with pytest.raises(ValueError, match="a query is"):
            filled[0].search(query, k, tenant="a")
    with pytest.raises(ValueError, match="take int8 codes"):
        filled[0].add([entry_of(1)], encode(np.ones((1, D), np.float32), "binary"))
    with pytest.raises(ValueError, match="take int8 codes"):
        filled[0].add([entry_of(1)], np.ones((2, D), np.float32))


def test_a_query_of_zeros_finds_k_records_all_the_same(filled):
    found = filled[0].search(np.zeros(D, np.float32), 4, tenant="a")
    assert found.ids.tolist() == [1, 4, 7, 10] and not found.scores.any()


def test_vectors_and_their_codes_are_the_same_thing():
    one, other, vectors = Hot(D), Hot(D), vectors_of(50)
    entries = [entry_of(i) for i in range(50)]
    one.add(entries, vectors * 3)
    other.add(entries, encode(vectors, "int8"))
    assert one.search(vectors[3], 5, tenant="a").ids.tolist() == other.search(vectors[3], 5, tenant="a").ids.tolist()


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        ("1", 1, False),
        (None, "null", False),
        ({"a": 1, "b": [2.0]}, {"b": [2], "a": 1.0}, True),
        ([1, 2], [2, 1], False),
        (1e300, 10**300, False),
        ("\ud800", "\ud800", True),
    ],
)
def test_metadata_is_equal_as_json_is(one, other, equal):
    assert (tags_of({"name": one}) == tags_of({"name": other})) is equal


def test_names_and_values_of_metadata_are_kept_apart():
    assert len({tags_of({"a": "b"}), tags_of({"b": "a"}), tags_of({"ab": ""}), tags_of({"": "ab"}), tags_of({'a"': "b"})}) == 5
    assert tags_of({}) == ()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(1, 40), min_size=1, max_size=12), st.sampled_from("ab")),
        st.tuples(st.just("remove"), st.lists(st.integers(1, 40), max_size=12), st.none()),
        st.tuples(st.just("save"), st.just(()), st.none()),
        st.tuples(st.just("catch up"), st.just(()), st.none()),
    ),
    max_size=25,
)


@given(STEPS, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_any_order_of_changes_leaves_what_a_dictionary_has(tmp_path_factory, steps, seed):
    """With blocks of eight rows, graphs from five rows on, and everything saved and loaded in between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_file, "BLOCK_ROWS", 8)
        patch.setattr(hot_file, "BEHIND", 0)
        patch.setattr(hot_file, "COMPARE_ALL", 10)
        patch.setattr(hot_file, "SHORTLIST", 10)
        patch.setattr(hot_file, "_PER_HIT", 10)
        folder, rng = tmp_path_factory.mktemp("index"), np.random.default_rng(seed)
        hot, by_hand = Hot(D, graph_from=5), ByHand()
        for deed, ids, tenant in steps:
            if deed == "add":
                entries = [entry_of(id, tenant, f"kind{id % 2}", id, even=id % 2 == 0) for id in ids]
                vectors = rng.standard_normal((len(ids), D)).astype(np.float32)
                hot.add(entries, vectors)
                by_hand.add(entries, vectors)
            elif deed == "remove":
                assert hot.remove(ids) == len({id for id in ids if by_hand.rows.pop(id, None)})
            elif deed == "catch up":
                hot.catch_up()
            else:
                save_index(hot, folder, stamp=str(seed))
                hot = Hot(D, graph_from=5)
                assert load_index(hot, folder) == str(seed)
            assert len(hot) == len(by_hand.rows)
        query = unit(rng.standard_normal((1, D)).astype(np.float32))[0]
        for each in "ab":
            assert hot.count(each) == sum(entry.tenant == each for entry, _ in by_hand.rows.values())
            for filters in ({}, {"kind": "kind1"}, {"metadata": {"even": True}}):
                for k in (3, 100):
                    exact = hot.search(query, k, tenant=each, exact=True, **filters)
                    expected = by_hand.search(query, k, tenant=each, **filters)
                    assert same(exact, expected)
                    # What is approximate is of this tenant, fits, and is as many.
                    found = hot.search(query, k, tenant=each, **filters)
                    every = {id for id, _ in by_hand.search(query, 1000, tenant=each, **filters)}
                    assert len(found) == len(expected) and set(found.ids.tolist()) <= every
        assert all((id in hot) is (id in by_hand.rows) for id in range(45))


def test_of_two_entries_with_one_id_the_last_counts():
    hot, vectors = Hot(D), vectors_of(2)
    hot.add([entry_of(1, "a"), entry_of(1, "b")], vectors)
    assert (len(hot), hot.count("a"), hot.count("b")) == (1, 0, 1)
    hot.add([entry_of(1, "a")], vectors[:1])
    assert (len(hot), hot.count("a"), hot.count("b")) == (1, 1, 0)


def test_ids_need_not_rise():
    hot, ids = Hot(D), random.Random(0).sample(range(1 << 40), 6000)
    vectors = vectors_of(6000)
    for begin in range(0, 6000, 500):
        hot.add([entry_of(id) for id in ids[begin : begin + 500]], vectors[begin : begin + 500])
    assert hot.remove(ids[::3]) == 2000 and len(hot) == 4000
    assert all((id in hot) is (i % 3 != 0) for i, id in enumerate(ids[:300]))


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 30), max_size=5)), max_size=20))
@settings(max_examples=50, deadline=None)
def test_serials_are_a_dictionary(steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_file, "_RECENT", 3)
        serials, by_hand, number = Serials(), {}, 0
        for put, ids in steps:
            ids = list(dict.fromkeys(ids))
            if put:
                values = list(range(number, number + len(ids)))
                number += len(ids)
                serials.put(np.array(ids, np.int64), np.array(values, np.int64))
                by_hand |= dict(zip(ids, values, strict=True))
            else:
                serials.drop(np.array(ids, np.int64))
                by_hand = {id: value for id, value in by_hand.items() if id not in ids}
        assert serials.get(np.arange(31)).tolist() == [by_hand.get(id, -1) for id in range(31)]


def test_signs_are_packed_bit_by_bit():
    vectors = np.random.default_rng(0).standard_normal((5, 100)).astype(np.float32)
    packed = signs(vectors)
    assert packed.shape == (2, 5)
    for i, vector in enumerate(vectors):
        for j in range(5):
            different = sum(bin(int(packed[w, i]) ^ int(packed[w, j])).count("1") for w in range(2))
            assert different == int(((vector > 0) != (vectors[j] > 0)).sum())


# Many rows.


@pytest.fixture(scope="module")
def many():
    """Enough for several blocks of 2,000 rows, and a graph for one of two tenants."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_file, "BLOCK_ROWS", 2000)
        hot, by_hand = Hot(D, graph_from=6000), ByHand()
        entries = [entry_of(i + 1, "big" if i % 4 else "small", f"kind{i % 50}", i, rare=i % 997) for i in range(9000)]
        vectors = vectors_of(9000)
        hot.add(entries, vectors)
        by_hand.add(entries, vectors)
        patch.setattr(hot_file, "COMPARE_ALL", 1000)
        yield hot, by_hand


def overlap(found, expected) -> float:
    return len({id for id, _ in expected} & set(found.ids.tolist())) / max(1, len(expected))


def test_sorting_out_by_signs_hardly_loses_anything(many):
    hot, by_hand = many
    queries = vectors_of(30, seed=2)
    shares = [overlap(hot.search(q, 10, tenant="small"), by_hand.search(q, 10, tenant="small")) for q in queries]
    assert np.mean(shares) > 0.95


def test_a_graph_finds_the_near_ones_and_filters_never_make_results_fewer(many):
    hot, by_hand = many
    assert hot.behind() == 0  # 6,750 rows are less than BEHIND, so nobody would build one for them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hot_file, "BEHIND", 0)
        assert hot.behind() == 6750
        hot.catch_up()
        assert hot.behind() == 0
    assert list(hot.graphs) == [hot.tenants["big"]]
    assert len(hot.graphs[hot.tenants["big"]]) == 6750
    shares = []
    for query in vectors_of(30, seed=3):
        shares.append(overlap(hot.search(query, 10, tenant="big"), by_hand.search(query, 10, tenant="big")))
        for filters in ({"kind": "kind7"}, {"metadata": {"rare": 5}}, {"since": 8990}, {"kind": "kind7", "until": 500}):
            found, expected = (each.search(query, 10, tenant="big", **filters) for each in (hot, by_hand))
            assert len(found) == len(expected)
            every = {id for id, _ in by_hand.search(query, 9000, tenant="big", **filters)}
            assert set(found.ids.tolist()) <= every
            if len(every) < 60:
                assert same(found, expected)
    assert np.mean(shares) > 0.95


def test_what_came_after_the_graph_is_found_and_what_went_is_not(many):
    hot, by_hand = many
    assert hot.graphs
    new = vectors_of(3, seed=4)
    hot.add([entry_of(20_000 + i, "big") for i in range(3)], new)
    for i in range(3):
        assert hot.search(new[i], 1, tenant="big").ids.tolist() == [20_000 + i]
        assert 20_000 + i not in hot.search(new[i], 50, tenant="small").ids
    old = by_hand.rows[2][1]
    assert hot.search(old, 1, tenant="big").ids.tolist() == [2]
    hot.remove([2])
    assert 2 not in hot.search(old, 50, tenant="big").ids
    hot.add([entry_of(3, "big")], -by_hand.rows[3][1][None])  # replaced by what points the other way
    found = hot.search(by_hand.rows[3][1], 50, tenant="big")
    assert 3 not in found.ids and len(np.unique(found.ids)) == 50
    hot.remove([20_000, 20_001, 20_002])
    hot.add([by_hand.rows[i][0] for i in (2, 3)], np.stack([by_hand.rows[i][1] for i in (2, 3)]))


def test_a_graph_of_mostly_deleted_rows_is_built_anew():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hot_file, "BEHIND", 0)
        hot, vectors = Hot(D, graph_from=100), vectors_of(600)
        hot.add([entry_of(i) for i in range(600)], vectors)
        hot.catch_up()
        first = hot.graphs[0]
        hot.remove(range(300))
        assert hot.behind() == 300
        assert len(hot.search(vectors[5], 40, tenant="a")) == 40
        hot.catch_up()
        assert hot.graphs[0] is not first and len(hot.graphs[0]) == 300
        assert hot.search(vectors[400], 1, tenant="a").ids.tolist() == [400]


def test_building_can_be_stopped_and_taken_up():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hot_file, "BEHIND", 0)
        patch.setattr(hot_file, "_STEP", 50)
        hot, vectors, asked = Hot(D, graph_from=100), vectors_of(400), []
        hot.add([entry_of(i) for i in range(400)], vectors)

        def stop():
            asked.append(1)
            return len(asked) > 3

        hot.catch_up(stop=stop)
        assert 0 < len(hot.graphs[0]) < 400
        assert hot.search(vectors[399], 1, tenant="a").ids.tolist() == [399]
        hot.catch_up()
        assert len(hot.graphs[0]) == 400


def test_vectors_of_zeros_are_found_last_with_and_without_a_graph():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hot_file, "BEHIND", 0)
        hot, vectors = Hot(D, graph_from=10), np.abs(vectors_of(60))
        vectors[::7] = 0
        hot.add([entry_of(i) for i in range(60)], vectors)
        before = hot.search(np.ones(D, np.float32), 60, tenant="a")
        hot.catch_up()
        assert len(hot.graphs[0]) == 60 - len(range(0, 60, 7))
        after = hot.search(np.ones(D, np.float32), 60, tenant="a")
        assert before.ids.tolist() == after.ids.tolist()
        assert set(after.ids[-9:].tolist()) == set(range(0, 60, 7))


def test_without_usearch_everything_is_compared_and_that_is_said_once(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "usearch.index", None)
    monkeypatch.setattr(hot_file, "BEHIND", 0)
    said: list[str] = []
    hot, vectors = Hot(D, graph_from=10, announce=said.append), vectors_of(50)
    hot.add([entry_of(i) for i in range(50)], vectors)
    hot.catch_up()
    hot.catch_up()
    assert not hot.graphs and len(said) == 1 and 'pip install "pantheraml[memory]"' in said[0]
    assert hot.search(vectors[7], 1, tenant="a").ids.tolist() == [7]


def test_a_device_finds_what_the_host_finds(many):
    from pantheraml.hardware.find import find
    from pantheraml.memory.scan import Scan
    from pantheraml.recipe.types import HardwareAsk

    hot, by_hand = many
    device = find(HardwareAsk(kind="cpu"), training=False).device
    other = Hot(D, graph_from=None, scan=Scan(device))
    other.restore(hot.blocks, {}, list(hot.tenants), list(hot.kinds), hot.next_serial)
    for query in vectors_of(10, seed=5):
        for filters in ({}, {"kind": "kind7"}):
            found = other.search(query, 10, tenant="big", **filters)
            assert same(found, by_hand.search(query, 10, tenant="big", **filters))
    other.add([entry_of(30_000, "big")], vectors_of(1, seed=6))
    assert other.search(vectors_of(1, seed=6)[0], 1, tenant="big").ids.tolist() == [30_000]
    other.remove([30_000])


def test_readers_are_right_while_one_writes():
    """They never see another tenant's record, nor fewer than there must be, and what is never touched is always found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_file, "BLOCK_ROWS", 256)
        patch.setattr(hot_file, "BEHIND", 50)
        hot, vectors = Hot(D, graph_from=200), vectors_of(3000)
        still = [entry_of(i, "a") for i in range(300)]
        hot.add(still, vectors[:300])
        wrong: list[str] = []
        over = threading.Event()

        def read(seed):
            rng = np.random.default_rng(seed)
            while not over.is_set():
                i = int(rng.integers(0, 300))
                found = hot.search(vectors[i], 20, tenant="a")
                if i not in found.ids or len(found) < 20 or len(set(found.ids.tolist())) < 20 or any(id >= 10_000 for id in found.ids):
                    wrong.append(f"{i}: {found.ids}")

        readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        builder = threading.Thread(target=lambda: [hot.catch_up() for _ in iter(lambda: over.wait(0.01), True)])
        for thread in (*readers, builder):
            thread.start()
        for round in range(20):
            mine = [entry_of(300 + i, "a") for i in range(100)]
            hot.add(mine, vectors[300 + round * 100 : 400 + round * 100])
            hot.add([entry_of(10_000 + round * 100 + i, "b") for i in range(100)], vectors[300:400])
            hot.remove([300 + i for i in range(0, 100, 2)])
        over.set()
        for thread in (*readers, builder):
            thread.join()
        assert not wrong
        assert hot.graphs


def test_a_record_that_is_replaced_again_and_again_is_always_found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_file, "BLOCK_ROWS", 64)
        hot, vectors = Hot(D, graph_from=None), vectors_of(30)
        hot.add([entry_of(i) for i in range(30)], vectors)
        over, missed = threading.Event(), []

        def read():
            while not over.is_set():
                found = hot.search(vectors[7], 30, tenant="a")
                if sorted(found.ids.tolist()) != list(range(30)):
                    missed.append(found.ids.tolist())

        readers = [threading.Thread(target=read) for _ in range(2)]
        for thread in readers:
            thread.start()
        for _ in range(600):
            hot.add([entry_of(7)], vectors[7:8])
        over.set()
        for thread in readers:
            thread.join()
        assert not missed


def test_memory_is_that_of_the_rows():
    hot, count = Hot(256, graph_from=None), 20_000
    rows = np.random.default_rng(0).integers(-127, 128, (count, 256), dtype=np.int8)
    codes = encode(np.ones((1, 256), np.float32), "int8")
    codes = type(codes)("int8", np.ones(count, np.float32), rows)
    hot.add([entry_of(i, page=i % 3) for i in range(count)], codes)
    assert hot.memory_bytes / count < 400
    held = sum(getattr(block, name).nbytes for block in hot.blocks for name in ("code", "bits", "scale", "serial", "id", "created"))
    assert held == sum(block.capacity for block in hot.blocks) * (256 + 32 + 4 + 24)


# On disk.


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


@pytest.fixture
def saved(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_file, "BLOCK_ROWS", 100)
        patch.setattr(hot_file, "BEHIND", 0)
        hot = Hot(D, graph_from=100)
        hot.add(some_entries(390), vectors_of(390))
        hot.remove(range(1, 40))
        hot.catch_up()
        save_index(hot, tmp_path, stamp="seq 7")
        yield hot, tmp_path


def test_what_was_saved_is_what_is_loaded(saved):
    hot, folder = saved
    again = Hot(D, graph_from=100)
    assert load_index(again, folder) == "seq 7"
    assert len(again.graphs) == len(hot.graphs) == 3
    for query in vectors_of(5, seed=1):
        for filters in FILTERS:
            one, other = (each.search(query, 9, tenant="b", **filters) for each in (hot, again))
            assert one.ids.tolist() == other.ids.tolist() and one.scores.tolist() == other.scores.tolist()
    again.add([entry_of(1000, "b")], vectors_of(1, seed=8))
    again.catch_up()  # a graph that was mapped takes up more all the same
    assert again.search(vectors_of(1, seed=8)[0], 1, tenant="b").ids.tolist() == [1000]


def test_a_mapped_graph_can_be_saved_elsewhere_and_lose_its_file(saved, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(hot_file, "BEHIND", 0)
    hot, folder = saved
    again, elsewhere = Hot(D, graph_from=100), tmp_path_factory.mktemp("elsewhere")
    load_index(again, folder)
    save_index(again, elsewhere, stamp="seq 7")
    third = Hot(D, graph_from=100)
    assert load_index(third, elsewhere) == "seq 7"
    for path in elsewhere.iterdir():
        path.unlink()
    query = vectors_of(1, seed=1)[0]
    assert third.search(query, 9, tenant="b").ids.tolist() == hot.search(query, 9, tenant="b").ids.tolist()
    third.add([entry_of(1000, "b")], vectors_of(1, seed=8))
    third.catch_up()
    assert third.behind() == 0
    assert third.search(vectors_of(1, seed=8)[0], 1, tenant="b").ids.tolist() == [1000]


def test_only_what_changed_is_written_again(saved):
    hot, folder = saved
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    save_index(hot, folder, stamp="seq 8")
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in before if before[name] != after.get(name)} == {MANIFEST}
    hot.remove([390])
    save_index(hot, folder, stamp="seq 9")
    last = {path.name for path in folder.iterdir()}
    assert len(last) == len(after) and len(last - after.keys()) == 1
    again = Hot(D)
    assert load_index(again, folder) == "seq 9" and 390 not in again and 389 in again


def test_every_damaged_byte_is_found_and_its_file_named(saved):
    _, folder = saved
    rng = random.Random(0)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for at in {0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(12))}:
            path.write_bytes(flipped(data, at))
            empty = Hot(D)
            with pytest.raises(StorageError) as refused:
                load_index(empty, folder)
            assert str(path) in str(refused.value) and "nothing is lost" in str(refused.value)
            assert len(empty) == 0
        for wrong in (data[:-1], b"", data + b"x"):
            path.write_bytes(wrong)
            with pytest.raises(StorageError, match=path.name):
                load_index(Hot(D), folder)
        path.unlink()
        with pytest.raises(StorageError, match=path.name):
            load_index(Hot(D), folder)
        path.write_bytes(data)
    assert load_index(Hot(D), folder) == "seq 7"


def test_an_index_of_other_vectors_is_refused(saved):
    with pytest.raises(StorageError, match="have 64 numbers, and here they have 128"):
        load_index(Hot(128), saved[1])


def test_a_newer_format_is_refused(saved):
    import blake3

    path = saved[1] / MANIFEST
    said = json.loads(path.read_bytes().partition(b"\n")[2])
    text = json.dumps({**said, "format": 2}).encode()
    path.write_bytes(blake3.blake3(text).hexdigest().encode() + b"\n" + text)
    with pytest.raises(StorageError, match="format 2"):
        load_index(Hot(D), saved[1])


def test_files_can_be_sealed(saved, tmp_path_factory):
    hot, plain = saved
    folder = tmp_path_factory.mktemp("sealed")

    def cover(data: bytes, name: str) -> bytes:
        return bytes(byte ^ 0x5A for byte in data)

    save_index(hot, folder, stamp="seq 7", seal=cover)
    assert b"kind1" not in b"".join(path.read_bytes() for path in folder.iterdir())
    assert b"kind1" in (plain / MANIFEST).read_bytes()
    again = Hot(D)
    assert load_index(again, folder, unseal=cover) == "seq 7"
    query = vectors_of(1)[0]
    assert again.search(query, 5, tenant="a").ids.tolist() == hot.search(query, 5, tenant="a").ids.tolist()


def test_a_folder_that_cannot_be_written_is_named(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("there") / "file"
    folder.write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        save_index(saved[0], folder, stamp="")


def test_a_kill_while_saving_leaves_the_old_index(saved, monkeypatch):
    hot, folder = saved
    hot.remove([50])
    replaced = []

    def killed(source, target):
        if target.name == MANIFEST:
            raise KeyboardInterrupt
        replaced.append(target)
        return source.rename(target)

    monkeypatch.setattr("pantheraml.memory.index.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_index(hot, folder, stamp="seq 8")
    monkeypatch.undo()
    assert replaced
    again = Hot(D)
    assert load_index(again, folder) == "seq 7" and 50 in again
    save_index(hot, folder, stamp="seq 8")
    assert not list(folder.glob("*.part"))
    assert load_index(Hot(D), folder) == "seq 8"


def test_opening_an_index_loads_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, pantheraml.memory.index, pantheraml.memory.embed as e; e.LexicalEmbedder().embed(['a']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
