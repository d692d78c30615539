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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from logging import getLogger
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pantheraml.errors import DataError, StorageError
from pantheraml.memory.census import Stats, count
from pantheraml.memory.container import NAMES
from pantheraml.memory.gist import Summarise
from pantheraml.memory.intake import EPOCH, Intake, Stored, microseconds
from pantheraml.memory.ledger import What
from pantheraml.memory.parts import Parts
from pantheraml.memory.policy import Budgets
from pantheraml.memory.record import JSON, Content, Decoded, Fidelity, Hit, Info, Record, from_bytes, to_bytes
from pantheraml.memory.rows import Row
from pantheraml.memory.same import Likeness, bands, signatures, verify
from pantheraml.memory.seal import Keys
from pantheraml.memory.warm import Warm

if TYPE_CHECKING:
    from pantheraml.memory.learning import Trained
    from pantheraml.memory.repair import Repaired
    from pantheraml.memory.upkeep import Compacted, Progress, Verified

_log = getLogger(__name__)


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
        summarise: Summarise | None = None,
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
            summarise: makes the summaries of gists, see `gist.summaries_by`; None: they have none.
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
            summarise=summarise,
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
        fidelity: Fidelity = "exact",
    ) -> Stored:
        """Keep a record, in place of one with the same key. It is on the disk when this returns.

        Args:
            fidelity: gist: keep only what it is about; `get` then gives the summary, if there is one, and says how like it is.
        Raises: DataError for content that is neither text, bytes nor JSON; StorageError if the disk refuses.
        """
        return self.put_many([Record(key=key, content=content, kind=kind, created=created, metadata=metadata or {}, fidelity=fidelity)])[0]

    def put_many(self, records: Iterable[Record]) -> list[Stored]:
        """Keep records, all of them or, after an error, none. Of two with one key the later one stays.

        Raises: see `put`; ValueError for a record of another tenant.
        """
        parts, now = self.parts, time.time_ns() // 1000
        intake = Intake(parts, self.tenant)
        items = [intake.item(record, now) for record in records]
        with parts.lock, parts.finder.changing(), parts.warm.write():
            last = {item.record.key: item for item in items}
            stored = {each.key: each for each in intake.put(list(last.values()))}
        return [stored[item.record.key] for item in items]

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
            since=None if since is None else microseconds(since),
            until=None if until is None else microseconds(until),
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
        numbers = bands(signatures([text]).minhash, self.parts.records.marks.bands(self.tenant))
        for row in self.parts.records.rows(self.parts.records.near(numbers)[0]).values():
            if row.tenant == self.tenant and row.key != key and (there := self.get_many([row.key])):  # else deleted meanwhile
                found.append((row.key, verify(text, _text_of(there[row.key].content))))
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
            created=EPOCH + timedelta(microseconds=row.created),
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
        with parts.lock, parts.finder.changing(), parts.warm.write():
            ids = [id for id in parts.records.find_many([(self.tenant, key) for key in dict.fromkeys(keys)]) if id is not None]
            if changed := parts.contents.released(ids):
                parts.warm.replace(changed, What.MOVE)
            parts.warm.delete(ids)
            parts.finder.remove(ids)
            for id in ids:
                parts.hot.pop(id, None)
            return len(ids)

    def stats(self) -> Stats:
        """Counts and sizes; reads all rows of the store."""
        return count(self.parts, self.tenant)

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
        """Make a damaged store sound, with all that can still be read; see `repair.repair` and `mend.mend_cold`."""
        from pantheraml.memory.mend import mend_cold
        from pantheraml.memory.repair import repair

        found = repair(Path(path), keys=keys, announce=announce)
        with Memory.open(path, keys=keys, create=False, announce=announce) as memory:
            return mend_cold(memory.parts, found)

    def export(self, path: Path | str) -> int:
        """Write all records of the tenant as lines of JSON. Returns how many. The file is there, or changed, only once it is whole.

        Raises: StorageError for a record that is damaged, or if the file cannot be written.
        """
        path, count = Path(path), 0
        unfinished = path.with_name(f"{path.name}.part")
        try:
            with unfinished.open("w", encoding="utf-8", errors="surrogatepass") as out:
                for key in [info.key for info in self.infos()]:
                    found = self.get_many([key]).get(key)
                    if found is None:  # deleted meanwhile
                        continue
                    out.write(json.dumps(_line(found), ensure_ascii=False) + "\n")
                    count += 1
            unfinished.replace(path)
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written: {error.strerror or error}",
                why="the records go there",
                fix="name a file in a folder that you may write to",
            ) from error
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        return count

    def close(self) -> None:
        """End it. What was put is on the disk already."""
        if self._owner:
            self.parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _line(found: Decoded) -> dict[str, Any]:
    """A record as `pantheraml memory import` reads it. Of a gist that is its summary."""
    content, info = found.content, found.info
    said: dict[str, Any] = {"key": info.key}
    said |= {"base64": base64.b64encode(content).decode()} if isinstance(content, bytes) else {"content": content}
    said |= {"kind": info.kind, "created": info.created.isoformat(), "metadata": dict(info.metadata)}
    return said if found.exact else said | {"fidelity": "gist"}


def _text_of(content: Content) -> str:
    return to_bytes(content)[1].decode("utf-8", "replace")
