"""The way in and out for content: the smallest of what the codecs make of it, proved by decoding it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from logging import getLogger
from threading import Lock
from typing import Literal, Protocol, TypeVar

from pantheraml.errors import RecipeError, StorageError
from pantheraml.memory.container import DELTA, GIST, NAMES, RAW, Payload, packed_size
from pantheraml.memory.delta import base_of, decode_delta, encode_delta
from pantheraml.memory.record import FORMS, Form
from pantheraml.memory.zstd import compress, compressor, decompress, decompressor

DELTA_GAIN = 32
"""Bytes by which a delta must be smaller than what needs no other record: about what the note of who needs whom takes."""
GIST_LEVEL = 19
_In = TypeVar("_In")
_Out = TypeVar("_Out")
_log = getLogger(__name__)


class Codec(Protocol):
    """A way to encode content, in batches. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """As people ask for it."""
        ...

    @property
    def numbers(self) -> frozenset[int]:
        """Of the codecs that it decodes; see `container.NAMES`."""
        ...

    def encode(self, contents: Sequence[bytes], forms: Sequence[Form], kinds: Sequence[str]) -> list[Payload | None]:
        """A payload of each content; None for what it cannot encode."""
        ...

    def decode(self, payloads: Sequence[Payload]) -> list[bytes]:
        """The contents. Raises: StorageError with the reason if one of them cannot be had: damaged, model missing, another device class."""
        ...


class Codecs:
    """All codecs of a store. Safe to use from several threads.

    What is lossless is decoded again here before it is believed: a codec need not prove itself.

    Args:
        zstd: the default. neural: by a language model, if there is one.
        bases: payloads of records, by number, for deltas; raises StorageError for one that is gone.
        announce: hears when a codec does not give back what it was given; the content is then kept in another way.
    """

    def __init__(
        self,
        zstd: Codec,
        neural: Codec | None = None,
        *,
        bases: Callable[[Sequence[int]], Sequence[Payload]] | None = None,
        announce: Callable[[str], None] = _log.warning,
    ) -> None:
        self._zstd = zstd
        self._neural = neural
        self._bases = bases
        self._announce = announce
        self._by_number = {number: codec for codec in (zstd, neural) if codec for number in codec.numbers}
        self._lock = Lock()
        self.refused: Counter[str] = Counter()
        """How often each codec has not given back what it was given."""

    def encode(
        self,
        contents: Sequence[bytes],
        forms: Sequence[Form],
        kinds: Sequence[str],
        *,
        codec: Literal["zstd", "neural"] = "zstd",
        near: Sequence[tuple[int, bytes] | None] | None = None,
    ) -> list[Payload]:
        """The smallest payload of each content that decodes to it again: raw, zstd, neural if asked for, a delta if given a neighbour.

        Args:
            near: for each content the number and content of a record like it, which is no delta itself.
        Returns: payloads whose containers are at most 64 bytes larger than the content.
        Raises: RecipeError if neural is asked for and there is no model.
        """
        near = near or [None] * len(contents)
        made: list[Sequence[Payload | None]] = [self._zstd.encode(contents, forms, kinds)]
        if codec == "neural":
            made.append(self._model().encode(contents, forms, kinds))
        made.append([encode_delta(c, f, n[1], n[0]) if n else None for c, f, n in zip(contents, forms, near, strict=True)])
        ranked = [
            sorted((each for each in (_raw(content, form), *others) if each), key=_cost)
            for content, form, others in zip(contents, forms, zip(*made, strict=True), strict=True)
        ]
        return self._proved(contents, near, ranked)

    def decode(self, payloads: Sequence[Payload]) -> list[bytes]:
        """The contents. Raises: StorageError for the first that cannot be decoded."""
        contents: list[bytes] = []
        for each in self.decode_each(payloads):
            if isinstance(each, StorageError):
                raise each
            contents.append(each)
        return contents

    def decode_each(self, payloads: Sequence[Payload]) -> list[bytes | StorageError]:
        """The content of each payload, or why it cannot be had: one damaged record costs no other."""
        found: dict[int, bytes | StorageError] = {}
        for number in sorted({each.codec for each in payloads}):
            places = [i for i, each in enumerate(payloads) if each.codec == number]
            found.update(zip(places, self._decode_alike(number, [payloads[i] for i in places]), strict=True))
        return [_of_size(found[i], each) for i, each in enumerate(payloads)]

    def encode_gists(self, texts: Sequence[str], *, model: bytes = b"") -> list[Payload]:
        """Payloads of what is kept in place of contents, which may be nothing. model: id of what has made it, if any."""
        return [_gist(text.encode("utf-8", "surrogatepass"), model) for text in texts]

    def _model(self) -> Codec:
        if self._neural is None:
            raise RecipeError(
                "the neural codec was asked for, and this store has no model",
                why="it encodes with the probabilities of a language model, and has none to ask",
                fix="`pantheraml memory train` makes one of the store's own records; or ask for codec=zstd",
            )
        return self._neural

    def _proved(self, contents: Sequence[bytes], near: Sequence[tuple[int, bytes] | None], ranked: list[list[Payload]]) -> list[Payload]:
        """The first payload of each rank that decodes to the content; what is raw needs no proof."""
        doubtful = range(len(contents))
        while doubtful := [i for i in doubtful if ranked[i][0].codec != RAW]:
            deltas = [i for i in doubtful if ranked[i][0].codec == DELTA]
            others = [i for i in doubtful if ranked[i][0].codec != DELTA]
            decoded = dict(zip(others, self.decode_each([ranked[i][0] for i in others]), strict=True))
            for i in deltas:
                _, base = near[i] or (0, b"")
                decoded[i] = _undelta(ranked[i][0], base)
            doubtful = [i for i in doubtful if decoded[i] != contents[i]]
            for i in doubtful:
                self._refuse(ranked[i].pop(0), decoded[i])
        return [rank[0] for rank in ranked]

    def _refuse(self, payload: Payload, said: bytes | StorageError) -> None:
        name = NAMES[payload.codec]
        with self._lock:
            self.refused[name] += 1
            first = self.refused[name] == 1
        if first:
            reason = said.what if isinstance(said, StorageError) else "other bytes came back"
            self._announce(
                f"{name} did not give back what it was given, {payload.raw_size:,} bytes; they are kept in another way: {reason}"
            )

    def _decode_alike(self, number: int, payloads: list[Payload]) -> list[bytes | StorageError]:
        if number == RAW:
            return [each.data for each in payloads]
        if number == GIST:
            return _each(lambda part: list(map(_decode_gist, part)), payloads)
        if number == DELTA and self._bases:
            bases = self._base_contents(self._bases, sorted({base_of(each) for each in payloads}))
            return [_undelta(each, bases[base_of(each)]) for each in payloads]
        if number in self._by_number:
            return _each(self._by_number[number].decode, payloads)
        return [_no_codec(number)] * len(payloads)

    def _base_contents(self, find: Callable[[Sequence[int]], Sequence[Payload]], numbers: list[int]) -> dict[int, bytes | StorageError]:
        """Of each record that deltas need: its content. It must not be a delta, so that reading ends."""
        found = [
            _too_deep(n) if isinstance(p, Payload) and p.codec == DELTA else p for n, p in zip(numbers, _each(find, numbers), strict=True)
        ]
        contents = iter(self.decode_each([each for each in found if isinstance(each, Payload)]))
        return {n: next(contents) if isinstance(each, Payload) else each for n, each in zip(numbers, found, strict=True)}


def _each(decode: Callable[[Sequence[_In]], Sequence[_Out]], items: Sequence[_In]) -> list[_Out | StorageError]:
    """What a batch gives, or where it fails its halves, down to the items that fail."""
    try:
        return list(decode(items)) if items else []
    except StorageError as error:
        if len(items) == 1:
            return [error]
        middle = len(items) // 2
        return _each(decode, items[:middle]) + _each(decode, items[middle:])


def _raw(content: bytes, form: Form) -> Payload:
    return Payload(RAW, FORMS.index(form), len(content), b"", content)


def _cost(payload: Payload) -> int:
    return packed_size(payload) + (DELTA_GAIN if payload.codec == DELTA else 0)


def _undelta(payload: Payload, base: bytes | StorageError) -> bytes | StorageError:
    try:
        return base if isinstance(base, StorageError) else decode_delta(payload, base)
    except StorageError as error:
        return error


def _gist(text: bytes, model: bytes) -> Payload:
    data = min(text, compress(text, compressor(GIST_LEVEL)), key=len) if text else b""  # the text if both are as long: see _decode_gist
    return Payload(GIST, FORMS.index("text"), len(text), model, data)


def _decode_gist(payload: Payload) -> bytes:
    if len(payload.data) == payload.raw_size:
        return payload.data
    return decompress(payload.data, payload.raw_size, decompressor())


def _of_size(content: bytes | StorageError, payload: Payload) -> bytes | StorageError:
    if isinstance(content, StorageError) or len(content) == payload.raw_size:
        return content
    return StorageError(
        f"{NAMES[payload.codec]} gave {len(content):,} bytes of {payload.raw_size:,}",
        why="the content is not what was put",
        fix="`pantheraml memory verify` names the record; put it again, or restore it from a backup",
    )


def _no_codec(number: int) -> StorageError:
    name = NAMES[number] if number < len(NAMES) else str(number)
    return StorageError(
        f"the content is encoded by {name}, and nothing here decodes that",
        why="it takes the model, or the record, that it was encoded with",
        fix="open the whole store (Memory.open), with the model that it was written with",
    )


def _too_deep(number: int) -> StorageError:
    return StorageError(
        f"record {number}, which others are kept as differences from, is one itself",
        why="a base is never a delta, so that reading one takes two steps at most",
        fix="`pantheraml memory verify` names what is damaged; restore it from a backup",
    )
