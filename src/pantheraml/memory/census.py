"""Counts of a store's records and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pantheraml.memory.container import NAMES
from pantheraml.memory.parts import Parts


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


def count(parts: Parts, tenant: str) -> Stats:
    """Counts and sizes; reads all rows of the store."""
    tiers, codecs = dict[str, int](), dict[str, int]()
    raw = stored = vectors = same = records = 0
    for row in parts.records.scan(damaged=lambda id, error: None):
        if row.tenant == tenant:
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
    files = [each for each in parts.path.rglob("*") if each.is_file()]
    return Stats(
        records=records,
        by_tier=tiers,
        by_codec=codecs,
        shared_contents=same,
        raw_bytes=raw,
        stored_bytes=stored,
        vector_bytes=vectors,
        quarantined=len(parts.quarantined),
        disk_bytes=sum(each.stat().st_size for each in files),
        index_bytes=parts.finder.hot.memory_bytes,
        embedder=parts.finder.embedder.name,
        encrypted=parts.records.seal is not None,
    )
