"""A million small records in the memory, in SQLite's FTS5 and in LanceDB: how fast they go in, how fast and how well they are found.

    python benchmarks/memory_million.py [--quick] [--records N] [--queries N] [--only NAME ...] [--limit MINUTES]
                                     [--folder PATH] [--seed N]

Records of about 100 bytes: a number of its own, half a sentence and half another one of real text (the docstrings and pages of
corpora.py), and a figure; the seed decides them all. A query is a part of a record, some words of which are left out, without its number.

Contestants, each in a process of its own, one after the other, with the same records and queries, from texts to keys:

- memory: `put_many` of 10,000 at once, then `catch_up` of its graph; `search`.
- fts5: SQLite (WAL, synchronous=FULL, the cache of our store), 10,000 in a transaction, then its `optimize`; MATCH of all words of a query
  with OR between them, by bm25. It has no vectors.
- lancedb-pq, lancedb-hnsw: vectors by our own embedder, made in the time that is counted, for records and for queries; `add` of 10,000,
  then its `optimize` and an index, IVF_PQ and IVF_HNSW_SQ with the settings that its documentation recommends. A commit of LanceDB is not
  flushed to the disk; those of the others are.

Recall@10 is the share of what is found that belongs to the ten nearest by brute force, in float32, of the vectors that both have. Hit@10 is
the share of queries whose own record is found. Memory is what the process holds while it searches, and the most it ever held;
the disk is read when all is closed. What is opened again answers one query. Seconds are those of the clock; beside them stand those
that all cores of the contestant computed, which tell what was slow for itself and what waited for others.

A contestant that is not done within the limit is ended and has no figures, which the table says. The last line is JSON. The exit status is 1
if a contestant fails or finds less than there is, or if the memory is not done.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from corpora import corpora
from memory import machine, say

if TYPE_CHECKING:
    from numpy.typing import NDArray

RECORDS, QUICK_RECORDS = 1_000_000, 20_000
QUERIES, QUICK_QUERIES = 1000, 200
BATCH = 10_000
"""Records that are put at once."""
K = 10
LIMIT_MINUTES = 40.0
WARM_UP = 20
"""Queries before the ones that count."""
EXACT_QUERIES = 50
"""That are also compared with all vectors of the store, to tell what its eight bits cost from what its graph costs."""
TIE = 1e-5
"""Cosines that are as near as this are one: sums in another order differ by as much."""
CACHE_KIB = 65_536
"""Of SQLite, as our store has."""
ROWS_PER_PARTITION, VALUES_PER_SUBVECTOR, SHARE_OF_PARTITIONS, FEWEST_PARTITIONS, REFINE = 4096, 8, 0.1, 20, 10
"""LanceDB's IVF_PQ, as its documentation recommends: partitions of some thousand rows, 8 values to a byte, 5 to 10% of the partitions
looked at (20 is the default), and ten times as many candidates compared with the vectors themselves."""
BREADTH = 384
"""Candidates that a search of LanceDB's IVF_HNSW_SQ looks at: as many as ours. One partition, as recommended; the rest by default."""
PACKAGES = ("numpy", "usearch", "lancedb", "pantheraml")
SUBJECTS = ("order", "ticket", "run", "host", "user", "build", "invoice", "job")
UNITS = ("ms", "MB", "EUR", "items", "%", "times", "rows", "km")
_SENTENCE = re.compile(r"(?<=[.!?;:])\s+|\n\s*\n")
_WORD = re.compile(r"\w+")


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_RECORDS:,} records and {QUICK_QUERIES} queries")
    parser.add_argument("--records", type=int, metavar="N", help=f"(default: {RECORDS:,}, quick: {QUICK_RECORDS:,})")
    parser.add_argument("--queries", type=int, metavar="N", help=f"(default: {QUERIES:,}, quick: {QUICK_QUERIES})")
    parser.add_argument(
        "--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME", help=f"of {', '.join(CONTESTANTS)}"
    )
    parser.add_argument("--limit", type=float, default=LIMIT_MINUTES, metavar="MINUTES", help="of a contestant (default: %(default)g)")
    parser.add_argument("--folder", type=Path, metavar="PATH", help="where the stores are made, and stay (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=3407, help="(default: %(default)s)")
    parser.add_argument("--as-child", choices=CONTESTANTS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.as_child:
        be_child(asked.as_child, asked.folder)
        return 0
    count = asked.records or (QUICK_RECORDS if asked.quick else RECORDS)
    queries = asked.queries or (QUICK_QUERIES if asked.quick else QUERIES)
    about = machine(PACKAGES)
    print(f"# run on {about['said']}")
    with ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pantheraml-million-")))
        folder.mkdir(parents=True, exist_ok=True)
        return compare(folder, about, count, queries, asked)


def compare(folder: Path, about: dict[str, Any], count: int, queries: int, asked: argparse.Namespace) -> int:
    """All contestants on the same records."""
    say(f"making {count:,} records")
    texts = list(made_records(count, asked.seed))
    wanted = [chosen * count // queries for chosen in range(queries)]
    asks = made_queries([texts[i] for i in wanted], asked.seed)
    (folder / "records.txt").write_text("\n".join(texts), "utf-8")
    (folder / "queries.json").write_text(json.dumps(asks), "utf-8")
    raw_bytes = sum(len(text.encode()) for text in texts)
    print(f"{count:,} records of {raw_bytes / count:.0f} bytes, {queries:,} queries, such as")
    print(f"  {texts[wanted[-1]]!r}\n  {asks[-1]!r}")

    results: dict[str, dict[str, Any]] = {}
    for name in asked.only:
        if name.startswith("lancedb") and importlib.util.find_spec("lancedb") is None:
            results[name] = {"absent": "not installed (pip install lancedb)"}
            continue
        say(f"{name}: {count:,} records")
        results[name] = run_child(name, folder, asked.limit)
    say("brute force")
    nearest = Truth(texts, asks)
    for each in (result for result in results.values() if "absent" not in result):
        found = each.pop("found")
        each["short"] = sum(len(keys) < K for keys in found) if each["vectors"] else 0
        each["hit"] = sum(i in keys for i, keys in zip(wanted, found, strict=True)) / queries
        each["recall"] = nearest.recall(found) if each["vectors"] else None
        if exact := each.pop("exact", None):
            each["exact_recall"] = nearest.recall(exact)
    nearest_hit = sum(i in keys for i, keys in zip(wanted, nearest.ids.tolist(), strict=True)) / queries
    ok = all(each.get("short", 0) == 0 for each in results.values()) and "absent" not in results.get("memory", {})
    show(results, count)
    print(f"hit@{K} by brute force: {nearest_hit:.3f}")
    print(
        json.dumps(
            {
                "benchmark": "memory_million",
                "ok": ok,
                "quick": asked.quick,
                "machine": about,
                "seed": asked.seed,
                "records": count,
                "raw_bytes": raw_bytes,
                "queries": queries,
                "k": K,
                "brute_force_hit": nearest_hit,
                "results": results,
            }
        )
    )
    return 0 if ok else 1


# ---- Records and queries ---------------------------------------------------------------------------------------------


def made_records(count: int, seed: int) -> Iterator[str]:
    """One line each."""
    halves = [_halves(sentence) for sentence in _sentences(seed)]
    draw = random.Random(seed)
    for i in range(count):
        begin, end = draw.choice(halves)[0], draw.choice(halves)[1]
        yield f"{draw.choice(SUBJECTS)}-{i:07d}: {begin} {end} ({draw.randrange(1, 10_000)} {draw.choice(UNITS)})"


def made_queries(texts: Sequence[str], seed: int) -> list[str]:
    """Of each text a part: two thirds of its words in a row, of which every fourth or so is left out, and never its number."""
    draw = random.Random(seed + 1)
    asks: list[str] = []
    for text in texts:
        words = text.split()[1:]
        most = max(3, 2 * len(words) // 3)
        first = draw.randrange(len(words) - most + 1) if len(words) > most else 0
        part = words[first : first + most]
        kept = [word for word in part if draw.random() < 0.75]
        asks.append(" ".join(kept if len(kept) >= 2 else part))
    return asks


def _sentences(seed: int) -> list[str]:
    """Of the docstrings and the pages: six words or more, and no longer than a line of code may be."""
    made = corpora(seed)
    found: dict[str, None] = {}
    for document in [*made["docstrings"], *made["pages"]]:
        for record in document:
            for piece in _SENTENCE.split(record):
                sentence = " ".join(piece.split())
                if 40 <= len(sentence) <= 120 and sentence.count(" ") >= 5:
                    found[sentence] = None
    return list(found)


def _halves(sentence: str) -> tuple[str, str]:
    words = sentence.split()
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


class Truth:
    """The ten nearest of all vectors, compared one with the other in float32.

    Attributes:
        ids: [Q, K] of the nearest, the nearest first. last: [Q] the cosine of the last of them.
    """

    def __init__(self, texts: Sequence[str], queries: Sequence[str]) -> None:
        import numpy as np

        from pantheraml.memory.embed import LexicalEmbedder

        self._texts, self._embedder = texts, LexicalEmbedder()
        self._queries: NDArray[np.float32] = self._embedder.embed(queries)
        self.ids = np.zeros((len(queries), 0), np.int64)
        scores = np.zeros((len(queries), 0), np.float32)
        for first in range(0, len(texts), BATCH):
            more = self._queries @ self._embedder.embed(texts[first : first + BATCH]).T
            scores = np.concatenate([scores, more], axis=1)
            ids = np.broadcast_to(np.arange(first, first + more.shape[1]), more.shape)
            ids = np.concatenate([self.ids, ids], axis=1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :K] if scores.shape[1] <= 4 * K else _best(scores)
            self.ids, scores = np.take_along_axis(ids, best, 1), np.take_along_axis(scores, best, 1)
        self.last = scores[:, -1]

    def recall(self, found: Sequence[Sequence[int]]) -> float:
        """Of what was found for the first so many queries, the share that is as near as the tenth nearest, or nearer."""
        good = 0
        for query, keys, last in zip(self._queries, found, self.last.tolist(), strict=False):
            keys = list(dict.fromkeys(keys))[:K]
            if keys:
                cosines = self._embedder.embed([self._texts[key] for key in keys]) @ query
                good += int((cosines >= last - TIE).sum())
        return good / (min(K, len(self._texts)) * len(found))


def _best(scores: NDArray[Any]) -> NDArray[Any]:
    """Places of the K highest of each row, the highest first."""
    import numpy as np

    some = np.argpartition(-scores, K, axis=1)[:, :K]
    order = np.argsort(-np.take_along_axis(scores, some, 1), axis=1, kind="stable")
    return np.take_along_axis(some, order, 1)


# ---- Contestants, in a process of their own --------------------------------------------------------------------------


class Contestant(Protocol):
    """Something that keeps texts and finds them. It is opened where it is, or made there."""

    settings: str
    """For people."""
    vectors: bool
    """Whether it searches by our embedder's vectors, so that brute force by them is the truth."""

    def put(self, first: int, texts: list[str]) -> None:
        """Texts whose keys are the numbers from `first` on."""
        ...

    def ready(self) -> None:
        """All is in, and searches may be as fast as they get."""
        ...

    def search(self, text: str) -> list[int]:
        """Keys of the ten best."""
        ...

    def more(self, queries: Sequence[str]) -> dict[str, Any]:
        """Figures of this contestant alone."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class Ours:
    """The memory."""

    vectors = True

    def __init__(self, folder: Path) -> None:
        from pantheraml.memory.store import Memory

        self._memory = Memory.open(folder)
        self._finder = self._memory.parts.finder
        self.settings = f"{self._finder.embedder.name}, int8, HNSW"

    def put(self, first: int, texts: list[str]) -> None:
        """See `Contestant`."""
        from pantheraml.memory.record import Record

        self._memory.put_many([Record(key=str(first + i), content=text) for i, text in enumerate(texts)])

    def ready(self) -> None:
        """See `Contestant`."""
        hot = self._finder.hot
        # Where there are few, the graph takes part all the same: a quick run is to go the same way.
        hot.graph_from = min(hot.graph_from or 0, max(1, len(hot) // 2))
        hot.catch_up(threads=cores())

    def search(self, text: str) -> list[int]:
        """See `Contestant`."""
        return [int(hit.key) for hit in self._memory.search(text, K)]

    def more(self, queries: Sequence[str]) -> dict[str, Any]:
        """What a search is made of, and what eight bits cost."""
        hot, embedder = self._finder.hot, self._finder.embedder
        tenant = self._memory.tenant
        embedded = timed(lambda text: embedder.embed([text])[0], queries)
        vectors = [vector for vector, _ in embedded]
        graph = timed(lambda vector: hot.search(vector, K, tenant=tenant), vectors)
        exact = timed(lambda vector: hot.search(vector, K, tenant=tenant, exact=True).ids.tolist(), vectors[:EXACT_QUERIES])
        rows = self._memory.parts.records.rows([id for ids, _ in exact for id in ids])
        return {
            "embed_ms": median([seconds for _, seconds in embedded]) * 1e3,
            "index_ms": median([seconds for _, seconds in graph]) * 1e3,
            "exact_ms": median([seconds for _, seconds in exact]) * 1e3,
            "exact": [[int(rows[id].key) for id in ids] for ids, _ in exact],
            "index_bytes": hot.memory_bytes,
            "in_graph": sum(len(each) for each in hot.graphs.values()),
            "behind": hot.behind(),
        }

    def close(self) -> None:
        """See `Contestant`."""
        self._memory.close()


class FTS5:
    """Full-text search of SQLite."""

    vectors = False

    def __init__(self, folder: Path) -> None:
        import sqlite3

        folder.mkdir(exist_ok=True)
        self.settings = f"SQLite {sqlite3.sqlite_version}, bm25"
        self._connection = sqlite3.connect(folder / "notes.db", isolation_level=None)
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"cache_size=-{CACHE_KIB}"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute("CREATE VIRTUAL TABLE IF NOT EXISTS notes USING fts5(text)")

    def put(self, first: int, texts: list[str]) -> None:
        """See `Contestant`."""
        self._connection.execute("BEGIN")
        self._connection.executemany("INSERT INTO notes(rowid, text) VALUES(?, ?)", enumerate(texts, first))
        self._connection.execute("COMMIT")

    def ready(self) -> None:
        """See `Contestant`."""
        self._connection.execute("INSERT INTO notes(notes) VALUES('optimize')")

    def search(self, text: str) -> list[int]:
        """See `Contestant`."""
        words = " OR ".join(f'"{word}"' for word in dict.fromkeys(_WORD.findall(text)))
        asked = f"SELECT rowid FROM notes WHERE notes MATCH ? ORDER BY rank LIMIT {K}"
        return [key for (key,) in self._connection.execute(asked, (words,))]

    def more(self, queries: Sequence[str]) -> dict[str, Any]:
        """Nothing."""
        return {}

    def close(self) -> None:
        """See `Contestant`."""
        self._connection.close()


class LanceDB:
    """A table of LanceDB, with our vectors."""

    vectors = True

    def __init__(self, folder: Path, index: str) -> None:
        import pyarrow

        from pantheraml.memory.embed import LexicalEmbedder

        self._embedder, self._index = LexicalEmbedder(), index
        vector = pyarrow.list_(pyarrow.float32(), self._embedder.dimensions)
        self._schema = pyarrow.schema([("key", pyarrow.int64()), ("text", pyarrow.string()), ("vector", vector)])
        database: Any = importlib.import_module("lancedb").connect(folder)
        self._table: Any = database.create_table("notes", schema=self._schema, exist_ok=True)
        self._partitions = 0
        self._plan(self._table.count_rows())

    def _plan(self, rows: int) -> None:
        self._partitions = max(1, rows // ROWS_PER_PARTITION) if self._index == "IVF_PQ" else 1
        self._probes = max(FEWEST_PARTITIONS, round(SHARE_OF_PARTITIONS * self._partitions))
        how = f"{self._probes} of {self._partitions} partitions, refine {REFINE}" if self._index == "IVF_PQ" else f"ef {BREADTH}"
        self.settings = f"{self._index}, {how}"

    def put(self, first: int, texts: list[str]) -> None:
        """See `Contestant`."""
        import pyarrow

        vectors = self._embedder.embed(texts)
        column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), vectors.shape[1])
        keys = pyarrow.array(range(first, first + len(texts)), pyarrow.int64())
        self._table.add(pyarrow.Table.from_arrays([keys, pyarrow.array(texts), column], schema=self._schema))

    def ready(self) -> None:
        """See `Contestant`."""
        from datetime import timedelta

        self._table.optimize(cleanup_older_than=timedelta(0))
        self._plan(self._table.count_rows())
        how: dict[str, Any] = {"num_sub_vectors": self._embedder.dimensions // VALUES_PER_SUBVECTOR} if self._index == "IVF_PQ" else {}
        self._table.create_index(metric="cosine", index_type=self._index, num_partitions=self._partitions, **how)

    def search(self, text: str) -> list[int]:
        """See `Contestant`."""
        query = self._table.search(self._embedder.embed([text])[0]).distance_type("cosine").limit(K).select(["key"])
        query = query.nprobes(self._probes).refine_factor(REFINE) if self._index == "IVF_PQ" else query.ef(BREADTH)
        return query.to_arrow()["key"].to_pylist()

    def more(self, queries: Sequence[str]) -> dict[str, Any]:
        """Nothing."""
        return {}

    def close(self) -> None:
        """It has nothing to close."""


CONTESTANTS: dict[str, Callable[[Path], Contestant]] = {
    "memory": Ours,
    "fts5": FTS5,
    "lancedb-pq": lambda folder: LanceDB(folder, "IVF_PQ"),
    "lancedb-hnsw": lambda folder: LanceDB(folder, "IVF_HNSW_SQ"),
}


def run_child(name: str, folder: Path, minutes: float) -> dict[str, Any]:
    """What a contestant's process reports, if it is done by then. Raises: SystemExit with what it said, if it failed."""
    command = [sys.executable, __file__, "--as-child", name, "--folder", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=minutes * 60)
    except subprocess.TimeoutExpired:
        return {"absent": f"not done within {minutes:g} minutes"}
    if done.returncode:
        sys.exit(f"{name} failed with status {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}")
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


def be_child(name: str, folder: Path) -> None:
    """Put, search, and write down what was seen."""
    queries: list[str] = json.loads((folder / "queries.json").read_text("utf-8"))
    place, make = folder / name, CONTESTANTS[name]
    contestant = make(place)
    start_bytes = resident("VmRSS")
    seconds: list[float] = []
    put_cpu_s = 0.0
    for first, texts in batches(folder / "records.txt"):
        begun, computed = time.perf_counter(), time.process_time()
        contestant.put(first, texts)
        seconds.append(time.perf_counter() - begun)
        put_cpu_s += time.process_time() - computed
    computed = time.process_time()
    _, ready_s = timed(lambda _: contestant.ready(), [None])[0]
    ready_cpu_s = time.process_time() - computed
    for text in queries[:WARM_UP]:
        contestant.search(text)
    computed = time.process_time()
    searched = timed(contestant.search, queries)
    search_cpu_s = time.process_time() - computed
    figures: dict[str, Any] = {
        "settings": contestant.settings,
        "vectors": contestant.vectors,
        "put_s": sum(seconds),
        "put_cpu_s": put_cpu_s,
        "batch_s": seconds,
        "ready_s": ready_s,
        "ready_cpu_s": ready_cpu_s,
        "search_s": [each for _, each in searched],
        "search_cpu_s": search_cpu_s,
        "found": [keys for keys, _ in searched],
        "start_bytes": start_bytes,
        "searching_bytes": resident("VmRSS"),
        "peak_bytes": resident("VmHWM"),
        **contestant.more(queries),
    }
    _, figures["close_s"] = timed(lambda _: contestant.close(), [None])[0]
    figures["disk_bytes"] = sum(each.stat().st_size for each in place.rglob("*") if each.is_file())
    begun = time.perf_counter()
    contestant = make(place)
    contestant.search(queries[0])
    figures["open_s"] = time.perf_counter() - begun
    contestant.close()
    (folder / f"{name}.json").write_text(json.dumps(figures), "utf-8")


def batches(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of the first, texts), read as they are needed, so that no process holds them all."""
    with path.open(encoding="utf-8", newline="\n") as lines:
        first = 0
        while texts := [line.rstrip("\n") for line in islice(lines, BATCH)]:
            yield first, texts
            first += len(texts)


def timed(work: Callable[[Any], Any], items: Iterable[Any]) -> list[tuple[Any, float]]:
    """What each item gives, and its seconds."""
    found: list[tuple[Any, float]] = []
    for item in items:
        begun = time.perf_counter()
        result = work(item)
        found.append((result, time.perf_counter() - begun))
    return found


def resident(entry: str) -> int | None:
    """VmRSS (now) or VmHWM (the most) of this process, in bytes; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:")), None)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- What it says ----------------------------------------------------------------------------------------------------


def median(values: Sequence[float]) -> float:
    """Of numbers."""
    return share(values, 0.5)


def share(values: Sequence[float], part: float) -> float:
    """The number below which such a part of them lies."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def show(results: dict[str, dict[str, Any]], count: int) -> None:
    """A column for each contestant; a line below for those that are left out."""
    there = {name: each for name, each in results.items() if "absent" not in each}
    lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("put, records/s", lambda each: f"{count / each['put_s']:,.0f}"),
        ("  the first tenth", lambda each: f"{_rate(each['batch_s'], count, first=True):,.0f}"),
        ("  the last tenth", lambda each: f"{_rate(each['batch_s'], count, first=False):,.0f}"),
        ("put, CPU s", lambda each: f"{each['put_cpu_s']:,.1f}"),
        ("ready after, s", lambda each: f"{each['ready_s']:,.1f}"),
        ("ready, CPU s", lambda each: f"{each['ready_cpu_s']:,.1f}"),
        ("search p50, ms", lambda each: f"{median(each['search_s']) * 1e3:,.2f}"),
        ("search p99, ms", lambda each: f"{share(each['search_s'], 0.99) * 1e3:,.2f}"),
        ("search, CPU ms", lambda each: f"{each['search_cpu_s'] / len(each['search_s']) * 1e3:,.2f}"),
        (f"recall@{K}", lambda each: "-" if each["recall"] is None else f"{each['recall']:.3f}"),
        (f"hit@{K}", lambda each: f"{each['hit']:.3f}"),
        ("memory, MiB", lambda each: _mib(each["searching_bytes"])),
        ("  at the start", lambda each: _mib(each["start_bytes"])),
        ("  the most", lambda each: _mib(each["peak_bytes"])),
        ("disk, bytes/record", lambda each: f"{each['disk_bytes'] / count:,.0f}"),
        ("close, s", lambda each: f"{each['close_s']:,.2f}"),
        ("open and search, s", lambda each: f"{each['open_s']:,.2f}"),
    ]
    print(f"\n{'':20}" + "".join(f"{name:>16}" for name in there))
    for what, figure in lines:
        print(f"{what:20}" + "".join(f"{figure(each):>16}" for each in there.values()))
    for name, each in results.items():
        print(f"{name}: {each['settings'] if 'absent' not in each else 'left out, ' + each['absent']}")
    if ours := there.get("memory"):
        print(
            f"a search of the memory: embedding {ours['embed_ms']:.2f} ms, index {ours['index_ms']:.2f} ms, in the middle; "
            f"{ours['in_graph']:,} rows in its graph, {ours['behind']:,} behind. "
            f"All vectors compared: {ours['exact_ms']:.1f} ms, recall {ours['exact_recall']:.3f}"
        )


def _rate(seconds: Sequence[float], count: int, *, first: bool) -> float:
    """Records a second of the first or last tenth of all batches, the last one left out where it is not full."""
    full = seconds[: count // BATCH] or seconds
    some = max(1, len(full) // 10)
    return min(BATCH, count) / (sum(full[:some] if first else full[-some:]) / some)


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
