"""Content as what differs from a neighbour: zstd, with the neighbour's content for a dictionary."""

from __future__ import annotations

from pantheraml.errors import StorageError
from pantheraml.memory.container import DELTA, Payload
from pantheraml.memory.record import FORMS, Form
from pantheraml.memory.zstd import compress, compressor, decompress, decompressor

LEVEL = 12
LARGEST_BASE = 1 << 20
"""Bytes. zstd reads the whole base for each delta: 0.05 ms for 3 KB, 1 ms for 30 KB, 4 ms for 1 MB on one core."""
_SMALLEST_BASE = 8  # zstd ignores smaller ones


def encode_delta(content: bytes, form: Form, base: bytes, base_id: int) -> Payload | None:
    """What it takes to make the content of the base's; None if the base is too small or too large, or the content empty.

    Args:
        base: content of another record, not itself kept as a delta. base_id: that record's number, which must keep this content
            for as long as the delta is there.
    """
    if not content or not _SMALLEST_BASE <= len(base) <= LARGEST_BASE:
        return None
    blocks = compress(content, compressor(LEVEL, base, raw=True))
    return Payload(DELTA, FORMS.index(form), len(content), base_id.to_bytes(8, "little"), blocks)


def decode_delta(payload: Payload, base: bytes) -> bytes:
    """The content. Another base gives an error or other content: compare it with the record's hash.

    Raises: StorageError if it is damaged.
    """
    try:
        return decompress(payload.data, payload.raw_size, decompressor(base, raw=True))
    except StorageError as error:
        raise StorageError(
            f"record {base_of(payload)} and what differs from it do not fit: {error.what}",
            why="one of them is not what it was when the difference was taken",
            fix="`pantheraml memory verify` names what is damaged; put the record again, or restore it from a backup",
        ) from error


def base_of(payload: Payload) -> int:
    """The number of the record that a delta needs."""
    return int.from_bytes(payload.model, "little")
