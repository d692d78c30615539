"""What keeps a store small and sound: records moved between tiers and encoded anew, space given back, everything checked.

Each step is a transaction, or leaves only what nobody points at: a kill loses nothing.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from pantheraml.errors import DataError, StorageError
from pantheraml.memory.container import DELTA, NEURAL, NEURAL_FLOAT, RAW, ZSTD, ZSTD_DICTIONARY
from pantheraml.memory.contents import about, with_payload
from pantheraml.memory.ledger import What
from pantheraml.memory.parts import DICTIONARIES, QUARANTINE, Parts
from pantheraml.memory.policy import TIERS, Entries, plan_moves, worn_segments
from pantheraml.memory.rows import Row
from pantheraml.memory.zstd import FEWEST_SAMPLES, MOST_SAMPLE_BYTES

AT_ONCE = 512
FREE_SHARE = 0.25
"""Of store.db that may be free before it is written anew."""
_REPEAT = 2
"""A dictionary is trained again when there are so many times as many records of its kind."""
Progress = Callable[[str, int, int], None]
"""Hears what is done, how many, and of how many."""
T = TypeVar("T")


def silent(what: str, done: int, of: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacted:
    """What compacting has done: how many records went where, and bytes of the files before and after."""

    to_cold: int = 0
    to_warm: int = 0
    hot: int = 0
    encoded_again: int = 0
    dictionaries: tuple[str, ...] = ()
    segments_removed: int = 0
    sealed_again: int = 0
    before_bytes: int = 0
    after_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @property
    def said(self) -> str:
        """In a sentence."""
        done = {
            "to cold": self.to_cold,
            "back to warm": self.to_warm,
            "encoded again": self.encoded_again,
            "sealed again": self.sealed_again,
            "segments removed": self.segments_removed,
        }
        parts = [f"{count:,} {what}" for what, count in done.items() if count]
        parts += [f"a dictionary for {', '.join(self.dictionaries)}"] if self.dictionaries else []
        return f"{'; '.join(parts) or 'nothing to do'}: {self.before_bytes:,} bytes before, {self.after_bytes:,} after"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What a check of everything has found. records: that were read. problems: a sentence each; none: all is as it was written."""

    records: int
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @property
    def said(self) -> str:
        """For a person."""
        if not self.problems:
            return f"{self.records:,} records, and every byte is as it was written"
        return "\n".join([f"{self.records:,} records, {len(self.problems):,} problems:", *(f"  {each}" for each in self.problems)])


# ---- Compacting ------------------------------------------------------------------------------------------------------


def compact(parts: Parts, *, now: float | None = None, progress: Progress = silent) -> Compacted:
    """Move records to the tiers where they belong, encode them as small as can be, and give space back.

    Args:
        now: seconds since 1970, by which age is told; None: the clock. progress: hears what is done, how many, and of how many.
    """
    with parts.lock:
        before = _disk_bytes(parts.path)
        with parts.warm.write():
            pass  # uses that were put off
        now = time.time() if now is None else now
        dictionaries = learn_dictionaries(parts)
        entries = _entries(parts)
        moves = plan_moves(entries, parts.budgets, now)
        again = _encode_again(parts, progress)
        to_cold = _to_cold(parts, moves.cold.tolist(), progress)
        to_warm = _to_warm(parts, [id for id in moves.warm.tolist() if id not in parts.hot], progress)
        _heat(parts, hot=moves.hot.tolist(), no_more=[*moves.warm.tolist(), *moves.cold.tolist()])
        removed = remove_worn(parts)
        sealed = _seal_again(parts)
        _give_back(parts)
        parts.finder.hot.catch_up()
        parts.finder.save()
        return Compacted(
            to_cold=to_cold,
            to_warm=to_warm,
            hot=len(parts.hot),
            encoded_again=again,
            dictionaries=tuple(dictionaries),
            segments_removed=removed,
            sealed_again=sealed,
            before_bytes=before,
            after_bytes=_disk_bytes(parts.path),
        )


def learn_dictionaries(parts: Parts) -> list[str]:
    """Train a dictionary for each kind that has records enough and none yet, or had far fewer then. Returns: those kinds."""
    stored: dict[str, Any] = json.loads(parts.kept(DICTIONARIES) or b"{}")
    counts: dict[str, int] = {}
    for row in parts.records.scan(damaged=lambda id, error: None):
        if _own(row):
            counts[row.kind] = counts.get(row.kind, 0) + 1
    learned: list[str] = []
    for kind, count in counts.items():
        if count < FEWEST_SAMPLES or (kind in stored and count < _REPEAT * stored[kind]["records"]):
            continue
        try:
            id = parts.zstd.train(kind, _samples(parts, kind, count))
        except DataError:  # too few bytes, or it does not help
            continue
        stored[kind] = {"id": id.hex(), "records": count}
        learned.append(kind)
    if learned:
        parts.keep(DICTIONARIES, json.dumps(stored).encode())
        parts.open_codecs()
    return learned


def _samples(parts: Parts, kind: str, count: int) -> list[bytes]:
    """Contents of a kind, spread over all of its records."""
    found: list[bytes] = []
    size, every = 0, max(1, count // 16_384)
    rows = (row for row in parts.records.scan(damaged=lambda id, error: None) if row.kind == kind and _own(row))
    for batch in batches(islice(rows, 0, None, every), AT_ONCE):
        contents = [each for each in parts.contents.of(batch) if isinstance(each, bytes)]
        found += contents
        size += sum(map(len, contents))
        if size > MOST_SAMPLE_BYTES:
            break
    return found


def _entries(parts: Parts) -> Entries:
    """What the policy wants to know of all records but those that have another one's content."""
    columns: list[tuple[int, int, int, int, float, int]] = []
    hot, warm, cold = range(len(TIERS))
    uses = parts.warm.uses()
    for row in parts.records.scan(damaged=lambda id, error: None):
        if row.same_as is None and row.fidelity == "exact":
            use = uses.get(row.id)
            tier = hot if row.id in parts.hot else warm if row.tier == "warm" else cold
            touched = max(row.created, use.last if use else 0) / 1e6
            columns.append((row.id, tier, row.raw_size, row.stored_bytes, touched, use.times if use else 0))
    id, tier, raw, stored, touched, times = (
        (np.array(each) for each in zip(*columns, strict=True)) if columns else (np.empty(0, np.int64),) * 6
    )
    return Entries(
        id=id.astype(np.int64),
        tier=tier.astype(np.int64),
        raw_bytes=raw.astype(np.int64),
        stored_bytes=stored.astype(np.int64),
        touched=touched.astype(np.float64),
        uses=times.astype(np.int64),
    )


def _encode_again(parts: Parts, progress: Progress) -> int:
    """Warm records that are smaller with the dictionary that their kind has now."""
    newest = parts.zstd.dictionaries
    old = [
        row.id
        for row in parts.records.scan(tier="warm", damaged=lambda id, error: None)
        if _own(row)
        and row.kind in newest
        and (row.codec in (RAW, ZSTD) or (row.codec == ZSTD_DICTIONARY and row.model != newest[row.kind]))
    ]
    return _encoded(parts, old, "zstd", "encoded again", progress, only_smaller=True)


def _to_warm(parts: Parts, ids: Sequence[int], progress: Progress) -> int:
    """Out of cold segments, by the codec that is fast."""
    return _encoded(parts, ids, "zstd", "back to warm", progress, only_smaller=False)


def _encoded(
    parts: Parts, ids: Sequence[int], codec: Literal["zstd", "neural"], what: str, progress: Progress, *, only_smaller: bool
) -> int:
    done = 0
    for batch in batches(iter(ids), AT_ONCE):
        rows = list(parts.records.rows(batch).values())
        changed: list[Row] = []
        for row, new in _again(parts, rows, codec):
            if not only_smaller or new.stored_bytes < row.stored_bytes:
                changed.append(new)
        if changed:
            parts.warm.replace(changed, What.MOVE)
        done += len(changed)
        progress(what, done, len(ids))
    return done


def _again(parts: Parts, rows: Sequence[Row], codec: Literal["zstd", "neural"]) -> Iterator[tuple[Row, Row]]:
    """Each row that can be read, and the same with its content encoded anew, here."""
    contents = parts.contents.of(rows)
    whole = [(row, each) for row, each in zip(rows, contents, strict=True) if isinstance(each, bytes)]
    parts.quarantine({row.id: each.what for row, each in zip(rows, contents, strict=True) if isinstance(each, StorageError)})
    payloads = parts.small_codecs.encode(
        [each for _, each in whole], [row.form for row, _ in whole], [row.kind for row, _ in whole], codec=codec
    )
    for (row, _), payload in zip(whole, payloads, strict=True):
        neural = payload.codec in (NEURAL, NEURAL_FLOAT)
        yield row, replace(with_payload(row, payload), origin=parts.neural.origin(len(whole)) if neural and parts.neural else None)


def _to_cold(parts: Parts, ids: Sequence[int], progress: Progress) -> int:
    """Into cold segments: first what is written there is on the disk, then the rows point at it."""
    done = 0
    codec = "neural" if parts.neural is not None else "zstd"
    for batch in batches(iter(ids), AT_ONCE):
        rows = [row for row in parts.records.rows(batch).values() if row.container is not None]
        made = [new for _, new in _again(parts, rows, codec)]
        _laid_cold(parts, made)
        done += len(made)
        progress("to cold", done, len(ids))
    return done


def _laid_cold(parts: Parts, rows: Sequence[Row]) -> None:
    """Rows with containers, moved into the segment that is written on."""
    seal = parts.records.seal
    entries = [(row.id, row.container or b"") for row in rows]
    if seal is not None:
        entries = [(row.id, seal.seal(row.container or b"", about(row))) for row in rows]
    places = parts.cold.append(entries)
    moved = [replace(row, container=None, cold=tuple(place)) for row, place in zip(rows, places, strict=True)]
    parts.warm.replace(moved, What.MOVE)


def _heat(parts: Parts, *, hot: Sequence[int], no_more: Iterable[int]) -> None:
    """Contents that lie decoded in memory."""
    for id in no_more:
        parts.hot.pop(id, None)
    for batch in batches(iter(hot), AT_ONCE):
        rows = list(parts.records.rows(batch).values())
        for row, content in zip(rows, parts.contents.of(rows), strict=True):
            if isinstance(content, bytes):
                parts.hot[row.id] = content


def remove_worn(parts: Parts, also: Iterable[int] = ()) -> int:
    """Segments of which less than half is needed, or that an old data key may have sealed: what is needed is written again. also: these."""
    live: dict[int, int] = {}
    rows: dict[int, list[int]] = {}
    for row in parts.records.scan(tier="cold", damaged=lambda id, error: None):
        if row.cold:
            live[row.cold[0]] = live.get(row.cold[0], 0) + row.stored_bytes
            rows.setdefault(row.cold[0], []).append(row.id)
    sizes = {segment: parts.cold.size_bytes(segment) for segment in parts.cold.segments()}
    seal = parts.records.seal
    rotated = seal is not None and len(seal.epochs) > 1  # what an old data key has sealed is sealed anew
    worn = sorted(sizes if rotated else {*worn_segments(sizes, live), *also})
    if not worn:
        return 0
    parts.cold.start_segment()
    kept = set[int]()
    for segment in worn:
        for batch in batches(iter(rows.get(segment, ())), AT_ONCE):
            whole: list[Row] = []
            for row in parts.records.rows(batch).values():
                try:
                    whole.append(replace(row, container=parts.contents.container(row), cold=None))
                except StorageError as error:  # its block is damaged; the segment stays
                    parts.quarantine({row.id: error.what})
                    kept.add(segment)
            _laid_cold(parts, whole)
    gone = [segment for segment in worn if segment not in kept]
    parts.cold.remove(gone)
    return len(gone)


def _seal_again(parts: Parts) -> int:
    """Rows that an old data key has sealed; then old keys are given up."""
    seal = parts.records.seal
    if seal is None or len(seal.epochs) == 1:
        return 0
    count, after = parts.records.count(), 0
    while (last := parts.warm.reseal(after)) is not None:
        after = last
    parts.shared.seal_again()
    for name in (DICTIONARIES, QUARANTINE):
        if (value := parts.kept(name)) is not None:
            parts.keep(name, value)
    parts.finder.rebuild()  # its files were sealed with an old one, too
    parts.finder.save()
    parts.warm.retire()
    return count


def _give_back(parts: Parts) -> None:
    parts.warm.checkpoint()
    if _free_share(parts) > FREE_SHARE:
        parts.warm.vacuum()
    parts.warm.checkpoint()


def _free_share(parts: Parts) -> float:
    """Of store.db: pages that are free, and room within the others where this SQLite can tell."""
    with parts.records.read() as connection:
        pages, free, size = (connection.execute(f"PRAGMA {what}").fetchone()[0] for what in ("page_count", "freelist_count", "page_size"))
        try:
            (within,) = connection.execute("SELECT sum(unused) FROM dbstat WHERE aggregate").fetchone()
        except sqlite3.OperationalError:  # it was built without that table
            within = 0
    return free / pages + (within or 0) / (pages * size)


# ---- Checking --------------------------------------------------------------------------------------------------------


def verify(parts: Parts, *, progress: Progress = silent) -> Verified:
    """Read every byte of every file, and decode every record. Records that fail go into quarantine, if the store may be written."""
    problems = [str(each) for each in parts.records.verify(progress)]
    problems += parts.shared.verify()
    problems += [f"{parts.cold.path(block.segment)}, offset {block.offset:,}: {block.wrong}" for block in parts.cold.verify()]
    problems += parts.finder.verify()
    count = read = 0
    of = parts.records.count()
    failed: dict[int, str] = {}

    def damaged(id: int, error: StorageError) -> None:
        failed[id] = error.what
        problems.append(error.what)

    rows = parts.records.scan(damaged=damaged)
    for batch in batches(rows, AT_ONCE):
        for row, content in zip(batch, parts.contents.of(batch), strict=True):
            if isinstance(content, StorageError):
                failed[row.id] = content.what
                problems.append(f"record {row.key!r} of {row.tenant!r}: {content.what}")
            else:
                read += 1
        count += len(batch)
        progress("records", count, of)
    parts.quarantine(failed)
    return Verified(records=read, problems=tuple(dict.fromkeys(problems)))


def _own(row: Row) -> bool:
    """Whether its container stands for itself."""
    return row.same_as is None and row.codec != DELTA and row.fidelity == "exact"


def batches(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Some at a time."""
    rest = iter(values)
    while some := list(islice(rest, size)):
        yield some


def _disk_bytes(folder: Path) -> int:
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
