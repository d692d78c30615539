"""The container of encoded content: a few bytes that say how to decode it, the data, and a checksum. See docs/nbmf.md."""

from __future__ import annotations

from dataclasses import dataclass

import blake3

from pantheraml.errors import StorageError
from pantheraml.memory.record import FORMS

MAGIC = b"NBMF"
VERSION = 1
CHECKSUM_BYTES = 8
MOST_EXTRA = 64
"""Bytes by which a container may be larger than its content; its head and checksum take 17 to 47."""

RAW, ZSTD, ZSTD_DICTIONARY, DELTA, NEURAL, NEURAL_FLOAT, GIST = range(7)
NAMES = ("raw", "zstd", "zstd+dictionary", "delta", "neural", "neural-float", "gist")
"""Of the codecs, by number."""
MODEL_BYTES = ((0, 0), (0, 0), (8, 8), (8, 8), (8, 16), (8, 16), (0, 16))
"""Fewest and most bytes of `Payload.model`, by number of codec."""

_VARINT_BYTES = 8


@dataclass(frozen=True, slots=True)
class Payload:
    """Encoded content, and what it takes to decode it.

    Attributes:
        codec: its number, see `NAMES`. form: of the content, its place in `record.FORMS`. raw_size: bytes that decoding gives.
        model: id of the dictionary, the model, or the record that decoding needs; empty where it needs nothing.
    """

    codec: int
    form: int
    raw_size: int
    model: bytes
    data: bytes


def pack(payload: Payload) -> bytes:
    """The container of a payload. Raises: ValueError for a payload that `unpack` would refuse."""
    if fault := _fault(payload):
        raise ValueError(fault)
    head = bytes((VERSION, payload.codec, payload.form | len(payload.model) << 2))
    body = b"".join((MAGIC, head, payload.model, varint(payload.raw_size), varint(len(payload.data)), payload.data))
    return body + _checksum(body)


def packed_size(payload: Payload) -> int:
    """Bytes of `pack(payload)`."""
    data = len(payload.data)
    return len(MAGIC) + 3 + len(payload.model) + len(varint(payload.raw_size)) + len(varint(data)) + data + CHECKSUM_BYTES


def unpack(blob: bytes, *, most_bytes: int) -> Payload:
    """The payload of a container, of which every byte has been checked.

    Args:
        most_bytes: refuse content that is larger, before anything of its size is made.
    Raises: StorageError that says what is wrong: no container, a newer version, cut off, damaged, impossible, too large.
    """
    if blob[:4] != MAGIC:
        raise _unreadable(blob, f"begins with {bytes(blob[:4]).hex() or 'nothing'}, not {MAGIC.hex()}", "it is no container, or damaged")
    if len(blob) > 4 and blob[4] != VERSION:
        raise StorageError(
            f"a container of {len(blob)} bytes has version {blob[4]}",
            why=f"this program reads version {VERSION}; a newer one has written it, or it is damaged",
            fix="install the newest pantheraml; if it says the same, see `pantheraml memory verify`",
        )
    if len(blob) > most_bytes + MOST_EXTRA:
        raise _too_large(len(blob) - MOST_EXTRA, most_bytes)
    try:
        codec, form, model_end = blob[5], blob[6] & 3, 7 + (blob[6] >> 2)
        raw_size, at = read_varint(blob, model_end)
        data_size, at = read_varint(blob, at)
    except IndexError:
        raise _unreadable(blob, "ends within its head", "it was cut off, or is damaged") from None
    except ValueError:
        raise _unreadable(
            blob, "has a number that is not written as short as it can be", "no writer makes such a one: it is damaged"
        ) from None
    end = at + data_size
    if end + CHECKSUM_BYTES != len(blob):
        raise _unreadable(blob, f"should have {end + CHECKSUM_BYTES} by its head", "it was cut off, or is damaged")
    if _checksum(memoryview(blob)[:end]) != blob[end:]:
        raise _unreadable(blob, "does not fit its checksum", "a byte of it has changed since it was written")
    if raw_size > most_bytes:
        raise _too_large(raw_size, most_bytes)
    payload = Payload(codec, form, raw_size, bytes(blob[7:model_end]), bytes(blob[at:end]))
    if fault := _fault(payload):
        raise _unreadable(blob, f"says what cannot be: {fault}", "its checksum is right, so it was written so, or by a newer program")
    return payload


def _fault(payload: Payload) -> str | None:
    codec, model, data, raw = payload.codec, len(payload.model), len(payload.data), payload.raw_size
    if not 0 <= codec < len(NAMES):
        return f"codec {codec} is not known"
    if not 0 <= payload.form < len(FORMS):
        return f"form {payload.form} is not known"
    fewest, most = MODEL_BYTES[codec]
    if not fewest <= model <= most:
        return f"codec {NAMES[codec]} with a model id of {model} bytes"
    if codec == RAW and data != raw:
        return f"{raw} bytes kept as they are in {data}"
    if not 0 <= raw < 1 << 7 * _VARINT_BYTES:
        return f"{raw} bytes of content"
    return None


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_varint(blob: bytes, at: int) -> tuple[int, int]:
    """The number at a place, and the place behind it.

    Raises: IndexError if it does not end there; ValueError if it is longer than it need be.
    """
    number = 0
    for i in range(_VARINT_BYTES):
        byte = blob[at + i]
        number |= (byte & 127) << 7 * i
        if byte < 128:
            if byte == 0 and i:
                break
            return number, at + i + 1
    raise ValueError("a number is not written as short as it can be")


def _checksum(body: bytes | memoryview) -> bytes:
    return blake3.blake3(body).digest(CHECKSUM_BYTES)


def _unreadable(blob: bytes, what: str, why: str) -> StorageError:
    return StorageError(
        f"a container of {len(blob)} bytes {what}",
        why=why,
        fix="`pantheraml memory verify` names the record; put it again, or restore it from a backup",
    )


def _too_large(size: int, most_bytes: int) -> StorageError:
    return StorageError(
        f"a container holds {size:,} bytes of content, over the limit of {most_bytes:,}",
        why="reading it would take that much memory, and a damaged or hostile file can say anything",
        fix="if you trust the file, read it with a higher limit (most_bytes)",
    )
