"""A file of the cold tier: a header, and blocks of containers one behind the other. Numbers are little-endian.

    header   24 bytes: magic "NBMF-SEG", version u32 (1), number of the segment u32, checksum (8)
    block    head, 20 bytes: magic "NBMB", length u32 and count u32 of the body, checksum (8)
             body: for each of `count` entries the id as a varint of the zigzag difference to the one before (the first: to 0), and the
                   size as a varint; then the containers, one behind the other
             checksum of the body (16)

A checksum is the first bytes of a blake3: of the header's 16 bytes; of the number of the segment u32, the offset of the block u64 and
the head's 12 bytes, so that a block proves its place; of the body.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import blake3

from pantheraml.memory.container import read_varint, varint

SEGMENT_MAGIC, BLOCK_MAGIC, VERSION = b"NBMF-SEG", b"NBMB", 1
HEADER_BYTES, HEAD_BYTES, BODY_SUM_BYTES = 24, 20, 16
BLOCK_BYTES = 32 << 10
"""Of a body, about: as much as a flipped byte costs. A larger container has a block for itself."""
MOST_BLOCK_BYTES = 1 << 30
_WINDOW_BYTES = 1 << 20

Entry = tuple[int, bytes]
"""The id of a record, and its container."""


class Damage(Exception):
    """Why a block cannot be read. end: where it ends, None if that is not known. torn: the file ends within it, as after a kill."""

    def __init__(self, said: str, *, end: int | None = None, torn: bool = False) -> None:
        super().__init__(said)
        self.end, self.torn = end, torn


@dataclass(frozen=True, slots=True)
class Block:
    """What a walk over a segment meets. wrong: why it cannot be read; then there are no ids, and the size may reach to the next sound block."""

    segment: int
    offset: int
    size: int
    ids: tuple[int, ...]
    wrong: str | None


def header(segment: int) -> bytes:
    """What a segment begins with."""
    said = struct.pack("<8sII", SEGMENT_MAGIC, VERSION, segment)
    return said + blake3.blake3(said).digest(8)


def wrong_header(data: bytes, segment: int) -> str | None:
    """Why this is not the header of the segment."""
    if len(data) != HEADER_BYTES or data[:8] != SEGMENT_MAGIC or data[16:] != blake3.blake3(data[:16]).digest(8):
        return "its header does not fit its checksum: a byte of it has changed, or it is no segment"
    version, number = struct.unpack_from("<II", data, 8)
    if version != VERSION:
        return f"its version is {version}, and this program reads {VERSION}"
    return None if number == segment else f"its header says that it is segment {number}"


def block_bytes(segment: int, offset: int, entries: Sequence[Entry]) -> bytes:
    """A block that will stand at an offset of a segment."""
    table, before = bytearray(), 0
    for id, container in entries:
        difference = id - before
        table += varint(difference << 1 if difference >= 0 else (-difference << 1) - 1) + varint(len(container))
        before = id
    body = b"".join((table, *(container for _, container in entries)))
    head = BLOCK_MAGIC + struct.pack("<II", len(body), len(entries))
    return b"".join((head, _head_sum(segment, offset, head), body, blake3.blake3(body).digest(BODY_SUM_BYTES)))


def block_end(file: BinaryIO, segment: int, offset: int, size: int) -> int:
    """Where the block at an offset ends, by its head alone. size: of the file. Raises: Damage."""
    return offset + HEAD_BYTES + _head(file, segment, offset, size)[0] + BODY_SUM_BYTES


def read_block(file: BinaryIO, segment: int, offset: int, size: int) -> tuple[list[Entry], int]:
    """The entries of the block at an offset, and where it ends. No more is read than the file has. Raises: Damage."""
    length, count = _head(file, segment, offset, size)
    end = offset + HEAD_BYTES + length + BODY_SUM_BYTES
    if length > MOST_BLOCK_BYTES:
        raise Damage(f"it has {length:,} bytes, more than any writer makes", end=end)
    body = file.read(length + BODY_SUM_BYTES)
    if blake3.blake3(body[:length]).digest(BODY_SUM_BYTES) != body[length:]:
        raise Damage("its body does not fit its checksum: a byte of it has changed", end=end)
    try:
        return _entries(body, length, count), end
    except (IndexError, ValueError) as error:
        raise Damage(f"its entries do not add up to its length: {error}", end=end) from error


def walk(file: BinaryIO, segment: int) -> Iterator[Block]:
    """All blocks in their order, damaged ones too; a damaged header is one at offset 0. Memory is that of one block."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    if wrong := wrong_header(file.read(HEADER_BYTES), segment):
        yield Block(segment, 0, HEADER_BYTES, (), wrong)
    offset = HEADER_BYTES
    while offset < size:
        try:
            entries, end = read_block(file, segment, offset, size)
            yield Block(segment, offset, end - offset, tuple(id for id, _ in entries), None)
        except Damage as damage:
            end = damage.end or _next_block(file, segment, offset + 1, size)
            yield Block(segment, offset, end - offset, (), str(damage))
        offset = end


def _head(file: BinaryIO, segment: int, offset: int, size: int) -> tuple[int, int]:
    """(length, count) of the body at an offset; the file then stands at its beginning."""
    file.seek(offset)
    head = file.read(HEAD_BYTES)
    if len(head) < HEAD_BYTES:
        begins = min(len(head), len(BLOCK_MAGIC))
        raise Damage(f"the file ends at {size:,}, within its head", end=size, torn=head[:begins] == BLOCK_MAGIC[:begins])
    if not _is_head(head, segment, offset):
        raise Damage("its head does not fit its checksum: a byte of it has changed, or no block begins there")
    length, count = struct.unpack_from("<II", head, 4)
    if offset + HEAD_BYTES + length + BODY_SUM_BYTES > size:
        raise Damage(f"it has {length:,} bytes, and the file ends at {size:,}", end=size, torn=True)
    return length, count


def _is_head(head: bytes, segment: int, offset: int) -> bool:
    return head[:4] == BLOCK_MAGIC and head[12:] == _head_sum(segment, offset, head[:12])


def _head_sum(segment: int, offset: int, head: bytes) -> bytes:
    return blake3.blake3(struct.pack("<IQ", segment, offset) + head).digest(8)


def _next_block(file: BinaryIO, segment: int, begin: int, size: int) -> int:
    """Where the next block begins behind one whose length is not known; the end of the file if there is none."""
    while begin <= size - HEAD_BYTES:
        file.seek(begin)
        window = file.read(_WINDOW_BYTES)
        at = window.find(BLOCK_MAGIC)
        while 0 <= at <= len(window) - HEAD_BYTES:
            if _is_head(window[at : at + HEAD_BYTES], segment, begin + at):
                return begin + at
            at = window.find(BLOCK_MAGIC, at + 1)
        begin += max(1, len(window) - HEAD_BYTES + 1)
    return size


def _entries(body: bytes, length: int, count: int) -> list[Entry]:
    sizes: list[tuple[int, int]] = []
    at = id = 0
    for _ in range(count):
        difference, at = read_varint(body, at)
        size, at = read_varint(body, at)
        id += (difference >> 1) ^ -(difference & 1)
        sizes.append((id, size))
    if at + sum(size for _, size in sizes) != length:
        raise ValueError(f"{count:,} entries in {length:,} bytes")
    entries: list[Entry] = []
    for id, size in sizes:
        entries.append((id, body[at : at + size]))
        at += size
    return entries
