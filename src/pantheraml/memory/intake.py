"""How records come in: what is equal is stored once, what is like another is kept as what differs, the rest is encoded in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import get_args

import numpy as np

from pantheraml.errors import DataError
from pantheraml.memory.container import DELTA, NAMES, pack
from pantheraml.memory.ledger import What
from pantheraml.memory.parts import Parts
from pantheraml.memory.record import Fidelity, Form, Record, content_hash, to_bytes
from pantheraml.memory.rows import Row
from pantheraml.memory.same import Likeness, bands, signatures, verify

NEAR_BYTES = 200
"""Bytes from which on a record is compared with those like it: of a shorter one a difference is hardly smaller."""
NEAR_ENOUGH = 0.5
"""Likeness from which on a record is kept as what differs, if that is smaller."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FORMS_WITH_TEXT = ("text", "json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What became of a record that was put.

    Attributes:
        codec: that has encoded it. stored_bytes: of its container; 0 where it has the content of `same_as`.
        same_as: key of a record with equal content. near: key of the record most like it, if one was met. likeness: to that one, 0 to 1.
    """

    key: str
    id: int
    codec: str
    raw_bytes: int
    stored_bytes: int
    same_as: str | None = None
    near: str | None = None
    likeness: float | None = None

    @property
    def said(self) -> str:
        """In a sentence."""
        if self.same_as is not None:
            return f"{self.key}: the same as {self.same_as}, so nothing more is stored"
        near = f"; most like {self.near} ({self.likeness:.0%})" if self.near is not None else ""
        return f"{self.key}: {self.raw_bytes:,} bytes in {self.stored_bytes:,} ({self.codec}){near}"


@dataclass(frozen=True, slots=True)
class Item:
    """A record on its way in. created: microseconds since 1970."""

    record: Record
    form: Form
    data: bytes
    hash: bytes
    created: int

    @property
    def exact(self) -> bool:
        """Whether every byte of it is kept."""
        return self.record.fidelity == "exact"

    @property
    def text(self) -> str:
        """What searches find it by: of JSON its names and values, of bytes nothing."""
        return self.data.decode("utf-8", "replace") if self.form in _FORMS_WITH_TEXT else ""


@dataclass(frozen=True, slots=True)
class Near:
    """The record most like another one: its row, its content, and what a comparison has found."""

    row: Row
    content: bytes
    likeness: Likeness


def _bands_of(items: Sequence[Item], salt: int) -> list[np.ndarray | None]:
    """What each record is found by that is like another one; None for what is too short, or no text."""
    wanted = [i for i, item in enumerate(items) if item.form in _FORMS_WITH_TEXT and len(item.data) >= NEAR_BYTES]
    found = dict(zip(wanted, bands(signatures([items[i].text for i in wanted]).minhash, salt), strict=True)) if wanted else {}
    return [found.get(i) for i in range(len(items))]


class Intake:
    """Puts records of one tenant into a store.

    Args:
        parts: of the store, open for writing.
    """

    def __init__(self, parts: Parts, tenant: str) -> None:
        self._parts, self._tenant = parts, tenant

    def item(self, record: Record, now: int) -> Item:
        """A record as it will be stored. Raises: DataError if it cannot be; ValueError for a record of another tenant."""
        if record.tenant not in (None, self._tenant):
            raise ValueError(f"a record of {record.tenant!r}, in the memory of {self._tenant!r}: put it into memory.of({record.tenant!r})")
        _check(record)
        form, data = to_bytes(record.content)
        if record.fidelity == "gist" and form == "bytes":
            raise DataError(f"{record.key!r} is bytes, and a gist is asked for", why="only text has one", fix="put it with fidelity exact")
        created = now if record.created is None else microseconds(record.created)
        return Item(record, form, data, content_hash(form, data), created)

    def put(self, items: list[Item]) -> list[Stored]:
        """Keeps records with distinct keys, within a transaction."""
        parts, warm = self._parts, self._parts.warm
        ids = warm.find_many([(self._tenant, item.record.key) for item in items])
        old = warm.rows([id for id in ids if id is not None])
        # What others need of the records that go is moved to the others first.
        if changed := parts.contents.released(list(old)):
            warm.replace(changed, What.MOVE)
        fresh = warm.reserve(len(items) - len(old))
        numbers = iter(fresh)
        ids = [next(numbers) if id is None else id for id in ids]
        owners = self._owners(items, ids, set(old))
        own = [i for i, owner in enumerate(owners) if owner == ids[i] and items[i].exact]
        taken = _bands_of([items[i] for i in own], warm.marks.bands(self._tenant))
        near = self._near([items[i] for i in own], taken, set(old))
        rows = self._rows(items, ids, owners, own, near)
        warm.replace([row for row in rows if row.id in old])
        warm.insert([row for row in rows if row.id not in old])
        banded = [ids[i] for i, each in zip(own, taken, strict=True) if each is not None]
        if banded:
            warm.add_bands(banded, np.stack([each for each in taken if each is not None]))
        for id in old:
            parts.hot.pop(id, None)
        if old:
            parts.restored(old)
        parts.finder.add(rows)
        elsewhere = set(owners) - set(ids)
        keys = {row.id: row.key for row in rows} | {id: row.key for id, row in warm.rows(sorted(elsewhere)).items()}
        likeness = dict(zip(own, near, strict=True))
        return [self._stored(row, keys.get(owner), likeness.get(i)) for i, (row, owner) in enumerate(zip(rows, owners, strict=True))]

    def _owners(self, items: list[Item], ids: list[int], old: set[int]) -> list[int]:
        """For each record the number of the one that has its content: itself, one before it, or one that is stored and stays."""
        stored = self._parts.warm.by_hashes([(self._tenant, item.hash) for item in items])
        first: dict[bytes, int] = {}
        owners: list[int] = []
        for item, id, known in zip(items, ids, stored, strict=True):
            if not item.exact:
                owners.append(id)
                continue
            owners.append(known if known is not None and known not in old else first.setdefault(item.hash, id))
        return owners

    def _near(self, items: list[Item], taken: list[np.ndarray | None], old: set[int]) -> list[Near | None]:
        """For each record the one most like it, by the bands of each, that is stored, stays, and stands for itself."""
        warm, found = self._parts.warm, list[Near | None]([None] * len(items))
        wanted = [(i, each) for i, each in enumerate(taken) if each is not None]
        if not wanted:
            return found
        candidates = warm.near(np.stack([each for _, each in wanted]), most=4)
        rows = warm.rows(sorted({id for ids in candidates for id in ids} - old))
        fit = {id: row for id, row in rows.items() if row.tenant == self._tenant and row.codec != DELTA and row.same_as is None}
        fit = {id: row for id, row in fit.items() if row.fidelity == "exact" and row.form in _FORMS_WITH_TEXT}
        contents = dict(zip(fit, self._parts.contents.of(list(fit.values())), strict=True))
        for (i, _), ids in zip(wanted, candidates, strict=True):
            for id in ids:
                content = contents.get(id)
                if isinstance(content, bytes):
                    likeness = verify(items[i].text, content.decode("utf-8", "replace"))
                    if likeness.similarity >= NEAR_ENOUGH and (
                        (best := found[i]) is None or likeness.similarity > best.likeness.similarity
                    ):
                        found[i] = Near(fit[id], content, likeness)
        return found

    def _rows(self, items: list[Item], ids: list[int], owners: list[int], own: list[int], near: list[Near | None]) -> list[Row]:
        payloads = self._parts.codecs.encode(
            [items[i].data for i in own],
            [items[i].form for i in own],
            [items[i].record.kind for i in own],
            near=[None if each is None else (each.row.id, each.content) for each in near],
        )
        encoded = dict(zip(own, payloads, strict=True))
        vectors = self._parts.finder.vectors([item.text for item in items])
        short = [i for i, item in enumerate(items) if not item.exact]
        gists = dict(zip(short, self._parts.gists().encode([items[i].text for i in short]), strict=True)) if short else {}
        encoded |= dict(zip(gists, self._parts.codecs.encode_gists([each.text for each in gists.values()]), strict=True))
        origin = self._parts.finder.embedder.origin
        rows: list[Row] = []
        for i, item in enumerate(items):
            payload = encoded.get(i)
            container = None if payload is None else pack(payload)
            rows.append(
                Row(
                    id=ids[i],
                    key=item.record.key,
                    kind=item.record.kind,
                    tenant=self._tenant,
                    created=item.created,
                    metadata=dict(item.record.metadata),
                    form=item.form,
                    hash=item.hash,
                    raw_size=len(item.data),
                    codec=0 if payload is None else payload.codec,
                    model=b"" if payload is None else payload.model,
                    stored_bytes=0 if container is None else len(container),
                    origin=origin,
                    container=container,
                    same_as=owners[i] if payload is None else None,
                    vector=gists[i].vector if i in gists else vectors[i] if item.text else b"",
                    fidelity=item.record.fidelity,
                    score=gists[i].score if i in gists else None,
                )
            )
        return rows

    def _stored(self, row: Row, owner: str | None, near: Near | None) -> Stored:
        return Stored(
            key=row.key,
            id=row.id,
            codec=NAMES[row.codec] if row.same_as is None else "same",
            raw_bytes=row.raw_size,
            stored_bytes=row.stored_bytes,
            same_as=owner if row.same_as is not None else None,
            near=None if near is None else near.row.key,
            likeness=None if near is None else near.likeness.similarity,
        )


def _check(record: Record) -> None:
    """Raises: DataError for what types would have said: rows of JSONL, and callers who check none, bring anything."""
    if not record.key:
        raise DataError("a record has no key", why="its key is how it is found again", fix="give each record a key of its own")
    wanted: tuple[tuple[str, object, type, str], ...] = (
        ("key", record.key, str, "text"),
        ("kind", record.kind, str, "text"),
        ("created", record.created or EPOCH, datetime, "a datetime"),
        ("metadata", record.metadata, Mapping, "names with values"),
    )
    for name, value, type_, what in wanted:
        if not isinstance(value, type_):
            raise DataError(f"the {name} of {record.key!r} is {value!r:.80}", why=f"it is {what}", fix="correct it")
    if record.fidelity not in get_args(Fidelity):
        raise DataError(
            f"the fidelity of {record.key!r} is {record.fidelity!r}", why="it says what is kept", fix=f"choose of {get_args(Fidelity)}"
        )


def microseconds(at: datetime) -> int:
    """Since 1970.

    Raises: ValueError without a time zone: the same words would mean another time elsewhere; and for a time outside the years 1 to 9999
        in UTC, which Python could not give back.
    """
    if at.tzinfo is None:
        raise ValueError(f"{at} has no time zone: give it one, such as datetime.now(UTC)")
    try:
        return (at.astimezone(UTC) - EPOCH) // timedelta(microseconds=1)
    except OverflowError:
        raise ValueError(f"{at} is not within the years 1 to 9999 in UTC: give it another time") from None
