"""One record as one row of bytes, complete in itself, so that it can be saved out of a damaged file.

`R 1 | flags | seq | body | checksum`; the body is sealed where the store is. All numbers are little-endian.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import blake3

from pantheraml.errors import DataError, StorageError
from pantheraml.memory.container import DELTA
from pantheraml.memory.record import FORMS, JSON, Fidelity, Form, Origin, Tier, to_bytes
from pantheraml.memory.seal import Seal, UnknownEpoch, epoch_of

Machine = tuple[str, str, str]
"""Kind, name and dtype of an Origin: few in a store, so a row keeps their number."""
MARK = b"R\x01"
LARGEST_ROW = 900_000_000
"""Bytes; SQLite takes 10**9."""
_HEAD = struct.Struct("<2sBQ")  # mark, flags, seq
_BODY = struct.Struct("<q32sIBBHIBBHBIH")
_COLD = struct.Struct("<IQII")  # segment, offset, index, bytes there
_SEALED, _COLD_FLAG, _SAME_FLAG, _GIST = 1, 2, 4, 8
_NO_METADATA: Mapping[str, JSON] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A record as it is stored. Exactly one of container, cold and same_as is set.

    Attributes:
        id: 0: given when it is inserted. seq: of the change that wrote it; given then as well.
        created: microseconds since 1970, UTC. hash: 32 bytes, see `content_hash`. raw_size: bytes of the content.
        codec, model, form, raw_size: as in its container. stored_bytes: of its container; 0 for same_as.
        container: it lies here. cold: segment, offset and index, where it lies in a cold segment. same_as: id of the row that has it.
        vector: as `quantise` encodes it. score: measured fidelity of a gist.
    """

    id: int = 0
    seq: int = 0
    key: str
    kind: str = "note"
    tenant: str = "default"
    created: int
    metadata: Mapping[str, JSON] = field(default_factory=lambda: _NO_METADATA)
    form: Form
    hash: bytes
    raw_size: int
    codec: int
    model: bytes = b""
    stored_bytes: int
    origin: Origin | None = None
    container: bytes | None = None
    cold: tuple[int, int, int] | None = None
    same_as: int | None = None
    vector: bytes = b""
    fidelity: Fidelity = "exact"
    score: float | None = None

    @property
    def tier(self) -> Tier:
        """Where its content lies."""
        return "warm" if self.cold is None else "cold"

    @property
    def base(self) -> int | None:
        """The row that it takes to decode this one: same_as, or what it is a delta of."""
        if self.same_as is not None:
            return self.same_as
        return int.from_bytes(self.model, "little") if self.codec == DELTA else None


def pack_row(row: Row, id: int, seq: int, machine: int, seal: Seal | None) -> bytes:
    """The row as bytes, with this number and change in place of its own. machine: number of its origin, 0 for none.

    Raises: DataError for a key, name or content that is too long; ValueError for what is no row at all.
    """
    tenant, kind, key = _text(row.tenant), _text(row.kind), _text(row.key)
    metadata = to_bytes(dict(row.metadata))[1] if row.metadata else b""
    _check_lengths(row, tenant, kind, key, metadata)
    flags = (_SEALED if seal else 0) | (_GIST if row.fidelity == "gist" else 0)
    if row.container is not None:
        place = row.container
    elif row.cold is not None:
        flags |= _COLD_FLAG
        place = _COLD.pack(*row.cold, row.stored_bytes)
    else:
        flags |= _SAME_FLAG
        place = (row.same_as or 0).to_bytes(8, "little")
    body = b"".join((
        _BODY.pack(
            row.created, row.hash, row.raw_size, row.codec, FORMS.index(row.form), machine, row.origin.batch if row.origin else 0,
            len(tenant), len(kind), len(key), len(row.model), len(metadata), len(row.vector),
        ),
        tenant, kind, key, row.model, metadata, row.vector,
        struct.pack("<d", row.score or 0.0) if row.fidelity == "gist" else b"",
        place,
    ))  # fmt: skip
    head = _HEAD.pack(MARK, flags, seq)
    sealed = head + (seal.seal(body, _about(id, head)) if seal else body)
    if len(sealed) > LARGEST_ROW:
        raise DataError(f"the record {row.key[:80]!r} takes {len(sealed):,} bytes", why=f"a row holds {LARGEST_ROW:,}", fix="split it")
    return sealed + _checksum(id, sealed)


def unpack_row(id: int, blob: bytes, machines: Mapping[int, Machine], seal: Seal | None) -> Row:
    """The row that `pack_row` was given.

    Raises: StorageError for damaged bytes; KeyError for a machine, and UnknownEpoch for a data key, that is newer than those given.
    """
    seq = sound_seq(id, blob)
    if seq is None:
        raise damaged_row(id, "its checksum does not hold")
    flags = blob[2]
    body = blob[_HEAD.size : -8]
    if flags & _SEALED:
        if seal is None:
            raise damaged_row(id, "it is sealed, and no key is given")
        try:
            body = seal.unseal(body, _about(id, blob[: _HEAD.size]))
        except UnknownEpoch:
            raise
        except StorageError:
            raise damaged_row(id, "it was not sealed with the store's key, or not as this record") from None
    (created, hash, raw_size, codec, form, machine, batch, *lengths) = _BODY.unpack_from(body)
    a = _BODY.size
    b = a + lengths[0]
    c = b + lengths[1]
    d = c + lengths[2]
    e = d + lengths[3]
    f = e + lengths[4]
    g = f + lengths[5]
    score = None
    place = body[g:]
    if flags & _GIST:
        (score,) = struct.unpack_from("<d", place)
        place = place[8:]
    container = cold = same_as = None
    stored = len(place)
    if flags & _COLD_FLAG:
        *cold, stored = _COLD.unpack(place)
    elif flags & _SAME_FLAG:
        same_as, stored = int.from_bytes(place, "little"), 0
    else:
        container = place
    return Row(
        id=id,
        seq=seq,
        key=body[c:d].decode("utf-8", "surrogatepass"),
        kind=body[b:c].decode("utf-8", "surrogatepass"),
        tenant=body[a:b].decode("utf-8", "surrogatepass"),
        created=created,
        metadata=json.loads(body[e:f].decode("utf-8", "surrogatepass")) if f > e else {},
        form=FORMS[form],
        hash=hash,
        raw_size=raw_size,
        codec=codec,
        model=body[d:e],
        stored_bytes=stored,
        origin=Origin(kind=(known := machines[machine])[0], name=known[1], dtype=known[2], batch=batch) if machine else None,
        container=container,
        cold=(cold[0], cold[1], cold[2]) if cold else None,
        same_as=same_as,
        vector=body[f:g],
        fidelity="gist" if flags & _GIST else "exact",
        score=score,
    )


def sound_seq(id: int, blob: bytes) -> int | None:
    """The number of the change that wrote these bytes as this row; None if they are not what was written."""
    if not isinstance(blob, bytes) or len(blob) < _HEAD.size + 8 or blob[:2] != MARK or _checksum(id, blob[:-8]) != blob[-8:]:
        return None
    return int.from_bytes(blob[3:11], "little")


def found_by(row: Row, id: int, key: int, content: bytes) -> list[tuple[int, int]]:
    """(mark, number) under which a record is found: by its key, and by its content where it has that itself, and exactly."""
    return [(key, id), (content_mark(content), id)] if row.same_as is None and row.fidelity == "exact" else [(key, id)]


def content_mark(content: bytes) -> int:
    """By which a content is found: a part of its mark in the ledger."""
    return int.from_bytes(content[:8], "little", signed=True)


def is_cold(blob: bytes) -> bool:
    """Whether the content of these bytes lies in a cold segment; needs no key."""
    return isinstance(blob, bytes) and len(blob) > 2 and bool(blob[2] & _COLD_FLAG)


def sealed_in(blob: bytes) -> int | None:
    """The epoch of the data key of these bytes; None if they are not sealed."""
    return epoch_of(blob[_HEAD.size :]) if blob[2] & _SEALED else None


def guessed_key(blob: bytes) -> str | None:
    """What the key of damaged bytes seems to be; None where that cannot be read."""
    try:
        lengths = _BODY.unpack_from(blob, _HEAD.size)[7:10]
        start = _HEAD.size + _BODY.size + lengths[0] + lengths[1]
        key = blob[start : start + lengths[2]].decode()
    except (struct.error, UnicodeDecodeError):
        return None
    return key if blob[:2] == MARK and not blob[2] & _SEALED and key.isprintable() and key else None


def damaged_row(id: int, why: str) -> StorageError:
    """The error for a row that is not what was written."""
    return StorageError(
        f"record number {id} is damaged: {why}",
        why="its bytes in store.db are not those that were written",
        fix="`pantheraml memory verify` names what is damaged, `pantheraml memory repair` saves the rest",
    )


def _text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _about(id: int, head: bytes) -> bytes:
    return b"row" + id.to_bytes(8, "little") + head


def _checksum(id: int, blob: bytes) -> bytes:
    return blake3.blake3(id.to_bytes(8, "little") + blob).digest(8)


def _check_lengths(row: Row, tenant: bytes, kind: bytes, key: bytes, metadata: bytes) -> None:
    for name, value, most in (("tenant", tenant, 255), ("kind", kind, 255), ("key", key, 65_535)):
        if len(value) > most:
            raise DataError(
                f"a {name} of {len(value):,} bytes: {value[:60].decode(errors='replace')!r}...",
                why=f"it may have {most:,}",
                fix="put what is longer into the content or the metadata",
            )
    if len(row.vector) > 65_535 or len(row.model) > 255 or len(row.hash) != 32:
        raise ValueError("a vector has at most 65,535 bytes, a model's id 255, and a hash 32")
    if (row.container is not None) + (row.cold is not None) + (row.same_as is not None) != 1:
        raise ValueError("a row has a container, or lies cold, or is the same as another: one of the three")
    if max(row.raw_size, row.stored_bytes) >> 32:
        raise DataError(
            f"the record {row.key[:80]!r} has {row.raw_size:,} bytes", why="sizes are kept in 32 bits", fix="split it into several"
        )
