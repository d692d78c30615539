"""What is left of a text in N bytes: a gist (a vector's code), against the beginning of the text in as many bytes.

    python benchmarks/memory_gist.py [--quick] [--records N] [--queries N] [--model NAME] [--threads N] [--seed N]

Records are docstrings of Python's library and of transformers, which is installed with this package. They are split by file: embedders and
codebooks are trained on one half of the files, and nothing of these is asked for. Of the other half every record is kept in N bytes, in two ways:

gist        the vector of the whole record in a code of N bytes, head and scale included
truncated   the first N bytes of the record, embedded by the same embedder and compared in full precision, which costs it nothing here
packed      the same with as much of the record as zlib (without header) gets into N bytes, which may be all of it

Two questions find their record again: a sentence drawn from the middle of it; and its first sentence, which is then cut from what is
kept. recall@10 is the share of questions whose record is among the ten nearest. `of exact` says which share of the ten
nearest by vectors in full precision are among the ten nearest by codes (quantise.recall). `equal at` is the smallest of the
lengths 64, 128, ... bytes at which truncation finds as many sentences as the gist.

The last line is JSON. The exit status is 1 if truncation, or packing where the gist has less than a fifth of the record's bytes, finds
as many as a gist of as many bytes, in any row. A gist is for less than that: packed whole, records of this kind take half of their bytes.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import sys
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LEAST_CHARACTERS, MOST_CHARACTERS = 300, 4000
LEAST_SENTENCE = 40
K = 10
LENGTHS = tuple(64 << i for i in range(7))


@dataclass(frozen=True, slots=True)
class Row:
    """One code of one embedder. Recalls of the sentence from the middle, and of the first one (`head`)."""

    embedder: str
    code: str
    bytes: int
    gist: float
    truncated: float
    packed: float
    of_exact: float
    equal_at_bytes: int | None
    gist_head: float
    truncated_head: float
    packed_head: float


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="600 records, and fewer codes")
    parser.add_argument("--records", type=int, metavar="N", help="that are searched, at most (default: 4000; quick: 600)")
    parser.add_argument("--queries", type=int, default=1000, metavar="N", help="of each kind, at most (default: 1000)")
    parser.add_argument("--model", metavar="NAME", help="also embed by this Hugging Face model, on the device that pantheraml chooses")
    parser.add_argument("--threads", type=int, help="of torch and numpy (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.threads:
        os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    most = asked.records or (600 if asked.quick else 4000)

    learnt, kept = corpus(most)
    say(f"{len(learnt)} records to learn from, {len(kept)} of other files to find")
    middle, head = questions(kept, asked.queries, asked.seed)
    rows: list[Row] = []
    speeds: dict[str, dict[str, float]] = {}
    codes = ("binary", "pq-32", "int8") if asked.quick else ("pq-16", "pq-32", "binary", "pq-64", "int8", "float16")
    wide = ("pq-64", "binary")
    print(
        f"{len(kept)} records of {sum(map(len, kept)) / len(kept):,.0f} characters; {len(middle.queries)} questions of each kind; recall@{K}"
    )
    print(f"{'':24} {'':>6} {'a sentence from the middle':^44} {'the first sentence':^26}")
    print(
        f"{'':24} {'bytes':>6} {'gist':>7} {'truncated':>10} {'packed':>7} {'of exact':>9} {'equal at':>9} "
        f"{'gist':>7} {'truncated':>10} {'packed':>7}"
    )
    for name, embedder, train_s in embedders(learnt, asked):
        began = time.perf_counter()
        embedder.embed(kept)
        speeds[name] = {"texts_per_s": round(len(kept) / (time.perf_counter() - began)), "train_s": round(train_s, 1)}
        for row in measured(name, embedder, wide if embedder.dimensions > 256 else codes, learnt, middle, head):
            rows.append(row)
            print_row(row)
    print("; ".join(f"{name}: {speed['texts_per_s']:,} records a second" for name, speed in speeds.items()))
    wrong = [each for row in rows for each in beaten(row, sum(len(text.encode()) for text in kept) / len(kept))]
    for each in wrong:
        print(f"WRONG: {each}")
    result = {
        "benchmark": "memory_gist",
        "ok": not wrong,
        "quick": asked.quick,
        "records": len(kept),
        "learnt": len(learnt),
        "queries": len(middle.queries),
        "k": K,
        "rows": [asdict(row) for row in rows],
        "speeds": speeds,
        "machine": machine(),
        "wrong": wrong,
    }
    print(json.dumps(result))
    return 1 if wrong else 0


# What is asked of what.


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Queries, the place of each one's record, and the records as they are kept."""

    queries: list[str]
    answers: list[int]
    records: list[str]


def corpus(most: int) -> tuple[list[str], list[str]]:
    """Docstrings of half of the files, and of the others, of these so many at most; none of them twice."""
    import sysconfig

    found = find_spec("transformers")
    folders = [Path(sysconfig.get_paths()["stdlib"])] + ([Path(found.origin).parent] if found and found.origin else [])
    learnt: list[str] = []
    kept: list[str] = []
    seen: set[str] = set()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).parts
            if len(kept) >= most or {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(parts):
                continue
            half = learnt if zlib.crc32("/".join(parts).encode()) & 1 else kept
            for text in docstrings(path):
                if text[:200] not in seen:
                    seen.add(text[:200])
                    half.append(text)
    return learnt[:most], kept[:most]


def docstrings(path: Path) -> Iterator[str]:
    """Those of a file that are not short, cut to a few thousand characters."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= LEAST_CHARACTERS:
                yield text[:MOST_CHARACTERS]


def questions(records: list[str], most: int, seed: int) -> tuple[Task, Task]:
    """A sentence from the middle of records; and the first sentence, with records without theirs."""
    rng = random.Random(seed)
    middle, head, without = [], [], list(records)
    for i, text in enumerate(records):
        sentences = [each.strip() for each in re.split(r"(?<=[.!?])\s+|\n\s*\n", text) if len(each.strip()) >= LEAST_SENTENCE]
        if len(sentences) < 3:
            continue
        middle.append((rng.choice(sentences[1:-1]), i))
        if len(text) - len(sentences[0]) >= LEAST_CHARACTERS // 2:
            head.append((sentences[0], i))
            without[i] = text.replace(sentences[0], "", 1)
    tasks = []
    for pairs, kept in ((middle, records), (head, without)):
        drawn = rng.sample(pairs, min(most, len(pairs)))
        tasks.append(Task([query for query, _ in drawn], [i for _, i in drawn], kept))
    return tasks[0], tasks[1]


def embedders(learnt: list[str], asked: argparse.Namespace) -> Iterator[tuple[str, Any, float]]:
    """(name, embedder, seconds that it took to learn)."""
    from pantheraml.memory.embed import LexicalEmbedder, StaticEmbedder

    yield "lexical", LexicalEmbedder(), 0.0
    began = time.perf_counter()
    static = StaticEmbedder.train(learnt)
    yield "static", static, time.perf_counter() - began
    if not asked.quick:
        began = time.perf_counter()
        static = StaticEmbedder.train(learnt, dimensions=1024)
        yield "static-1024", static, time.perf_counter() - began
    if asked.model:
        from pantheraml.hardware.find import find
        from pantheraml.memory.model_embed import ModelEmbedder

        yield asked.model, ModelEmbedder(asked.model, find(training=False).device, announce=say), 0.0


# Measuring.


def measured(name: str, embedder: Any, codes: Sequence[str], learnt: list[str], middle: Task, head: Task) -> Iterator[Row]:
    """A row for each code."""
    from pantheraml.memory.quantise import encode, recall, scores, train_book

    examples = embedder.embed(learnt)
    vectors = {task: embedder.embed(task.records) for task in (middle, head)}
    queries = {task: embedder.embed(task.queries) for task in (middle, head)}

    def found_in(task: Task, texts: list[str]) -> float:
        return found(queries[task] @ embedder.embed(texts).T, task.answers)

    def cut(task: Task, size: int) -> float:
        return found_in(task, [text.encode()[:size].decode("utf-8", "ignore") for text in task.records])

    by_length = {length: cut(middle, length) for length in LENGTHS}
    for code in codes:
        kind: Any = code.split("-")[0]
        book = train_book(examples, int(code.split("-")[1])) if kind == "pq" else None
        of = {task: encode(vectors[task], kind, book) for task in (middle, head)}
        size = of[middle].row_bytes
        gist, gist_head = (found(scores(queries[task], of[task], book), task.answers) for task in (middle, head))
        yield Row(
            embedder=name,
            code=code,
            bytes=size,
            gist=gist,
            truncated=cut(middle, size),
            packed=found_in(middle, [packed(text, size) for text in middle.records]),
            of_exact=round(recall(queries[middle], vectors[middle], kind, K, book), 4),
            equal_at_bytes=next((length for length, share in by_length.items() if share >= gist), None),
            gist_head=gist_head,
            truncated_head=cut(head, size),
            packed_head=found_in(head, [packed(text, size) for text in head.records]),
        )


def found(scores: Any, answers: Sequence[int]) -> float:
    """The share of the rows [Q, N] whose answer is among the K highest. Ties count against it."""
    import numpy as np

    own = scores[np.arange(len(answers)), answers]
    return round(float(((scores >= own[:, None]).sum(axis=1) <= K).mean()), 4)


def packed(text: str, size: int) -> str:
    """As much of the beginning as zlib gets into so many bytes."""
    low, high = 0, min(len(text), 6 * size)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(deflated(text[:middle])) <= size else (low, middle - 1)
    return text[:low]


def deflated(text: str) -> bytes:
    """By zlib's best, without its header and checksum."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(text.encode()) + packer.flush()


def beaten(row: Row, record_bytes: float) -> list[str]:
    """By what this gist should not be beaten, and is."""
    pairs = [("truncation", row.gist, row.truncated), ("truncation", row.gist_head, row.truncated_head)]
    if row.bytes < record_bytes / 5:
        pairs += [("packing", row.gist, row.packed), ("packing", row.gist_head, row.packed_head)]
    return [f"{row.embedder} {row.code}: {by} finds {other:.3f}, and the gist {mine:.3f}" for by, mine, other in pairs if mine <= other]


def print_row(row: Row) -> None:
    """One line."""
    equal = "never" if row.equal_at_bytes is None else f"{row.equal_at_bytes}"
    print(
        f"{row.embedder[:14]:14} {row.code:9} {row.bytes:>6} {row.gist:>7.3f} {row.truncated:>10.3f} {row.packed:>7.3f} {row.of_exact:>9.3f} "
        f"{equal:>9} {row.gist_head:>7.3f} {row.truncated_head:>10.3f} {row.packed_head:>7.3f}",
        flush=True,
    )


def machine() -> dict[str, Any]:
    """What it ran on."""
    from importlib.metadata import version

    from pantheraml.hardware.cpu import cpu_name

    return {"cpu": cpu_name(), "versions": {name: version(name) for name in ("torch", "transformers", "numpy")}}


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
