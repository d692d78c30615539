from __future__ import annotations

import random
import string
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pantheraml.errors import DataError, RecipeError, StorageError
from pantheraml.memory.codec import DELTA_GAIN, Codecs
from pantheraml.memory.container import DELTA, GIST, NEURAL, RAW, ZSTD, ZSTD_DICTIONARY, Payload, pack, packed_size, unpack
from pantheraml.memory.delta import LARGEST_BASE, base_of, decode_delta, encode_delta
from pantheraml.memory.record import FORMS, content_hash, from_bytes, to_bytes
from pantheraml.memory.shared import Shared
from pantheraml.memory.zstd import LARGEST_DICTIONARY, ZstdCodec, compress, compressor, decompress, decompressor

WORDS = [word.decode() for word in b"the store keeps records of what was said and when by whom so that it can be found again later".split()]
CONTENTS = (
    st.text(st.characters(exclude_categories=()))
    | st.binary(max_size=2000)
    | st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)  # what compresses, too
    | st.builds(lambda part, times: part * times, st.binary(min_size=1, max_size=20), st.integers(1, 3000))
    | st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)


def sentences(count: int, seed: int = 0) -> list[bytes]:
    """Records of about 300 bytes that look alike."""
    draw = random.Random(seed)
    return [
        f'{{"time": "2026-11-{draw.randrange(1, 31):02}T{draw.randrange(24):02}:00:00Z", "user": "{draw.randbytes(4).hex()}", '
        f'"level": "{draw.choice(["debug", "info", "warning"])}", "message": "{" ".join(draw.choices(WORDS, k=50))}"}}'.encode()
        for _ in range(count)
    ]


class Zlib:
    """A stand-in for the neural codec: another way to encode, which some contents refuse."""

    name = "neural"
    numbers = frozenset((NEURAL,))

    def encode(self, contents, forms, kinds):
        return [
            None if b"refuse" in c else Payload(NEURAL, FORMS.index(f), len(c), b"zlib....", zlib.compress(c, 9, -15))
            for c, f in zip(contents, forms, strict=True)
        ]

    def decode(self, payloads):
        return [zlib.decompress(each.data, -15) for each in payloads]


class Liar(Zlib):
    """Encodes everything as nothing, and gives back something else."""

    def encode(self, contents, forms, kinds):
        return [Payload(NEURAL, FORMS.index(f), len(c), b"liar....", b"") for c, f in zip(contents, forms, strict=True)]

    def decode(self, payloads):
        return [b"x" * each.raw_size for each in payloads]


class Broken(Liar):
    def decode(self, payloads):
        raise StorageError("the model is gone", why="it was removed", fix="restore it")


BASE = " ".join(WORDS).encode() * 20


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    """With a dictionary for the kind `log`, a neural codec, and record 5 as a base of deltas."""
    zstd = ZstdCodec(Shared(tmp_path_factory.mktemp("shared")))
    zstd.train("log", sentences(400))
    return Codecs(zstd, Zlib(), bases=lambda numbers: [{5: Payload(RAW, 0, len(BASE), b"", BASE)}[number] for number in numbers])


@pytest.mark.parametrize("codec", ["zstd", "neural"])
@pytest.mark.parametrize("kind", ["note", "log"])
@pytest.mark.parametrize("near", [None, (5, BASE)])
@given(contents=st.lists(CONTENTS, max_size=4))
@settings(max_examples=100, deadline=None)
def test_everything_comes_back_and_nothing_takes_much_more_than_raw(codecs, codec, kind, near, contents):
    formed = [to_bytes(each) for each in contents]
    data = [each for _, each in formed]
    payloads = codecs.encode(data, [form for form, _ in formed], [kind] * len(data), codec=codec, near=[near] * len(data))
    blobs = [pack(each) for each in payloads]
    assert all(len(blob) <= len(raw) + 64 for blob, raw in zip(blobs, data, strict=True))
    decoded = codecs.decode([unpack(blob, most_bytes=1 << 20) for blob in blobs])
    assert decoded == data
    assert [from_bytes(FORMS[p.form], each) for p, each in zip(payloads, decoded, strict=True)] == contents
    assert not codecs.refused


@given(content=st.binary(min_size=1, max_size=3000), times=st.integers(1, 50), kind=st.sampled_from(["note", "log"]))
@settings(deadline=None)
def test_zstd_alone_comes_back_also_where_it_is_larger_than_raw(codecs, content, times, kind):
    zstd = codecs._zstd
    (payload,) = zstd.encode([content * times], ["bytes"], [kind])
    assert payload.codec == (ZSTD_DICTIONARY if kind == "log" else ZSTD)
    assert zstd.decode([payload]) == [content * times]


@given(content=st.binary(min_size=1, max_size=3000), base=st.binary(min_size=8, max_size=3000), cut=st.integers(0, 3000))
@settings(deadline=None)
def test_deltas_come_back(content, base, cut):
    for wanted in (content, base[:cut] + content + base[cut:], b"\x37\xa4\x30\xec" + content):  # the last like a dictionary of zstd
        payload = encode_delta(wanted, "bytes", base, 1 << 63)
        assert payload is not None and base_of(payload) == 1 << 63
        assert decode_delta(payload, base) == wanted
        again = encode_delta(base, "bytes", b"\x37\xa4\x30\xec12345" + wanted, 3)
        assert again is not None and decode_delta(again, b"\x37\xa4\x30\xec12345" + wanted) == base


@given(st.lists(st.text(st.characters(exclude_categories=()))))
def test_gists_come_back(codecs, texts):
    payloads = codecs.encode_gists(texts, model=b"summary.")
    assert all(each.codec == GIST and each.model == b"summary." for each in payloads)
    assert codecs.decode(payloads) == [text.encode("utf-8", "surrogatepass") for text in texts]


def test_a_gist_that_zstd_makes_no_smaller_is_kept_as_text(codecs):
    letters = string.ascii_letters + string.digits
    texts = [letters[:some] + letters[:again] for some in range(8, 60) for again in range(30)]  # zstd makes some exactly as long
    assert any(len(compress(text.encode(), compressor(19))) == len(text) for text in texts)
    assert codecs.decode(codecs.encode_gists(texts)) == [text.encode() for text in texts]


def encode(codecs, content: bytes, kind: str = "note", **asked) -> Payload:
    return codecs.encode([content], ["text"], [kind], **asked)[0]


def test_the_smallest_is_taken(codecs):
    text = sentences(1, seed=7)[0]
    assert encode(codecs, b"").codec == encode(codecs, b"hello").codec == RAW
    assert encode(codecs, random.Random(0).randbytes(1000)).codec == RAW
    assert encode(codecs, text).codec == ZSTD
    assert encode(codecs, text, "log").codec == ZSTD_DICTIONARY
    assert encode(codecs, BASE[:100] + b"something else" + BASE[100:], near=[(5, BASE)]).codec == DELTA
    assert encode(codecs, text, near=[(5, BASE[:50])]).codec != DELTA
    small = encode(codecs, text, codec="neural")
    assert small.codec == NEURAL and packed_size(small) < packed_size(encode(codecs, text))
    assert encode(codecs, text + b"refuse", codec="neural").codec == ZSTD


def test_a_delta_must_gain_what_the_note_of_it_costs(codecs):
    content = sentences(1, seed=3)[0]
    own = packed_size(encode(codecs, content))
    taken = []
    for known in range(8, len(content), 8):
        payload = encode_delta(content, "text", content[:known], 5)
        assert payload is not None
        chosen = encode(codecs, content, near=[(5, content[:known])])
        assert (chosen.codec == DELTA) == (packed_size(payload) + DELTA_GAIN < own)
        taken.append(chosen.codec == DELTA)
    assert taken == sorted(taken) and set(taken) == {False, True}


@pytest.mark.parametrize(("neural", "said"), [(Liar(), "other bytes came back"), (Broken(), "the model is gone")])
def test_a_codec_that_does_not_give_back_is_not_believed(tmp_path, neural, said):
    heard: list[str] = []
    codecs = Codecs(ZstdCodec(Shared(tmp_path)), neural, announce=heard.append)
    contents = [b"hi", *sentences(3)]
    payloads = codecs.encode(contents, ["text"] * 4, ["note"] * 4, codec="neural")
    assert [each.codec for each in payloads] == [RAW, ZSTD, ZSTD, ZSTD]
    assert codecs.decode(payloads) == contents
    assert codecs.refused == {"neural": 3}  # raw is smallest for "hi" whatever the others say
    assert len(heard) == 1 and heard[0].startswith("neural did not give back") and said in heard[0]


def test_neural_without_a_model_says_how_to_get_one(tmp_path):
    with pytest.raises(RecipeError, match="pantheraml memory train"):
        encode(Codecs(ZstdCodec(Shared(tmp_path))), b"hello", codec="neural")


def test_one_damaged_record_costs_no_other(codecs):
    contents = sentences(20)
    payloads = codecs.encode(contents, ["text"] * 20, ["log"] * 20)
    bad = payloads[7]
    payloads[7] = Payload(bad.codec, bad.form, bad.raw_size, bad.model, bad.data[:-3] + b"???")
    payloads[11] = Payload(6 + 1, 0, 1, b"", b"")
    payloads[13] = Payload(RAW, 0, 10, b"", b"nine byte")
    decoded = codecs.decode_each(payloads)
    assert [i for i, each in enumerate(decoded) if isinstance(each, StorageError)] == [7, 11, 13]
    assert [each for each in decoded if isinstance(each, bytes)] == [each for i, each in enumerate(contents) if i not in (7, 11, 13)]
    with pytest.raises(StorageError, match="zstd has compressed cannot be read"):
        codecs.decode(payloads)


def test_deltas_need_a_base_that_is_there_and_is_none(tmp_path):
    content, base = BASE + b"one", Payload(RAW, 0, len(BASE), b"", BASE)
    delta = encode_delta(content, "text", BASE, 1)
    assert delta is not None
    records = {1: base, 2: delta}

    def find(numbers):
        for number in numbers:
            if number not in records:
                raise StorageError(f"record {number} is gone", why="it was deleted", fix="restore it")
        return [records[number] for number in numbers]

    codecs = Codecs(ZstdCodec(Shared(tmp_path)), bases=find)
    of = lambda number: Payload(DELTA, 0, len(content), number.to_bytes(8, "little"), delta.data)  # noqa: E731
    good, gone, deep = codecs.decode_each([of(1), of(3), of(2)])
    assert good == content
    assert isinstance(gone, StorageError) and gone.what == "record 3 is gone"
    assert isinstance(deep, StorageError) and "is one itself" in deep.what
    (unknown,) = Codecs(ZstdCodec(Shared(tmp_path))).decode_each([of(1)])
    assert isinstance(unknown, StorageError) and "encoded by delta, and nothing here decodes that" in unknown.what


def test_another_base_is_found_out_by_the_hash_at_the_latest():
    content = BASE + b"one"
    payload = encode_delta(content, "text", BASE, 1)
    assert payload is not None
    for other in (BASE[::-1], BASE[:-1], b"\0" * len(BASE)):
        try:
            decoded = decode_delta(payload, other)
        except StorageError as error:
            assert "record 1 and what differs from it do not fit" in error.what
        else:
            assert content_hash("text", decoded) != content_hash("text", content)


def test_no_delta_of_bases_that_zstd_ignores_or_that_are_slow():
    assert encode_delta(b"content", "text", b"1234567", 1) is None
    assert encode_delta(b"content", "text", bytes(LARGEST_BASE + 1), 1) is None
    assert encode_delta(b"", "text", b"12345678", 1) is None


def test_a_dictionary_helps_and_is_sized_by_the_samples(tmp_path):
    zstd = ZstdCodec(Shared(tmp_path))
    held_out = sentences(200, seed=1)
    size = lambda: sum(packed_size(p) for p in zstd.encode(held_out, ["text"] * 200, ["log"] * 200) if p)  # noqa: E731
    without = size()
    small = zstd.train("log", sentences(100))
    assert zstd.dictionaries == {"log": small} and size() < 0.75 * without
    assert (tmp_path / f"{small.hex()}.zdict").stat().st_size <= sum(map(len, sentences(100))) // 8
    large = zstd.train("log", sentences(5000))
    assert (tmp_path / f"{large.hex()}.zdict").stat().st_size <= LARGEST_DICTIONARY
    assert large != small and zstd.dictionaries == {"log": large}


def test_records_of_an_older_dictionary_and_of_another_session_are_read(tmp_path):
    zstd = ZstdCodec(Shared(tmp_path))
    contents = sentences(3, seed=5)
    zstd.train("log", sentences(100))
    first = zstd.encode(contents, ["text"] * 3, ["log"] * 3)
    zstd.train("log", sentences(300))
    again = ZstdCodec(Shared(tmp_path), dictionaries=zstd.dictionaries)
    second = again.encode(contents, ["text"] * 3, ["log"] * 3)
    assert {p.model for p in first if p}.isdisjoint(p.model for p in second if p)
    assert again.decode([p for p in (*first, *second) if p]) == contents * 2


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([], "0 records of the kind 'log', 0 bytes, are too few"),
        (sentences(49), "49 records of the kind 'log'"),
        ([b"short"] * 1000, "4,375 bytes, are too few"),
        ([random.Random(i).randbytes(300) for i in range(200)], "a dictionary for the kind 'log' does not help"),
    ],
)
def test_samples_that_teach_nothing_are_refused(tmp_path, samples, said):
    zstd = ZstdCodec(Shared(tmp_path))
    with pytest.raises(DataError) as error:
        zstd.train("log", samples)
    assert said in error.value.what and "without a dictionary" in error.value.fix
    assert zstd.dictionaries == {} and not list(tmp_path.iterdir())


def test_samples_over_the_limit_are_thinned_out(tmp_path, monkeypatch):
    monkeypatch.setattr("pantheraml.memory.zstd.MOST_SAMPLE_BYTES", 100_000)
    id = ZstdCodec(Shared(tmp_path)).train("log", sentences(2000))
    assert (tmp_path / f"{id.hex()}.zdict").stat().st_size <= 100_000 // 8


def test_a_lost_dictionary_costs_its_records_only(tmp_path):
    heard: list[str] = []
    zstd = ZstdCodec(Shared(tmp_path))
    id = zstd.train("log", sentences(100))
    old = [p for p in zstd.encode(sentences(1), ["text"], ["log"]) if p]
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    zstd = ZstdCodec(Shared(tmp_path), dictionaries={"log": id}, announce=heard.append)
    with pytest.raises(StorageError, match=rf"{id.hex()}\.zdict is damaged, and .*{id.hex()}\.zdict\.copy is damaged"):
        zstd.decode(old)
    new = [p for p in zstd.encode(sentences(2), ["text"] * 2, ["log"] * 2) if p]
    assert {p.codec for p in new} == {ZSTD} and zstd.decode(new) == sentences(2)
    assert len(heard) == 1 and "the kind 'log' are compressed without a dictionary" in heard[0]


def test_leaving_the_frame_header_out_saves_eleven_bytes(tmp_path):
    """Magic 4, descriptor 1, content size 2, id of the dictionary 4: 8% of what these records take."""
    shared = Shared(tmp_path)
    zstd = ZstdCodec(shared)
    id = zstd.train("log", sentences(400))
    frames = zstandard.ZstdCompressor(level=9, dict_data=zstandard.ZstdCompressionDict(shared.get(id, "zdict")))
    for content in sentences(50, seed=1):
        (payload,) = zstd.encode([content], ["text"], ["log"])
        assert payload is not None and len(frames.compress(content)) - len(payload.data) == 11


def test_blocks_that_claim_more_than_they_can_hold_are_refused():
    repeated = (1 | 1 << 1 | 1 << 17 << 3).to_bytes(3, "little") + b"a"  # the last block: one byte 128 Ki times
    assert decompress(repeated, 1 << 17, decompressor()) == b"a" * (1 << 17)
    for blocks, size, said in (
        (repeated, 1 << 60, "the blocks hold 131072 at most"),
        (repeated, (1 << 17) - 1, "cannot be read"),
        (repeated + b"a", 1 << 17, "the blocks end after 4 of 5 bytes"),
        (b"", 1, "cut off"),
        ((1 | 3 << 1).to_bytes(3, "little"), 1, "a block's header is none"),
        ((1 | 1 << 1 | (1 << 17) + 1 << 3).to_bytes(3, "little") + b"a", (1 << 17) + 1, "a block's header is none"),
    ):
        with pytest.raises(StorageError, match=said):
            decompress(blocks, size, decompressor())


def test_large_content_needs_no_window():
    content = bytes(150_000_000)  # over what zstd's windows are let be by default
    (payload,) = ZstdCodec(Shared(Path("unused"), readonly=True)).encode([content], ["bytes"], ["note"])
    assert payload is not None and len(payload.data) < 20_000
    assert ZstdCodec(Shared(Path("unused"), readonly=True)).decode([payload]) == [content]


def test_many_threads_at_once(codecs):
    contents = sentences(40)

    def work(seed: int) -> bool:
        mine = random.Random(seed).sample(contents, 40)
        kinds = ["log" if (i + seed) % 2 else "note" for i in range(40)]
        return codecs.decode(codecs.encode(mine, ["text"] * 40, kinds, near=[(5, BASE)] * 40)) == mine

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))


def test_contexts_are_not_shared_by_threads():
    with ThreadPoolExecutor(1) as pool:
        assert compressor(9) is compressor(9)
        assert pool.submit(compressor, 9).result() is not compressor(9)
        assert pool.submit(decompressor).result() is not decompressor()
