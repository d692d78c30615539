"""A reader of containers written from docs/nbmf.md alone, in 60 lines at most, against what the package writes."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from blake3 import blake3
from zstandard import DICT_TYPE_FULLDICT, DICT_TYPE_RAWCONTENT, ZstdCompressionDict, ZstdDecompressor

from pantheraml.memory.codec import Codecs
from pantheraml.memory.container import DELTA, RAW, ZSTD, ZSTD_DICTIONARY, pack
from pantheraml.memory.record import content_hash, to_bytes
from pantheraml.memory.shared import Shared
from pantheraml.memory.zstd import ZstdCodec

DOCS = Path(__file__).parents[2] / "docs" / "nbmf.md"


class SecondReader:
    def __init__(self, shared: Path, bases: dict[int, bytes]):
        self.shared = shared
        self.bases = bases

    def read(self, blob: bytes, limit: int) -> tuple[int, bytes]:
        """The form and the content of a container."""
        assert blob[:4] == b"NBMF" and blob[4] == 1
        codec, form, at = blob[5], blob[6] & 3, 7 + (blob[6] >> 2)
        model = blob[7:at]
        raw_size, at = self.varint(blob, at)
        data_size, at = self.varint(blob, at)
        data, end = blob[at : at + data_size], at + data_size
        assert len(blob) == end + 8 and blob[end:] == blake3(blob[:end]).digest()[:8]
        assert raw_size <= limit and form < 3
        if codec == 0 or (codec == 6 and data_size == raw_size):
            content = data
        elif codec in (1, 6):
            content = self.zstd(data, raw_size, None)
        elif codec == 2:
            content = self.zstd(data, raw_size, ZstdCompressionDict(self.dictionary(model), dict_type=DICT_TYPE_FULLDICT))
        elif codec == 3:
            base = self.bases[int.from_bytes(model, "little")]
            content = self.zstd(data, raw_size, ZstdCompressionDict(base, dict_type=DICT_TYPE_RAWCONTENT))
        else:
            raise NotImplementedError(f"codec {codec}")
        assert len(content) == raw_size
        return form, content

    def varint(self, blob: bytes, at: int) -> tuple[int, int]:
        number = shift = 0
        while True:
            number |= (blob[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if blob[at - 1] < 128:
                return number, at

    def zstd(self, blocks: bytes, raw_size: int, dictionary: ZstdCompressionDict | None) -> bytes:
        at, most, last = 0, 0, False
        while not last:
            header = int.from_bytes(blocks[at : at + 3], "little")
            last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
            at += 3 + (1 if kind == 1 else size)
            most += 1 << 17 if kind == 2 else size
        assert at == len(blocks) and raw_size <= most
        frame = bytes.fromhex("28b52ffde0") + raw_size.to_bytes(8, "little") + blocks
        return ZstdDecompressor(dict_data=dictionary).decompress(frame)

    def dictionary(self, id: bytes) -> bytes:
        for ending in ("", ".copy"):
            data = (self.shared / f"{id.hex()}.zdict{ending}").read_bytes()
            if blake3(data).digest()[:8] == id:
                return data
        raise OSError("both are damaged")


BASE = json.dumps({"city": "Oslo", "rain": [f"{day} mm on day {day}" for day in range(40)]}).encode()


@pytest.fixture
def store(tmp_path):
    """Codecs with a dictionary for the kind `log`, and a second reader of the same folder."""
    zstd = ZstdCodec(Shared(tmp_path))
    zstd.train("log", [f"2026-11-{i % 30:02} INFO request {i * 7919} for user {i % 97} took {i % 13} ms".encode() for i in range(400)])
    return Codecs(zstd), SecondReader(tmp_path, {7: BASE})


@pytest.mark.parametrize(
    ("content", "kind", "near", "codec"),
    [
        ("hi", "note", None, RAW),
        ("lone \ud800 surrogate", "note", None, RAW),
        (b"\xff\x00" * 200_000, "note", None, ZSTD),
        ({"rows": [{"n": n, "même": None} for n in range(30)]}, "note", None, ZSTD),
        ("2026-11-05 INFO request 12345 for user 45 took 9 ms", "log", None, ZSTD_DICTIONARY),
        (BASE.decode().replace("day 17", "day 71"), "note", (7, BASE), DELTA),
    ],
)
def test_what_we_write_the_second_reader_reads(store, content, kind, near, codec):
    codecs, reader = store
    form, data = to_bytes(content)
    (payload,) = codecs.encode([data], [form], [kind], near=[near])
    assert payload.codec == codec
    number, read = reader.read(pack(payload), limit=1 << 20)
    assert read == data
    assert content_hash(form, data) == blake3(bytes((number,)) + read).digest()


def test_it_reads_gists(store):
    codecs, reader = store
    for text in ("", "short", "it rained " * 50):
        (payload,) = codecs.encode_gists([text])
        assert reader.read(pack(payload), limit=1000) == (0, text.encode())


def test_it_reads_the_copy_of_a_damaged_dictionary(store):
    codecs, reader = store
    (payload,) = codecs.encode([b"2026-11-05 INFO request 12345 for user 45 took 9 ms"], ["text"], ["log"])
    file = reader.shared / f"{payload.model.hex()}.zdict"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert reader.read(pack(payload), limit=1000)[1] == b"2026-11-05 INFO request 12345 for user 45 took 9 ms"


def test_the_examples_of_the_page_are_true(tmp_path):
    raw, zstd, delta = (bytes.fromhex(found) for found in re.findall(r"^\| `([0-9a-f]+)` \|", DOCS.read_text("utf-8"), re.MULTILINE))
    friday = b"It rained in Oslo on Friday, and in Bergen on every other day of the week."
    reader = SecondReader(tmp_path, {513: friday.replace(b"Friday", b"Monday")})
    assert reader.read(raw, 100) == (0, b"hi")
    assert reader.read(zstd, 300) == (1, b"abc" * 100)
    assert reader.read(delta, 100) == (0, friday)


def test_it_is_short_and_knows_nothing_of_us():
    source = inspect.getsource(SecondReader)
    assert len(source.splitlines()) <= 60
    assert "pantheraml" not in source and "Codec" not in source
