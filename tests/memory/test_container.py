from __future__ import annotations

import subprocess
import sys

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from pantheraml.errors import StorageError
from pantheraml.memory.container import DELTA, GIST, MODEL_BYTES, NAMES, NEURAL, RAW, ZSTD, Payload, pack, packed_size, unpack

MOST = 1 << 20


@st.composite
def payloads(draw):
    codec = draw(st.sampled_from(range(len(NAMES))))
    data = draw(st.binary(max_size=300))
    raw = len(data) if codec == RAW else draw(st.integers(0, MOST))
    fewest, most = MODEL_BYTES[codec]
    return Payload(codec, draw(st.integers(0, 2)), raw, draw(st.binary(min_size=fewest, max_size=most)), data)


def sealed(body: bytes) -> bytes:
    """With the checksum that it should have."""
    return body + blake3(body).digest()[:8]


@given(payloads())
def test_a_payload_comes_back(payload):
    blob = pack(payload)
    assert unpack(blob, most_bytes=MOST) == payload
    assert len(blob) == packed_size(payload) <= len(payload.data) + 48


@given(payloads(), st.data())
def test_every_flipped_bit_is_found(payload, data):
    blob = bytearray(pack(payload))
    bit = data.draw(st.integers(0, 8 * len(blob) - 1))
    blob[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StorageError):
        unpack(bytes(blob), most_bytes=MOST)


def test_every_flipped_bit_and_every_cut_of_one_is_found():
    blob = pack(Payload(NEURAL, 0, 1000, bytes(range(8)), b"encoded"))
    for bit in range(8 * len(blob)):
        flipped = bytearray(blob)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StorageError):
            unpack(bytes(flipped), most_bytes=MOST)
    for end in range(len(blob)):
        with pytest.raises(StorageError):
            unpack(blob[:end], most_bytes=MOST)
    with pytest.raises(StorageError):
        unpack(blob + b"\0", most_bytes=MOST)


def test_a_small_record_pays_17_bytes():
    assert len(pack(Payload(RAW, 0, 2, b"", b"hi"))) == 2 + 17


@pytest.mark.parametrize(
    ("blob", "what", "why"),
    [
        (b"", "begins with nothing, not 4e424d46", "no container"),
        (b"PK\x03\x04....", "begins with 504b0304", "no container"),
        (sealed(b"NBMF\x02\0\0\2\2hi"), "has version 2", "a newer one has written it"),
        (b"NBMF\x01", "ends within its head", "cut off"),
        (b"NBMF\x01\0\0\2\2h", "should have 19 by its head", "cut off"),
        (b"NBMF\x01\0\0\2\2hi12345678", "does not fit its checksum", "has changed"),
        (b"NBMF\x01\0\0\x82\0\2hi12345678", "not written as short as it can be", "damaged"),
        (sealed(b"NBMF\x01\x07\0\2\2hi"), "codec 7 is not known", "newer"),
        (sealed(b"NBMF\x01\0\3\2\2hi"), "form 3 is not known", "newer"),
        (sealed(b"NBMF\x01\0\x04M\2\2hi"), "codec raw with a model id of 1 bytes", "written so"),
        (sealed(b"NBMF\x01\0\0\3\2hi"), "3 bytes kept as they are in 2", "written so"),
    ],
)
def test_what_is_wrong_is_said(blob, what, why):
    with pytest.raises(StorageError) as error:
        unpack(blob, most_bytes=MOST)
    assert what in error.value.what and why in error.value.why


def test_content_over_the_limit_is_refused():
    for payload in (Payload(ZSTD, 0, 101, b"", b"12345"), Payload(RAW, 0, 200, b"", bytes(200))):
        with pytest.raises(StorageError, match="over the limit of 100"):
            unpack(pack(payload), most_bytes=100)
    assert unpack(pack(Payload(RAW, 0, 100, b"", bytes(100))), most_bytes=100).raw_size == 100


@pytest.mark.parametrize(
    "payload",
    [
        Payload(7, 0, 2, b"", b"hi"),
        Payload(RAW, 3, 2, b"", b"hi"),
        Payload(RAW, 0, 3, b"", b"hi"),
        Payload(DELTA, 0, 3, b"1234567", b"hi"),
        Payload(GIST, 0, 3, bytes(17), b"hi"),
        Payload(ZSTD, 0, 1 << 56, b"", b"hi"),
        Payload(ZSTD, 0, -1, b"", b"hi"),
    ],
)
def test_what_cannot_be_read_is_not_written(payload):
    with pytest.raises(ValueError):
        pack(payload)


def test_opening_a_store_without_a_model_imports_no_torch():
    rooms = ", ".join(f"pantheraml.memory.{name}" for name in ("codec", "container", "delta", "record", "same", "shared", "zstd"))
    command = f"import sys, {rooms}; print([name for name in ('torch', 'transformers', 'zstandard') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout.strip() == "[]"
