"""Content by zstd: fast, lossless, and with a dictionary trained for each kind of record."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from logging import getLogger
from typing import TYPE_CHECKING

from pantheraml.errors import DataError, MissingExtra, StorageError
from pantheraml.memory.container import ZSTD, ZSTD_DICTIONARY, Payload
from pantheraml.memory.record import FORMS, Form
from pantheraml.memory.shared import Shared

if TYPE_CHECKING:
    import zstandard

SUFFIX = "zdict"
FEWEST_SAMPLES = 50
FEWEST_SAMPLE_BYTES = 8_000
LARGEST_DICTIONARY = 112_640
"""Bytes; zstd's own default. Four times as many samples make records about 1% smaller at this size."""
MOST_SAMPLE_BYTES = 8_000_000
"""To train on: two to three seconds on one core."""

_BLOCK_BYTES = 1 << 17
_OPENED_AT_ONCE = 32
"""Contexts of zstd that a thread keeps ready; one with a dictionary holds a few hundred KB."""
_log = getLogger(__name__)


class ZstdCodec:
    """The fast default of a store, a `codec.Codec`. Safe to use from several threads.

    Args:
        shared: where dictionaries are kept.
        level: of zstd. On records of 300 bytes with a dictionary, one core writes about 125 MB/s at level 3, 25 at 9 and 6 at 19,
            where they are 6% larger, the measure, and 3% smaller.
        dictionaries: the id of each kind's dictionary, as `dictionaries` gave it when the store was last open.
        announce: hears of a dictionary that cannot be read and is no longer used.
    """

    name = "zstd"
    numbers = frozenset((ZSTD, ZSTD_DICTIONARY))

    def __init__(
        self,
        shared: Shared,
        *,
        level: int = 9,
        dictionaries: Mapping[str, bytes] | None = None,
        announce: Callable[[str], None] = _log.warning,
    ) -> None:
        self._shared = shared
        self._level = level
        self._of_kind = dict(dictionaries or {})
        self._announce = announce
        self._lock = threading.Lock()
        self._read: dict[bytes, bytes] = {}

    @property
    def dictionaries(self) -> dict[str, bytes]:
        """The id of the dictionary that new records of each kind are encoded with."""
        return dict(self._of_kind)

    def train(self, kind: str, samples: Sequence[bytes]) -> bytes:
        """Makes a dictionary of samples, keeps it, uses it for this kind from now on, and gives its id.

        It has an eighth of the samples' bytes, 110 KB at most. Every eighth sample is held out to see that it helps.
        Raises: DataError if there are too few samples, or it does not help; StorageError if it cannot be kept.
        """
        samples = _at_most([each for each in samples if each], MOST_SAMPLE_BYTES)
        held_out, learned = samples[::8], [each for i, each in enumerate(samples) if i % 8]
        size = sum(map(len, learned))
        if len(samples) < FEWEST_SAMPLES or size < FEWEST_SAMPLE_BYTES:
            raise DataError(
                f"{len(samples)} records of the kind {kind!r}, {size:,} bytes, are too few to train a dictionary on",
                why=f"it holds what records have in common; below {FEWEST_SAMPLES} records and {FEWEST_SAMPLE_BYTES:,} bytes that is chance",
                fix="put more records of this kind first; until then they are compressed without a dictionary",
            )
        data = self._trained(kind, learned, min(LARGEST_DICTIONARY, size // 8))
        without = sum(len(compress(each, compressor(self._level))) for each in held_out)
        with_it = sum(len(compress(each, compressor(self._level, data))) + 8 for each in held_out)
        if with_it >= without:
            raise DataError(
                f"a dictionary for the kind {kind!r} does not help: {len(held_out)} other records of it take {with_it:,} bytes "
                f"with it and {without:,} without",
                why="records of one kind should look alike; these have too little in common, or are compressed or encrypted already",
                fix="give records that look alike a kind of their own; these are compressed without a dictionary",
            )
        id = self._shared.put(data, SUFFIX)
        self._read[id] = data
        self._of_kind[kind] = id
        return id

    def encode(self, contents: Sequence[bytes], forms: Sequence[Form], kinds: Sequence[str]) -> list[Payload | None]:
        """Payloads of the contents; None for what is empty."""
        return [self._encoded(*each) if each[0] else None for each in zip(contents, forms, kinds, strict=True)]

    def decode(self, payloads: Sequence[Payload]) -> list[bytes]:
        """The contents. Raises: StorageError if one is damaged, or its dictionary cannot be read."""
        return [
            decompress(each.data, each.raw_size, decompressor(self._dictionary(each.model) if each.codec == ZSTD_DICTIONARY else None))
            for each in payloads
        ]

    def _encoded(self, content: bytes, form: Form, kind: str) -> Payload:
        id = self._usable(kind)
        if id is None:
            return Payload(ZSTD, FORMS.index(form), len(content), b"", compress(content, compressor(self._level)))
        return Payload(ZSTD_DICTIONARY, FORMS.index(form), len(content), id, compress(content, compressor(self._level, self._read[id])))

    def _trained(self, kind: str, samples: list[bytes], size: int) -> bytes:
        zstandard = _library()
        try:
            return zstandard.train_dictionary(size, list(samples), level=self._level).as_bytes()
        except zstandard.ZstdError as error:
            raise DataError(
                f"zstd makes no dictionary of {len(samples)} records of the kind {kind!r}: {error}",
                why="it needs samples that are not all the same, most of them longer than 8 bytes",
                fix="put more records of this kind first; until then they are compressed without a dictionary",
            ) from error

    def _usable(self, kind: str) -> bytes | None:
        """The id of a kind's dictionary, which is then in `_read`; None if there is none that can be read."""
        id = self._of_kind.get(kind)
        if id is None:
            return None
        try:
            self._dictionary(id)
        except StorageError as error:
            if self._of_kind.pop(kind, None):
                self._announce(f"new records of the kind {kind!r} are compressed without a dictionary: {error.what}")
            return None
        return id

    def _dictionary(self, id: bytes) -> bytes:
        data = self._read.get(id)
        if data is None:
            with self._lock:
                data = self._read.setdefault(id, self._shared.get(id, SUFFIX))
        return data


def compressor(level: int, dictionary: bytes | None = None, *, raw: bool = False) -> zstandard.ZstdCompressor:
    """This thread's context for `compress`. raw: the dictionary is content like any other, and not kept ready."""
    if raw:
        return _new_compressor(level, dictionary, True)
    return _CONTEXTS.compressor(level, dictionary)


def decompressor(dictionary: bytes | None = None, *, raw: bool = False) -> zstandard.ZstdDecompressor:
    """This thread's context for `decompress`."""
    if raw:
        return _new_decompressor(dictionary, True)
    return _CONTEXTS.decompressor(dictionary)


def compress(content: bytes, context: zstandard.ZstdCompressor) -> bytes:
    """The blocks of a zstd frame. Its header, of two bytes here, says nothing that a container does not say."""
    return context.compress(content)[2:]


def decompress(blocks: bytes, size: int, context: zstandard.ZstdDecompressor) -> bytes:
    """What `compress` was given. Makes nothing larger than `size`, and nothing at all if the blocks cannot hold that much.

    Raises: StorageError if they are not blocks of zstd, or do not give `size` bytes.
    """
    if fault := _block_fault(blocks, size):
        raise _damaged(size, fault)
    # One segment whose content size, 8 bytes of it, is known: zstd then decodes into the result, and needs no window.
    frame = b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + blocks
    try:
        return context.decompress(frame, allow_extra_data=False)
    except _library().ZstdError as error:
        raise _damaged(size, str(error)) from error


def _block_fault(blocks: bytes, size: int) -> str | None:
    """What is wrong with blocks (RFC 8878, 3.1.1.2) that should give `size` bytes, as far as their headers tell."""
    at, most, last = 0, 0, False
    while not last:
        if at + 3 > len(blocks):
            return "the blocks are cut off"
        header = int.from_bytes(blocks[at : at + 3], "little")
        last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
        if length > _BLOCK_BYTES or kind == 3:
            return "a block's header is none"
        at += 3 + (1 if kind == 1 else length)  # one byte, repeated
        most += _BLOCK_BYTES if kind == 2 else length
    if at != len(blocks):
        return f"the blocks end after {at} of {len(blocks)} bytes"
    return f"the blocks hold {most} at most" if most < size else None


def _new_compressor(level: int, dictionary: bytes | None, raw: bool = False) -> zstandard.ZstdCompressor:
    zstandard = _library()
    frame = zstandard.ZstdCompressionParameters(
        compression_level=level, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=0, write_checksum=0, write_dict_id=0
    )
    return zstandard.ZstdCompressor(compression_params=frame, dict_data=_opened(dictionary, raw))


def _new_decompressor(dictionary: bytes | None, raw: bool = False) -> zstandard.ZstdDecompressor:
    return _library().ZstdDecompressor(dict_data=_opened(dictionary, raw))


def _opened(dictionary: bytes | None, raw: bool) -> zstandard.ZstdCompressionDict | None:
    zstandard = _library()
    how = zstandard.DICT_TYPE_RAWCONTENT if raw else zstandard.DICT_TYPE_FULLDICT
    return None if dictionary is None else zstandard.ZstdCompressionDict(dictionary, dict_type=how)


class _Contexts(threading.local):
    """Contexts of zstd must not be used by two threads at once, so that each has its own."""

    def __init__(self) -> None:
        self.compressor = lru_cache(_OPENED_AT_ONCE)(_new_compressor)
        self.decompressor = lru_cache(_OPENED_AT_ONCE)(_new_decompressor)


_CONTEXTS = _Contexts()


def _at_most(samples: list[bytes], most_bytes: int) -> list[bytes]:
    """Every n-th of the samples, so that they have no more bytes than that, or nearly."""
    return samples[:: -(-sum(map(len, samples)) // most_bytes) or 1]


def _damaged(size: int, what: str) -> StorageError:
    return StorageError(
        f"content of {size:,} bytes that zstd has compressed cannot be read: {what}",
        why="what is stored is not what was written, or it was written with another dictionary",
        fix="`pantheraml memory verify` names the record; put it again, or restore it from a backup",
    )


def _library():
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtra("zstandard", needed_for="a memory store", install="'pantheraml[memory]'") from error
    return zstandard
