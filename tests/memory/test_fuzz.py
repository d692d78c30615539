"""A thousand containers that no writer made: the reader says what is wrong, and makes nothing larger than it was allowed."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from blake3 import blake3

from pantheraml.errors import StorageError
from pantheraml.memory.codec import Codecs
from pantheraml.memory.container import GIST, NAMES, NEURAL, RAW, ZSTD, Payload, pack, unpack
from pantheraml.memory.delta import encode_delta
from pantheraml.memory.record import FORMS, from_bytes
from pantheraml.memory.shared import Shared
from pantheraml.memory.zstd import ZstdCodec

ROOT = Path(__file__).parents[2]
LIMIT = 1 << 20
BASE = b"What differs from this is little. " * 30
SLACK = 64 << 10
"""Bytes of objects whose size no container decides: errors, lists, messages."""


def codecs_in(folder: Path) -> Codecs:
    return Codecs(ZstdCodec(Shared(folder)), bases=lambda numbers: [Payload(RAW, 0, len(BASE), b"", BASE)] * len(numbers))


def sound(codecs: Codecs) -> list[bytes]:
    """Containers of every codec, small and large, of all forms."""
    assert isinstance(codecs._zstd, ZstdCodec)
    codecs._zstd.train(
        "log", [f"{i * 7919} bytes were sent to user {i % 97} in {i % 13} ms, without an error".encode() for i in range(400)]
    )
    contents = [
        b"hi",
        b"[1,2,3]" * 100,
        BASE + b"!",
        b"34567 bytes were sent to user 7 in 3 ms, without an error",
        bytes(LIMIT),
        b'{"a":[1.5,null]}' * 20,
    ]
    payloads = [
        payload
        for form in FORMS
        for kind in ("note", "log")
        for payload in codecs.encode(contents, [form] * len(contents), [kind] * len(contents))
    ]
    payloads += [Payload(ZSTD, 0, 1 << 17, b"", (1 | 1 << 1 | 1 << 17 << 3).to_bytes(3, "little") + b"a")] * 3
    payloads += [p for p in (encode_delta(BASE[:n] + b"?" * n, "text", BASE, n) for n in range(1, 40)) if p]
    payloads += codecs.encode_gists(["", "short", "long " * 500])
    payloads += [Payload(NEURAL, 0, 5000, bytes(8), b"arithmetic"), Payload(GIST, 1, 3, b"", b"abc")]
    return [pack(each) for each in payloads]


def fuzzed(blobs: list[bytes], count: int, seed: int = 0) -> list[bytes]:
    """Bits flipped, bytes put in, taken out and exchanged, ends cut off; in two of three the checksum is made right again."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        body = bytearray(draw.choice(blobs)[:-8])
        for _ in range(draw.choice([1, 1, 1, 2, 5, 30])):
            # Half of it where the sizes and the first block headers are.
            at = min(draw.randrange(40) if draw.random() < 0.5 else draw.randrange(len(body) + 1), len(body))
            match draw.randrange(6):
                case 0 if body:
                    body[at - 1] ^= 1 << draw.randrange(8)
                case 1:
                    body[at : at + 1] = draw.randbytes(1)
                case 2:
                    body[at:at] = draw.randbytes(draw.randrange(1, 9))
                case 3:
                    del body[at : at + draw.randrange(1, 9)]
                case 4:
                    body[at : at + 8] = b"\xff" * draw.randrange(1, 8) + b"\x7f"  # a varint of a huge number
                case _:
                    other = draw.choice(blobs)
                    body[at:] = other[draw.randrange(len(other)) :]
        if draw.random() < 0.1:  # what decoding makes of the data of another codec
            body[5:6] = bytes([draw.randrange(len(NAMES))])
        made.append(bytes(body) + (blake3(body).digest()[:8] if draw.random() < 0.67 else draw.randbytes(8)))
    return made


def read(codecs: Codecs, blob: bytes, limit: int = LIMIT) -> str:
    """How far reading has come; any other error than StorageError is the test's failure."""
    try:
        payload = unpack(blob, most_bytes=limit)
    except StorageError:
        return "refused"
    (content,) = codecs.decode_each([payload])
    if isinstance(content, StorageError):
        return "not decoded"
    assert len(content) == payload.raw_size <= limit
    try:
        from_bytes(FORMS[payload.form], content)
    except StorageError:
        return "no such content"
    return "read"


@pytest.fixture
def containers(tmp_path):
    """Codecs, and a thousand fuzzed containers, whose numbers outside the data are right in many."""
    codecs = codecs_in(tmp_path)
    blobs = sound(codecs)
    assert {read(codecs, blob) for blob in blobs} == {"read", "not decoded", "no such content"}  # there is no neural codec here
    return codecs, [*fuzzed(blobs, 500), *refitted(fuzzed([blob for blob in blobs if len(blob) < 10_000], 500, seed=1))]


def refitted(blobs: list[bytes]) -> list[bytes]:
    """With the data size and the checksum made right, so that they get to the codecs: the head of a sound one, the rest anything."""
    draw = random.Random(2)
    made = []
    for blob in blobs:
        codec = draw.choice([0, 1, 1, 1, 2, 3, 3, 6, 6])
        model = draw.choice([bytes(8), blob[7:15].ljust(8, b"\0")]) if codec in (2, 3) else b""
        raw_size = len(blob) if codec == RAW else draw.choice([0, 1, len(blob), 3000, LIMIT, LIMIT + 1, 1 << 30])
        data = draw.choice([blob, blob[20:], (len(blob) << 3 | draw.randrange(8)).to_bytes(3, "little") + blob])
        data = data if codec != RAW else blob
        made.append(pack(Payload(codec, draw.randrange(3), raw_size, model, data)))
    return made


def test_a_thousand_fuzzed_containers_never_crash_the_reader(containers):
    codecs, blobs = containers
    ends = Counter(read(codecs, blob) for blob in blobs)
    assert ends.total() == 1000
    assert min(ends[end] for end in ("refused", "not decoded", "no such content", "read")) >= 25, ends


def test_none_takes_more_memory_than_it_may(containers):
    """To unpack: what the container holds. To decode: the content, and twice what the container holds. Never more than the limit says."""
    codecs, blobs = containers
    tracemalloc.start()
    try:
        for blob in blobs:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            payload = None
            with contextlib.suppress(StorageError):
                payload = unpack(blob, most_bytes=LIMIT)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before <= min(len(blob), LIMIT) + SLACK
            if payload:
                assert payload.raw_size <= LIMIT
                tracemalloc.reset_peak()
                codecs.decode_each([payload])
                _, peak = tracemalloc.get_traced_memory()
                assert peak - before <= payload.raw_size + 2 * len(blob) + SLACK
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of address space")
def test_neither_does_zstd_which_no_tracer_sees(containers, tmp_path):
    """Peak memory of a process that reads them all, in which claims of 1 GiB are within the limit."""
    _, blobs = containers
    for i, blob in enumerate(blobs):
        (tmp_path / f"{i}.nbmf").write_bytes(blob)
    command = f"from tests.memory.test_fuzz import *; print(peak_growth(Path({str(tmp_path)!r})))"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 8 * LIMIT


def peak_growth(folder: Path) -> int:
    """Bytes by which the peak of this process has grown over reading every container in a folder, touched or not."""
    codecs = codecs_in(folder)
    for blob in (pack(p) for p in codecs.encode([bytes(LIMIT)] * 2, ["text", "bytes"], ["log"] * 2)):
        read(codecs, blob)  # contexts are opened, and allocators have their arenas
    before = peak_kb()
    for file in sorted(folder.glob("*.nbmf")):
        read(codecs, file.read_bytes(), limit=1 << 30)
    return (peak_kb() - before) * 1024


def peak_kb() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmPeak"))
    return int(line.split()[1])
