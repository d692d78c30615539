"""The second half of a repair: cold segments made whole, once store.db is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import UTC, datetime

from pantheraml.memory.pages import QUARANTINE, Problem
from pantheraml.memory.parts import COLD, Parts
from pantheraml.memory.repair import Lost, Repaired
from pantheraml.memory.upkeep import remove_worn


def mend_cold(parts: Parts, found: Repaired) -> Repaired:
    """Takes out the records of damaged blocks, and those that need them to be decoded; what is sound of their segments is written again.

    The damaged segments are copied into quarantine first. Killed in between, the next repair goes on.

    Args:
        parts: of the store, open for writing. found: by the repair of store.db.
    Returns: the same with what was found here, and how many records are kept in all.
    """
    damaged = parts.cold.verify()
    if not damaged:
        return replace(found, kept=parts.records.count())
    quarantine = found.quarantine or parts.path / QUARANTINE / datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    (quarantine / COLD).mkdir(parents=True, exist_ok=True)
    segments = {block.segment for block in damaged}
    for segment in segments:
        shutil.copy2(parts.cold.path(segment), quarantine / COLD)
    lost = _lost(parts, {(block.segment, block.offset): block.wrong or "" for block in damaged})
    with parts.lock:
        parts.warm.delete([each.id for each in lost])
        parts.restored([each.id for each in lost])
        parts.finder.hot.remove([each.id for each in lost])
        remove_worn(parts, segments)
    for each in lost:
        parts.announce(f"record {each.id} ({each.key!r}) is lost: {each.why}")
    problems = [Problem(str(parts.cold.path(each.segment)), f"offset {each.offset:,}", each.wrong or "") for each in damaged]
    return replace(
        found,
        kept=parts.records.count(),
        lost=(*found.lost, *lost),
        problems=(*found.problems, *problems),
        quarantine=quarantine,
    )


def _lost(parts: Parts, damaged: dict[tuple[int, int], str]) -> list[Lost]:
    """Records that lie in damaged blocks (segment, offset: why), and those that take one of them to be decoded."""
    lost: dict[int, Lost] = {}
    for row in parts.records.scan(tier="cold", damaged=lambda id, error: None):
        if row.cold and (why := damaged.get(row.cold[:2])) is not None:
            lost[row.id] = Lost(row.id, row.key, why)
    new = list(lost)
    while new:
        needed = parts.records.referrers(new)
        rows = parts.records.rows([id for ids in needed.values() for id in ids if id not in lost], damaged=lambda id, error: None)
        for owner, ids in needed.items():
            for id in ids:
                if id in rows:
                    lost[id] = Lost(id, rows[id].key, f"it takes record {owner} to decode it, which is lost")
        new = list(rows)
    return list(lost.values())
