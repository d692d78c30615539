"""Finds records by likeness: the embedder of a store, and the hot index, kept in step with the rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pantheraml.errors import RecipeError, StorageError
from pantheraml.memory.columns import Entry
from pantheraml.memory.embed import Embedder, LexicalEmbedder, StaticEmbedder
from pantheraml.memory.hot import Hot
from pantheraml.memory.index import load_index, save_index
from pantheraml.memory.ledger import What
from pantheraml.memory.quantise import encode, from_rows, to_rows
from pantheraml.memory.record import JSON
from pantheraml.memory.records import Records
from pantheraml.memory.rows import Row
from pantheraml.memory.shared import Shared

if TYPE_CHECKING:
    from pantheraml.hardware.device import Device

SETTING = "embedder"
STATIC_SUFFIX = "nbe"
_AT_ONCE = 4096
_ABOUT_INDEX = b"index "


class Finder:
    """The vectors of a store's records. Safe to use from several threads.

    Args:
        records: whose rows hold the vectors. folder: of the index, which is made anew where it is not that of the rows.
        asked: the name of an embedder; None: the one that the store was made with.
        device: looks for where a model computes, when one does. quarantined: numbers of records that are not to be found.
    Raises: RecipeError if another embedder is asked for than that of the rows.
    """

    def __init__(
        self,
        records: Records,
        shared: Shared,
        folder: Path,
        *,
        asked: str | None,
        device: Callable[[], Device],
        announce: Callable[[str], None],
        quarantined: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._quarantined = quarantined
        self._records, self._shared, self._folder = records, shared, folder
        self._device, self._announce = device, announce
        self._lock = threading.Lock()
        self._changing: set[int] | None = None
        self._unsure = False
        self._open(asked)

    def _open(self, asked: str | None) -> None:
        stored = self._records.settings().get(SETTING, b"").decode()
        if asked and stored and asked != stored:
            raise RecipeError(
                f"the store finds its records by {stored}, and {asked} is asked for",
                why="vectors of two embedders cannot be compared",
                fix="leave embedder out; or export the store, and import that into a new one",
            )
        self.name = stored or asked or "lexical"
        self.embedder = open_embedder(self.name, self._shared, self._device)
        self._version = self._records.data_version()
        self._seq = self._records.tip.seq
        self.hot = Hot(self.embedder.dimensions, announce=self._announce)
        try:
            self._catch_up(self._loaded(self.hot))
        except StorageError as error:
            if any(self._folder.glob("*")):
                self._announce(f"{error.what}: {error.why}; it is made anew.")
            self.rebuild()

    def _loaded(self, hot: Hot) -> str:
        seal = self._records.seal
        return load_index(hot, self._folder, unseal=None if seal is None else lambda data, name: seal.unseal(data, _about(name)))

    def verify(self) -> list[str]:
        """Reads the index that is kept. Gives a sentence if it is damaged: it is then made anew from the rows."""
        if not any(self._folder.glob("*")):
            return []
        try:
            self._loaded(Hot(self.embedder.dimensions))
        except StorageError as error:
            return [f"{error.what}: {error.why}; the next start makes it anew"]
        return []

    def _catch_up(self, stamp: str) -> None:
        fingerprint, _, seq = stamp.partition(" ")
        if fingerprint != self.embedder.fingerprint or not seq.isdigit() or int(seq) > self._seq:
            raise StorageError(f"the index {self._folder} is of another state of the store", why=f"it says {stamp}", fix="none is needed")
        self._follow(int(seq))

    def rebuild(self) -> None:
        """All vectors read from the rows, without those that are damaged."""
        self.hot = Hot(self.embedder.dimensions, announce=self._announce)
        self._unsure = False
        rows = self._records.scan(damaged=lambda id, error: None)
        while some := list(islice(rows, _AT_ONCE)):
            self.add(some)
        self.hot.remove(list(self._quarantined()))

    # ---- In step with the rows -----------------------------------------------------------------------------------

    def vectors(self, texts: Sequence[str], by: Embedder | None = None) -> list[bytes]:
        """What rows keep of the vectors of texts. by: another embedder than the store's."""
        return to_rows(encode((by or self.embedder).embed(texts), "int8")) if texts else []

    def reopen(self) -> None:
        """The settings name another embedder, and all rows have its vectors."""
        with self._lock:
            self._open(None)

    def add(self, rows: Iterable[Row]) -> None:
        """Rows that were written; those without a vector are not found."""
        some = [row for row in rows if row.vector]
        if some:
            if self._changing is not None:
                self._changing.update(row.id for row in some)
            entries = [Entry(id=row.id, tenant=row.tenant, kind=row.kind, created=row.created, metadata=row.metadata) for row in some]
            self.hot.add(entries, from_rows([row.vector for row in some]))

    def remove(self, ids: Sequence[int]) -> None:
        """Records that are found no more."""
        if self._changing is not None:
            self._changing.update(ids)
        self.hot.remove(ids)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around a transaction of the store's one writer: if it ends in an error, the index says again what the rows say."""
        self._changing = changed = set[int]()
        try:
            yield
        except BaseException:
            before, self._unsure = self._unsure, True  # if the rows cannot be read either, what was saved before stays
            with suppress(StorageError):
                self.hot.remove(list(changed))
                self.add(self._records.rows(sorted(changed), damaged=lambda id, error: None).values())
                self._unsure = before
            raise
        finally:
            self._changing = None

    def refresh(self) -> None:
        """What another process has written since. Beside one that writes there is none; what it wrote itself was added then."""
        if not self._records.readonly:
            return
        with self._lock:
            version = self._records.data_version()
            if version == self._version:
                return
            self._version = version
            stored = self._records.settings().get(SETTING, b"").decode()
            if stored and stored != self.name:
                self._open(None)
                return
            self._follow(self._seq)

    def _follow(self, seq: int) -> None:
        changed: dict[int, What] = {}
        for change in self._records.changes(seq):
            seq = change.seq
            if change.id:
                changed[change.id] = change.what
        self._seq = seq
        gone = {id for id, what in changed.items() if what in (What.DELETE, What.LOST)}
        self.hot.remove(sorted(gone))
        rows = self._records.rows([id for id in changed if id not in gone], damaged=lambda id, error: None)
        self.add(rows.values())
        self.hot.remove(list(self._quarantined()))

    # ---- Searching -----------------------------------------------------------------------------------------------

    def search(
        self,
        text: str,
        k: int,
        *,
        tenant: str,
        kind: str | None,
        metadata: Mapping[str, JSON] | None,
        since: int | None,
        until: int | None,
    ) -> list[tuple[int, float]]:
        """(number, cosine) of a tenant's records nearest to a text, the nearest first."""
        query = self.embedder.embed([text])[0]
        found = self.hot.search(query, k, tenant=tenant, kind=kind, metadata=metadata, since=since, until=until)
        return list(zip(found.ids.tolist(), found.scores.tolist(), strict=True))

    def save(self) -> None:
        """Keep the index, so that the next start need not read all rows."""
        if self._unsure:
            return
        seal = self._records.seal
        with suppress(StorageError):  # it is derived: the next start makes it anew
            save_index(
                self.hot,
                self._folder,
                stamp=f"{self.embedder.fingerprint} {self._records.tip.seq}",
                seal=None if seal is None else lambda data, name: seal.seal(data, _about(name)),
            )


def open_embedder(name: str, shared: Shared, device: Callable[[], Device]) -> Embedder:
    """`lexical`, `static ID`, or `model NAME`. Raises: StorageError if what was trained is gone; RecipeError for another name."""
    kind, _, which = name.partition(" ")
    match kind:
        case "lexical":
            return LexicalEmbedder()
        case "static":
            return StaticEmbedder.from_bytes(shared.get(bytes.fromhex(which), STATIC_SUFFIX))
        case "model":
            from pantheraml.memory.model_embed import ModelEmbedder

            return ModelEmbedder(which, device())
        case _:
            raise RecipeError(
                f"there is no embedder {name!r}",
                why="lexical needs no model, `model NAME` is any model of the Hub or a folder, and static ones are made by training",
                fix='set embedder to "lexical" or "model NAME"',
            )


def _about(name: str) -> bytes:
    return _ABOUT_INDEX + name.encode()
