"""The memory: put records, get them back, find them by likeness.

    with Memory.open("notes") as memory:
        memory.put("paris", "The meeting in Paris is on the third of May.")
        memory.get("paris").content
        memory.search("when do we meet?")[0].key

Records are durable when `put` returns. One process writes at a time, any number may read; threads may share a memory.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from logging import getLogger
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pantheraml.errors import DataError, StorageError
from pantheraml.memory.codec import Codecs
from pantheraml.memory.cold import Cold
from pantheraml.memory.container import DELTA, NAMES, pack
from pantheraml.memory.contents import Contents
from pantheraml.memory.finder import Finder
from pantheraml.memory.ledger import What
from pantheraml.memory.policy import Budgets
from pantheraml.memory.record import JSON, Content, Decoded, Form, Hit, Info, Record, content_hash, from_bytes, to_bytes
from pantheraml.memory.records import Records
from pantheraml.memory.rows import Row
from pantheraml.memory.same import Likeness, bands, signatures, verify
from pantheraml.memory.seal import Keys
from pantheraml.memory.shared import Shared
from pantheraml.memory.warm import Warm
from pantheraml.memory.zstd import ZstdCodec

if TYPE_CHECKING:
    from pantheraml.hardware.device import Device
    from pantheraml.memory.learning import Trained
    from pantheraml.memory.neural import NeuralCodec
    from pantheraml.memory.repair import Repaired
    from pantheraml.memory.upkeep import Compacted, Progress, Verified

COLD, SHARED, INDEX = "cold", "shared", "index"
DICTIONARIES, MODEL, QUARANTINE = "dictionaries", "model", "quarantine"
SMALL_LEVEL = 19
"""Of zstd, for what is encoded once and kept long."""
NEAR_BYTES = 200
"""Bytes from which on a record is compared with those like it: of a shorter one a difference is hardly smaller."""
NEAR_ENOUGH = 0.5
"""Likeness from which on a record is kept as what differs, if that is smaller."""
_FORMS_WITH_TEXT = ("text", "json")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_log = getLogger(__name__)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts of a tenant's records, and of the files of the whole store, in bytes."""

    records: int
    by_tier: Mapping[str, int]
    by_codec: Mapping[str, int]
    shared_contents: int
    raw_bytes: int
    stored_bytes: int
    vector_bytes: int
    quarantined: int
    disk_bytes: int
    index_bytes: int
    embedder: str
    encrypted: bool

    @property
    def lines(self) -> list[tuple[str, str]]:
        """(what, how much) for a person."""
        ratio = f" ({self.raw_bytes / self.stored_bytes:.2f} times smaller)" if self.stored_bytes else ""
        return [
            ("records", f"{self.records:,}"),
            *((f"  {tier}", f"{count:,}") for tier, count in self.by_tier.items()),
            *((f"  by {codec}", f"{count:,}") for codec, count in self.by_codec.items()),
            ("with the content of another", f"{self.shared_contents:,}"),
            ("content", f"{self.raw_bytes:,} bytes in {self.stored_bytes:,}{ratio}"),
            ("vectors", f"{self.vector_bytes:,} bytes ({self.embedder}), {self.index_bytes:,} in memory"),
            ("files of the store", f"{self.disk_bytes:,} bytes{', encrypted' if self.encrypted else ''}"),
            ("in quarantine", f"{self.quarantined:,}"),
        ]


@dataclass(frozen=True, slots=True)
class _Item:
    """A record on its way in. created: microseconds since 1970."""

    record: Record
    form: Form
    data: bytes
    hash: bytes
    created: int

    @property
    def text(self) -> str:
        """What searches find it by: of JSON its names and values, of bytes nothing."""
        return self.data.decode("utf-8", "replace") if self.form in _FORMS_WITH_TEXT else ""


class Parts:
    """What all memories of one open store share, whatever their tenant."""

    def __init__(
        self,
        path: Path,
        *,
        create: bool,
        readonly: bool,
        keys: Keys | None,
        embedder: str | None,
        device: str,
        budgets: Budgets,
        wait_s: float,
        announce: Callable[[str], None],
    ) -> None:
        self.path, self.readonly, self.budgets, self.announce = path, readonly, budgets, announce
        self.asked_device = device
        self.lock = threading.RLock()
        self.hot: dict[int, bytes] = {}
        """Contents that lie decoded in memory, by number; compacting says which."""
        with ExitStack() as stack:
            opened = Records if readonly else Warm
            how: dict[str, Any] = {"readonly": readonly, "create": create, "wait_s": wait_s, "announce": announce}
            self.records: Records = stack.enter_context(opened(path, keys=keys, **how))
            readonly = readonly or self.records.readonly
            self.shared = Shared(path / SHARED, readonly=readonly, announce=announce)
            self.cold = Cold(path / COLD, readonly=readonly, announce=announce)
            self.contents = Contents(self.records, self.cold)
            self.open_codecs()
            self.finder = Finder(self.records, self.shared, path / INDEX, asked=embedder, device=lambda: self.device, announce=announce)
            self._stack = stack.pop_all()

    @cached_property
    def device(self) -> Device:
        """Where models compute; looked for when it is needed."""
        from pantheraml.hardware.device import parse_device
        from pantheraml.hardware.find import find
        from pantheraml.recipe.types import HardwareAsk

        kind, index = parse_device(self.asked_device)
        return find(HardwareAsk(kind=kind, index=index or 0), training=False, asked_by=f"device={self.asked_device!r}").device

    @property
    def warm(self) -> Warm:
        """To be written. Raises: ValueError if the store was opened for reading."""
        if not isinstance(self.records, Warm):
            raise ValueError("the store was opened for reading")
        return self.records

    def open_codecs(self) -> None:
        """As the settings say which dictionaries and which model there are."""
        settings = self.records.settings()
        said: dict[str, Any] = json.loads(settings.get(DICTIONARIES, b"{}"))
        self._settings = settings.get(DICTIONARIES), settings.get(MODEL)
        dictionaries = {kind: bytes.fromhex(each["id"]) for kind, each in said.items()}
        self.zstd = ZstdCodec(self.shared, dictionaries=dictionaries, announce=self.announce)
        small = ZstdCodec(self.shared, level=SMALL_LEVEL, dictionaries=dictionaries, announce=self.announce)
        self.neural = self._open_neural(settings.get(MODEL))
        self.codecs = Codecs(self.zstd, self.neural, bases=self.contents.bases, announce=self.announce)
        self.small_codecs = Codecs(small, self.neural, bases=self.contents.bases, announce=self.announce)
        self.contents.codecs = self.codecs

    def _open_neural(self, id: bytes | None) -> NeuralCodec | None:
        if id is None:
            return None
        from pantheraml.memory.neural import NeuralCodec

        return NeuralCodec.open(self.shared, bytes.fromhex(id.decode()), device=lambda: self.device)

    def close(self) -> None:
        """Ends it, and keeps the index."""
        with self.lock:
            if not self.readonly and not self.records.readonly:
                self.finder.save()
            self._stack.close()

    @property
    def quarantined(self) -> dict[int, str]:
        """Number of each record that has failed a check, and why."""
        said: dict[str, str] = json.loads(self.records.settings().get(QUARANTINE, b"{}"))
        return {int(id): why for id, why in said.items()}

    def quarantine(self, failed: Mapping[int, str]) -> None:
        """Records that have failed a check are no longer found; getting one says why. They leave it when they are put again."""
        if failed and not self.records.readonly:
            known = self.quarantined
            self.warm.set({QUARANTINE: json.dumps({str(id): why for id, why in {**known, **failed}.items()}).encode()})
            self.finder.hot.remove(list(failed))

    def restored(self, ids: Iterable[int]) -> None:
        """They were put again."""
        known = self.quarantined
        left = {str(id): why for id, why in known.items() if id not in set(ids)}
        if len(left) < len(known):
            self.warm.set({QUARANTINE: json.dumps(left).encode()})


class Memory:
    """The records of one tenant in a store. Make it with `open`; see the head of this file."""

    def __init__(self, parts: Parts, tenant: str, *, owner: bool) -> None:
        self.parts, self.tenant, self._owner = parts, tenant, owner

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        tenant: str = "default",
        create: bool = True,
        readonly: bool = False,
        keys: Keys | None = None,
        embedder: str | None = None,
        device: str = "auto",
        budgets: Budgets | None = None,
        wait_s: float = 0.0,
        announce: Callable[[str], None] = _log.warning,
    ) -> Memory:
        """Open a store, or make one.

        Args:
            path: its folder. tenant: whose records; see `of` for another one's.
            readonly: change nothing; any number of processes may, beside the one that writes.
            keys: of an encrypted store; given to a new one, that is encrypted.
            embedder: how records are found: "lexical", which needs no model, or "model NAME", any model of the Hub or a folder.
            device: where models compute ("cpu", "cuda:1", "auto"). budgets: what compacting keeps where.
            wait_s: for another process that writes. announce: hears of damage, in sentences.
        Raises: StorageError if it is locked, damaged beyond reading, or the key is wrong; RecipeError for another embedder than its own.
        """
        parts = Parts(
            Path(path),
            create=create,
            readonly=readonly,
            keys=keys,
            embedder=embedder,
            device=device,
            budgets=budgets or Budgets(),
            wait_s=wait_s,
            announce=announce,
        )
        return cls(parts, tenant, owner=True)

    def of(self, tenant: str) -> Memory:
        """The records of another tenant in the same store; closing it closes nothing."""
        return Memory(self.parts, tenant, owner=False)

    # ---- Putting -------------------------------------------------------------------------------------------------

    def put(
        self,
        key: str,
        content: Content,
        *,
        kind: str = "note",
        created: datetime | None = None,
        metadata: Mapping[str, JSON] | None = None,
    ) -> Stored:
        """Keep a record, in place of one with the same key. It is on the disk when this returns.

        Raises: DataError for content that is neither text, bytes nor JSON; StorageError if the disk refuses.
        """
        return self.put_many([Record(key=key, content=content, kind=kind, created=created, metadata=metadata or {})])[0]

    def put_many(self, records: Iterable[Record]) -> list[Stored]:
        """Keep records, all of them or, after an error, none. Of two with one key the later one stays.

        Raises: see `put`; ValueError for a record of another tenant.
        """
        parts, now = self.parts, time.time_ns() // 1000
        items = [self._item(record, now) for record in records]
        with parts.lock, parts.warm.write():
            last = {item.record.key: item for item in items}
            stored = {each.key: each for each in self._put(list(last.values()))}
        return [stored[item.record.key] for item in items]

    def _item(self, record: Record, now: int) -> _Item:
        if record.tenant not in (None, self.tenant):
            raise ValueError(f"a record of {record.tenant!r}, in the memory of {self.tenant!r}: put it into memory.of({record.tenant!r})")
        if not record.key:
            raise DataError("a record has no key", why="its key is how it is found again", fix="give each record a key of its own")
        form, data = to_bytes(record.content)
        created = now if record.created is None else _microseconds(record.created)
        return _Item(record, form, data, content_hash(form, data), created)

    def _put(self, items: list[_Item]) -> list[Stored]:
        """Distinct keys, within a transaction."""
        parts, warm = self.parts, self.parts.warm
        ids = warm.find_many([(self.tenant, item.record.key) for item in items])
        old = warm.rows([id for id in ids if id is not None])
        # What others need of the records that go is moved to the others first.
        if changed := parts.contents.released(list(old)):
            warm.replace(changed, What.MOVE)
        fresh = warm.reserve(len(items) - len(old))
        numbers = iter(fresh)
        ids = [next(numbers) if id is None else id for id in ids]
        owners = self._owners(items, ids, set(old))
        own = [i for i, owner in enumerate(owners) if owner == ids[i]]
        near = self._near([items[i] for i in own], set(old))
        rows = self._rows(items, ids, owners, own, near)
        taken = bands_of([item for i, item in enumerate(items) if i in set(own)])
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
        keys = {row.id: row.key for row in rows} | {id: row.key for id, row in warm.rows([o for o in owners if o not in set(ids)]).items()}
        likeness = dict(zip(own, near, strict=True))
        return [self._stored(row, keys.get(owner), likeness.get(i)) for i, (row, owner) in enumerate(zip(rows, owners, strict=True))]

    def _owners(self, items: list[_Item], ids: list[int], old: set[int]) -> list[int]:
        """For each record the number of the one that has its content: itself, one before it, or one that is stored and stays."""
        stored = self.parts.warm.by_hashes([(self.tenant, item.hash) for item in items])
        first: dict[bytes, int] = {}
        owners: list[int] = []
        for item, id, known in zip(items, ids, stored, strict=True):
            owners.append(known if known is not None and known not in old else first.setdefault(item.hash, id))
        return owners

    def _near(self, items: list[_Item], old: set[int]) -> list[_Near | None]:
        """For each record the one most like it that is stored, stays, and stands for itself."""
        warm, found = self.parts.warm, list[_Near | None]([None] * len(items))
        wanted = [(i, each) for i, each in enumerate(bands_of(items)) if each is not None]
        if not wanted:
            return found
        candidates = warm.near(np.stack([each for _, each in wanted]), most=4)
        rows = warm.rows(sorted({id for ids in candidates for id in ids} - old))
        fit = {id: row for id, row in rows.items() if row.tenant == self.tenant and row.codec != DELTA and row.same_as is None}
        fit = {id: row for id, row in fit.items() if row.fidelity == "exact" and row.form in _FORMS_WITH_TEXT}
        contents = dict(zip(fit, self.parts.contents.of(list(fit.values())), strict=True))
        for (i, _), ids in zip(wanted, candidates, strict=True):
            for id in ids:
                content = contents.get(id)
                if isinstance(content, bytes):
                    likeness = verify(items[i].text, content.decode("utf-8", "replace"))
                    if likeness.similarity >= NEAR_ENOUGH and (
                        (best := found[i]) is None or likeness.similarity > best.likeness.similarity
                    ):
                        found[i] = _Near(fit[id], content, likeness)
        return found

    def _rows(self, items: list[_Item], ids: list[int], owners: list[int], own: list[int], near: list[_Near | None]) -> list[Row]:
        payloads = self.parts.codecs.encode(
            [items[i].data for i in own],
            [items[i].form for i in own],
            [items[i].record.kind for i in own],
            near=[None if each is None else (each.row.id, each.content) for each in near],
        )
        encoded = dict(zip(own, payloads, strict=True))
        vectors = self.parts.finder.vectors([item.text for item in items])
        origin = self.parts.finder.embedder.origin
        rows: list[Row] = []
        for i, item in enumerate(items):
            payload = encoded.get(i)
            container = None if payload is None else pack(payload)
            rows.append(
                Row(
                    id=ids[i],
                    key=item.record.key,
                    kind=item.record.kind,
                    tenant=self.tenant,
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
                    vector=vectors[i] if item.text else b"",
                )
            )
        return rows

    def _stored(self, row: Row, owner: str | None, near: _Near | None) -> Stored:
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

    # ---- Getting -------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Decoded:
        """A record, as it was put.

        Raises: DataError if there is none of that key; StorageError if it is damaged: it is then in quarantine until it is put again.
        """
        found = self.get_many([key])
        if key not in found:
            raise DataError(
                f"there is no record {key!r} of {self.tenant!r}",
                why="it was never put, or was deleted",
                fix="search for it, or check the key",
            )
        return found[key]

    def get_many(self, keys: Sequence[str]) -> dict[str, Decoded]:
        """Those of some records that are there. Raises: StorageError as `get`."""
        parts = self.parts
        ids = [id for id in parts.records.find_many([(self.tenant, key) for key in keys]) if id is not None]
        rows = list(parts.records.rows(ids).values())
        contents = self._contents(rows)
        failed = {row.id: each.what for row, each in zip(rows, contents, strict=True) if isinstance(each, StorageError)}
        parts.quarantine(failed)
        decoded: dict[str, Decoded] = {}
        for row, content in zip(rows, contents, strict=True):
            if isinstance(content, StorageError):
                raise StorageError(f"record {row.key!r}: {content.what}", why=content.why, fix=content.fix)
            exact = row.fidelity == "exact"
            decoded[row.key] = Decoded(
                content=from_bytes(row.form if exact else "text", content), exact=exact, score=row.score, info=self._info(row)
            )
        if isinstance(parts.records, Warm) and not parts.records.readonly:
            parts.records.touch([row.id for row in rows], time.time_ns() // 1000)
        return decoded

    def _contents(self, rows: list[Row]) -> list[bytes | StorageError]:
        hot = self.parts.hot
        held = {row.id: hot[row.id] for row in rows if row.id in hot}
        rest = [row for row in rows if row.id not in held]
        found = dict(zip((row.id for row in rest), self.parts.contents.of(rest), strict=True))
        return [held[row.id] if row.id in held else found[row.id] for row in rows]

    def search(
        self,
        text: str,
        k: int = 10,
        *,
        kind: str | None = None,
        metadata: Mapping[str, JSON] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[Hit]:
        """The records most like a text, the likest first: `k` of them, or all that fit if they are fewer.

        Args:
            kind: of these only. metadata: which have all of these names with these values. since, until: created at or after, and before.
        """
        self.parts.finder.refresh()
        found = self.parts.finder.search(
            text,
            k,
            tenant=self.tenant,
            kind=kind,
            metadata=metadata,
            since=None if since is None else _microseconds(since),
            until=None if until is None else _microseconds(until),
        )
        rows = self.parts.records.rows([id for id, _ in found], damaged=lambda id, error: None)
        return [
            Hit(id=id, key=row.key, kind=row.kind, tenant=row.tenant, score=score, metadata=row.metadata)
            for id, score in found
            if (row := rows.get(id)) is not None and row.tenant == self.tenant
        ]

    def near(self, key: str) -> list[tuple[str, Likeness]]:
        """Records that may be versions of this one, the likest first: each with what a comparison of the texts has found.

        Raises: DataError if there is no such record.
        """
        text = _text_of(self.get(key).content)
        found: list[tuple[str, Likeness]] = []
        numbers = bands(signatures([text]).minhash)
        for row in self.parts.records.rows(self.parts.records.near(numbers)[0]).values():
            if row.tenant == self.tenant and row.key != key:
                found.append((row.key, verify(text, _text_of(self.get(row.key).content))))
        return sorted(found, key=lambda each: -each[1].similarity)

    def infos(self) -> Iterator[Info]:
        """What is known of each record, in the order in which they came."""
        for row in self.parts.records.scan():
            if row.tenant == self.tenant:
                yield self._info(row)

    def __contains__(self, key: str) -> bool:
        return self.parts.records.find(self.tenant, key) is not None

    def __len__(self) -> int:
        self.parts.finder.refresh()
        return sum(1 for _ in self.infos())

    def _info(self, row: Row) -> Info:
        owner = row if row.same_as is None else self.parts.contents.place(row)
        return Info(
            id=row.id,
            key=row.key,
            kind=row.kind,
            tenant=row.tenant,
            created=_EPOCH + timedelta(microseconds=row.created),
            metadata=row.metadata,
            tier="hot" if row.id in self.parts.hot else owner.tier,
            codec=NAMES[owner.codec],
            model=owner.model.hex() or None,
            origin=owner.origin,
            raw_bytes=row.raw_size,
            stored_bytes=row.stored_bytes,
            hash=row.hash.hex(),
            fidelity=row.fidelity,
        )

    # ---- Forgetting, and looking after it ------------------------------------------------------------------------

    def delete(self, key: str) -> bool:
        """Forget a record; False if there is none. Its bytes leave store.db with it, and a cold segment when that is compacted."""
        return bool(self.delete_many([key]))

    def delete_many(self, keys: Sequence[str]) -> int:
        """Forget records. Returns: how many of them there were."""
        parts = self.parts
        with parts.lock, parts.warm.write():
            ids = [id for id in parts.records.find_many([(self.tenant, key) for key in dict.fromkeys(keys)]) if id is not None]
            if changed := parts.contents.released(ids):
                parts.warm.replace(changed, What.MOVE)
            parts.warm.delete(ids)
            parts.finder.hot.remove(ids)
            for id in ids:
                parts.hot.pop(id, None)
            return len(ids)

    def stats(self) -> Stats:
        """Counts and sizes; reads all rows of the store."""
        tiers, codecs = dict[str, int](), dict[str, int]()
        raw = stored = vectors = same = records = 0
        for row in self.parts.records.scan(damaged=lambda id, error: None):
            if row.tenant == self.tenant:
                records += 1
                raw, stored, vectors, same = (
                    raw + row.raw_size,
                    stored + row.stored_bytes,
                    vectors + len(row.vector),
                    same + (row.same_as is not None),
                )
                tiers[row.tier] = tiers.get(row.tier, 0) + 1
                if row.same_as is None:
                    codecs[NAMES[row.codec]] = codecs.get(NAMES[row.codec], 0) + 1
        files = [each for each in self.parts.path.rglob("*") if each.is_file()]
        return Stats(
            records=records,
            by_tier=tiers,
            by_codec=codecs,
            shared_contents=same,
            raw_bytes=raw,
            stored_bytes=stored,
            vector_bytes=vectors,
            quarantined=len(self.parts.quarantined),
            disk_bytes=sum(each.stat().st_size for each in files),
            index_bytes=self.parts.finder.hot.memory_bytes,
            embedder=self.parts.finder.embedder.name,
            encrypted=self.parts.records.seal is not None,
        )

    def compact(self, *, now: float | None = None, progress: Progress | None = None) -> Compacted:
        """Move all records of the store to the tiers where they belong, and encode them anew; see `upkeep.compact`."""
        from pantheraml.memory import upkeep

        return upkeep.compact(self.parts, now=now, progress=progress or upkeep.silent)

    def verify(self, *, progress: Progress | None = None) -> Verified:
        """Read every byte of the store, and decode every record; see `upkeep.verify`."""
        from pantheraml.memory import upkeep

        return upkeep.verify(self.parts, progress=progress or upkeep.silent)

    def train(self, *, minutes: float = 5.0, model: bool = True, progress: Progress | None = None) -> Trained:
        """Learn from all records of the store: dictionaries, vectors, and the model of the neural codec; see `learning.train`."""
        from pantheraml.memory import learning, upkeep

        return learning.train(self.parts, minutes=minutes, model=model, progress=progress or upkeep.silent)

    def rotate(self, keys: Keys) -> None:
        """Exchange the master key. What was written before is sealed anew by `compact`.

        Raises: StorageError if the store is not encrypted.
        """
        with self.parts.lock:
            self.parts.warm.rotate(keys)

    @staticmethod
    def repair(path: Path | str, *, keys: Keys | None = None, announce: Callable[[str], None] = _log.warning) -> Repaired:
        """Make a damaged store sound, with all that can still be read; see `repair.repair`."""
        from pantheraml.memory.repair import repair

        return repair(Path(path), keys=keys, announce=announce)

    def export(self, path: Path | str) -> int:
        """Write all records of the tenant as lines of JSON. Returns how many.

        Raises: StorageError for a record that is damaged, or if the file cannot be written.
        """
        count = 0
        try:
            with Path(path).open("w", encoding="utf-8", errors="surrogatepass") as out:
                for info in self.infos():
                    content = self.get(info.key).content
                    said: dict[str, Any] = (
                        {"base64": base64.b64encode(content).decode()} if isinstance(content, bytes) else {"content": content}
                    )
                    about = {"kind": info.kind, "created": info.created.isoformat(), "metadata": dict(info.metadata)}
                    out.write(json.dumps({"key": info.key, **said, **about}) + "\n")
                    count += 1
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written: {error.strerror or error}",
                why="the records go there",
                fix="name a file in a folder that you may write to",
            ) from error
        return count

    def close(self) -> None:
        """End it. What was put is on the disk already."""
        if self._owner:
            self.parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Near:
    """The record most like another one: its row, its content, and what a comparison has found."""

    row: Row
    content: bytes
    likeness: Likeness


def bands_of(items: Sequence[_Item]) -> list[np.ndarray | None]:
    """What each record is found by that is like another one; None for what is too short, or no text."""
    wanted = [i for i, item in enumerate(items) if item.form in _FORMS_WITH_TEXT and len(item.data) >= NEAR_BYTES]
    found = dict(zip(wanted, bands(signatures([items[i].text for i in wanted]).minhash), strict=True)) if wanted else {}
    return [found.get(i) for i in range(len(items))]


def _text_of(content: Content) -> str:
    return to_bytes(content)[1].decode("utf-8", "replace")


def _microseconds(at: datetime) -> int:
    """Since 1970. Raises: ValueError without a time zone: the same words would mean another time elsewhere."""
    if at.tzinfo is None:
        raise ValueError(f"{at} has no time zone: give it one, such as datetime.now(UTC)")
    return (at - _EPOCH) // timedelta(microseconds=1)
