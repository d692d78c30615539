"""The hot tier: the vectors of all records in memory, and what searches filter by.

A search belongs to one tenant, always. Where few rows are left after filtering they are all compared; more are sorted out by the signs of their
vectors first; and where a tenant has many, a graph finds the nearest (graph.py), rows that are not in it yet are compared, and if filters
then leave too few, all that fit are compared after all. So a search finds `k` records whenever so many fit.

Many threads may search while one adds and removes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from typing import TYPE_CHECKING

import numpy as np

from pantheraml.errors import MissingExtra
from pantheraml.memory.columns import Block, Entry, Rows, Serials, Wanted, columns_of, signs, tags_flat, tags_of
from pantheraml.memory.features import F32, I64, unit
from pantheraml.memory.graph import Graph
from pantheraml.memory.quantise import Codes, encode
from pantheraml.memory.record import JSON

if TYPE_CHECKING:
    from pantheraml.memory.scan import Scan

GRAPH_FROM = 50_000
"""Rows of a tenant from which on a graph is built."""
BEHIND = 8_192
"""Rows that may be missing in a graph before it is worth adding them."""
COMPARE_ALL = 16_384
"""Rows up to which all are compared; of more, only those whose signs are most like the query's."""
SHORTLIST = 2_000
"""Of those at least so many are compared, so many for each that is asked for, and such a share."""
_PER_HIT = 50
_SHARE = 0.01
_GRAPH_MOST = 500
"""Records that are asked of a graph; for more of them comparing is faster."""
_STALE_SHARE = 0.3
"""Of a graph's rows that are deleted: from here on it is built anew."""
_log = getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """The best records, best first. ids: [<= k] int64. scores: [<= k] cosines, as far as codes tell."""

    ids: I64
    scores: F32

    def __len__(self) -> int:
        return len(self.ids)


class Hot:
    """An index of vectors with `dimensions` numbers, kept as int8 with their signs beside.

    Args:
        graph_from: rows of a tenant from which on it gets a graph; None: never.
        scan: compares all rows on a device with memory of its own; None: here.
        announce: hears when there can be no graph.
    """

    def __init__(
        self,
        dimensions: int,
        *,
        graph_from: int | None = GRAPH_FROM,
        scan: Scan | None = None,
        announce: Callable[[str], None] = _log.warning,
    ) -> None:
        self.dimensions = dimensions
        self.graph_from = graph_from
        self.blocks: tuple[Block, ...] = ()
        self.graphs: dict[int, Graph] = {}
        self.tenants: dict[str, int] = {}
        self.kinds: dict[str, int] = {}
        self.next_serial = 1
        self._rows: Counter[int] = Counter()
        self._serials = Serials()
        self._scan = scan
        self._announce = announce
        self._writer = threading.RLock()
        self._building = threading.Lock()

    def __len__(self) -> int:
        """Records, of all tenants."""
        return sum(self._rows.values())

    def count(self, tenant: str) -> int:
        """Records of a tenant."""
        return self._rows[self.tenants.get(tenant, -1)]

    def __contains__(self, id: int) -> bool:
        with self._writer:
            return bool(self._serials.get(np.array([id]))[0] >= 0)

    @property
    def memory_bytes(self) -> int:
        """Of rows that are used; without graphs, which take about 300 for each of theirs."""
        row = self.dimensions * 9 // 8 + 53
        return sum(block.count * row + len(block.tag) * 12 for block in self.blocks) + 16 * len(self)

    # ---- Writing -------------------------------------------------------------------------------------------------

    def add(self, entries: Sequence[Entry], vectors: F32 | Codes) -> None:
        """Records with their vectors [N, D], or the int8 codes of them. One whose id is here is replaced; of two with one id the last counts.

        Raises: ValueError for another number or size of vectors, or other codes.
        """
        codes = vectors if isinstance(vectors, Codes) else encode(unit(vectors), "int8")
        if codes.kind != "int8" or codes.data.shape != (len(entries), self.dimensions):
            raise ValueError(f"{len(entries)} entries take int8 codes of {self.dimensions}, not {codes.kind} {list(codes.data.shape)}")
        last = {entry.id: i for i, entry in enumerate(entries)}
        if len(last) < len(entries):
            kept = sorted(last.values())
            entries, codes = [entries[i] for i in kept], codes[kept]
        with self._writer:
            ids = np.array([each.id for each in entries], np.int64)
            before = self._serials.get(ids)
            serials = np.arange(self.next_serial, self.next_serial + len(ids))
            begin = 0
            while begin < len(entries):
                block = self._block_with_room()
                end = min(begin + block.room, len(entries))
                self._append(block, list(entries[begin:end]), codes[begin:end], serials[begin:end])
                begin = end
            self.next_serial += len(ids)
            # A reader meets a record that is replaced twice rather than not at all.
            self._kill(before[before >= 0])
            self._serials.put(ids, serials)

    def remove(self, ids: Sequence[int] | I64) -> int:
        """Take records out. Returns how many were here."""
        with self._writer:
            every = np.unique(np.asarray(ids, np.int64))
            serials = self._serials.get(every)
            every, serials = every[serials >= 0], serials[serials >= 0]
            self._kill(serials)
            self._serials.drop(every)
            return len(every)

    def _append(self, block: Block, entries: list[Entry], codes: Codes, serials: I64) -> None:
        tenants = [self.tenants.setdefault(each.tenant, len(self.tenants)) for each in entries]
        kinds = [self.kinds.setdefault(each.kind, len(self.kinds)) for each in entries]
        block.append(columns_of(entries, codes, serials, tenants, kinds), *tags_flat([tags_of(each.metadata) for each in entries]))
        self._rows.update(tenants)

    def _block_with_room(self) -> Block:
        if not self.blocks or not self.blocks[-1].room:
            self.blocks = (*self.blocks, Block(self.dimensions))
        return self.blocks[-1]

    def _kill(self, serials: I64) -> None:
        serials = np.sort(serials)
        for block, rows in _places(self.blocks, serials):
            block.alive[rows] = False
            block.dead += len(rows)
            self._rows.subtract(block.tenant[rows].tolist())
        if any(2 * block.dead > block.capacity for block in self.blocks):
            emptied = [block.without_dead(0) if 2 * block.dead > block.capacity else block for block in self.blocks]
            self.blocks = tuple(block for block in emptied if block.capacity)

    # ---- Searching -----------------------------------------------------------------------------------------------

    def search(
        self,
        query: F32,
        k: int,
        *,
        tenant: str,
        kind: str | None = None,
        metadata: Mapping[str, JSON] | None = None,
        since: int | None = None,
        until: int | None = None,
        exact: bool = False,
    ) -> Found:
        """The records nearest to a vector [D]: `k` of them, or all that fit if they are fewer.

        Args:
            tenant: whose records. kind: of these only. metadata: which have all of these names with these values.
            since, until: created at or after, and before; microseconds since 1970.
            exact: compare every one that fits, whatever it takes.
        Raises: ValueError for a query of another size, or with numbers that are not finite.
        """
        if query.shape != (self.dimensions,) or not np.isfinite(query).all() or k < 1:
            raise ValueError(f"a query is [{self.dimensions}] and finite, and k at least 1, not {list(query.shape)} and {k}")
        if tenant not in self.tenants or not (kind is None or kind in self.kinds):
            return _NOTHING
        wanted = Wanted(self.tenants[tenant], None if kind is None else self.kinds[kind], tags_of(metadata or {}), since, until)
        query = unit(query[None].astype(np.float32))[0]
        graph = self.graphs.get(wanted.tenant)
        if graph is not None and not exact and k <= _GRAPH_MOST and query.any():
            found = self._by_graph(graph, query, k, wanted)
            if len(found) == k:
                return found
        return self._compared(query, k, wanted, 0, exact)

    def _by_graph(self, graph: Graph, query: F32, k: int, wanted: Wanted) -> Found:
        """The nearest of the graph that fit, and of what is not in it yet; maybe too few."""
        serials, upto = graph.search(encode(query[None], "int8").data[0], max(8 * k, 128))
        near = [(block, block.matching(wanted, rows=rows)) for block, rows in _places(self.blocks, np.sort(serials))]
        tail = self._compared(query, k, wanted, upto, False)
        best = _best_of(near, query, k)
        return _best(np.concatenate([best.ids, tail.ids]), np.concatenate([best.scores, tail.scores]), k)

    def _compared(self, query: F32, k: int, wanted: Wanted, from_serial: int, exact: bool) -> Found:
        """The nearest of all rows from a serial number on that fit."""
        fits = self._fitting(wanted, from_serial)
        total = sum(len(rows) for _, rows in fits)
        if total > COMPARE_ALL and not exact:
            count = max(SHORTLIST, _PER_HIT * k, int(_SHARE * total))
            fits = self._scan.shortlist(fits, query, 4 * k) if self._scan else _shortlist(fits, query, count)
        return _best_of(fits, query, k)

    def _fitting(self, wanted: Wanted, from_serial: int) -> list[tuple[Block, Rows]]:
        while True:
            blocks = self.blocks
            late = [block for block in blocks if block.count and block.serial[block.count - 1] >= from_serial]
            fits = [(block, rows) for block in late if len(rows := block.matching(wanted, from_serial=from_serial))]
            if blocks is self.blocks:  # else a record may have gone over into a block that was not there yet
                return fits

    # ---- Graphs --------------------------------------------------------------------------------------------------

    def behind(self) -> int:
        """Rows that graphs should have and have not."""
        return sum(missing for tenant in list(self.tenants.values()) if (missing := self._missing(tenant)) > BEHIND)

    def catch_up(self, *, threads: int = 1, stop: Callable[[], bool] = lambda: False) -> None:
        """Put into graphs what is missing in them; searches go on meanwhile, and so may adding and removing in another thread.

        It takes some minutes for a million rows. stop: asked now and then.
        """
        with self._building:
            for tenant in list(self.tenants.values()):
                if self._missing(tenant) > BEHIND and not self._extended(tenant, threads, stop):
                    return

    def _missing(self, tenant: int) -> int:
        if self.graph_from is None or self._rows[tenant] < self.graph_from:
            return 0
        graph = self.graphs.get(tenant)
        if graph is None or self._stale(tenant, graph):
            return self._rows[tenant]
        wanted = Wanted(tenant)
        return sum(len(block.matching(wanted, from_serial=graph.upto)) for block in self.blocks if block.count)

    def _stale(self, tenant: int, graph: Graph) -> bool:
        return len(graph) * (1 - _STALE_SHARE) > self._rows[tenant]

    def _extended(self, tenant: int, threads: int, stop: Callable[[], bool]) -> bool:
        """Whether the tenant's graph is complete now."""
        known = self.graphs.get(tenant)
        try:
            usable = known is not None and not self._stale(tenant, known) and known.writable()
            graph = known if known is not None and usable else Graph(self.dimensions)
        except MissingExtra as error:
            self.graph_from = None
            self._announce(f"searches compare all vectors, which takes longer: {error.what}; {error.fix}")
            return False
        if known is None:
            self.graphs[tenant] = graph  # what is not in it yet is compared
        with self._writer:
            blocks, end = self.blocks, self.next_serial
        for block in blocks:
            rows = block.matching(Wanted(tenant), from_serial=graph.upto)
            for begin in range(0, len(rows), _STEP):
                if stop():
                    break
                graph.add(block, rows[begin : begin + _STEP], threads=threads)
        if stop():
            return False
        graph.upto = max(graph.upto, end)
        self.graphs[tenant] = graph
        return True

    # ---- Keeping -------------------------------------------------------------------------------------------------

    def restore(
        self, blocks: Sequence[Block], graphs: Mapping[int, Graph], tenants: Sequence[str], kinds: Sequence[str], serial: int
    ) -> None:
        """Take over what was saved, in place of what is here; see index.py."""
        with self._writer:
            self.tenants = {name: number for number, name in enumerate(tenants)}
            self.kinds = {name: number for number, name in enumerate(kinds)}
            self.blocks, self.graphs, self.next_serial = tuple(blocks), dict(graphs), serial
            self._rows, self._serials = Counter(), Serials()
            for block in blocks:
                alive = np.flatnonzero(block.alive[: block.count])
                self._rows.update(block.tenant[alive].tolist())
                self._serials.put(block.id[alive], block.serial[alive])

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Within the block nothing is added, removed, or put into graphs."""
        with self._building, self._writer:
            yield


_STEP = 1024
_SAME_SCORE = np.float32(1e-6)
_NOTHING = Found(np.empty(0, np.int64), np.empty(0, np.float32))


def _places(blocks: tuple[Block, ...], serials: I64) -> list[tuple[Block, Rows]]:
    """Where rows with these serial numbers, rising, stand; some may be gone."""
    blocks = tuple(block for block in blocks if block.count)
    cuts = np.searchsorted(serials, [int(block.serial[0]) for block in blocks[1:]])
    found: list[tuple[Block, Rows]] = []
    for block, mine in zip(blocks, np.split(serials, cuts), strict=False):
        known = block.serial[: block.count]
        place = np.minimum(np.searchsorted(known, mine), len(known) - 1)
        found.append((block, place[known[place] == mine]))
    return found


def _best_of(fits: list[tuple[Block, Rows]], query: F32, k: int) -> Found:
    """The best of some rows, all of which are compared."""
    step = 4096  # rows that fit into the processor's caches as floats
    ids, scores = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for block, rows in fits:
        ids.append(block.id[rows])
        scores += [block.score(rows[begin : begin + step], query) for begin in range(0, len(rows), step)]
    return _best(np.concatenate(ids), np.concatenate(scores), k)


def _shortlist(fits: list[tuple[Block, Rows]], query: F32, count: int) -> list[tuple[Block, Rows]]:
    """Those rows whose signs differ least from the query's: `count` at least, and all with as few differences as the last of them."""
    bits = signs(query[None])[:, 0]
    distances = [block.distance(rows, bits) for block, rows in fits]
    every = np.concatenate(distances)
    step = 1 + len(every) // 65_536  # a sample tells nearly where the cut must be
    limit = int(np.searchsorted(np.cumsum(np.bincount(every[::step])) * step, count))
    while int((every <= limit).sum()) < min(count, len(every)):
        limit += 1
    return [(block, rows[near]) for (block, rows), each in zip(fits, distances, strict=True) if len(near := np.flatnonzero(each <= limit))]


def _best(ids: I64, scores: F32, k: int) -> Found:
    """The k highest, each id once; of scores that are equal but for rounding the lower id first."""
    if len(ids) > 4 * k + 64:
        few = np.argpartition(-scores, 4 * k)[: 4 * k]
        if len(np.unique(ids[few])) >= k:
            # Ties at the cut are all kept, so that what is found does not depend on the order of the rows.
            few = np.flatnonzero(scores >= scores[few].min() - _SAME_SCORE)
            ids, scores = ids[few], scores[few]
    # One vector in two places of a block can differ in the last bits of its products.
    order = np.lexsort((ids, -np.round(scores / _SAME_SCORE)))
    ids, scores = ids[order], scores[order]
    _, first = np.unique(ids, return_index=True)
    first = np.sort(first)[:k]
    return Found(ids[first], scores[first])
