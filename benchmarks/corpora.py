"""Real text that is on any machine, as records of about 1 KB: for the benchmarks of the memory.

Each corpus is a list of documents, and each document a list of records, so that train and held-out are split by document:
docstrings and sources of Python's own library, descriptions of the packages that are installed and the pages of this
repository, and logs that are made here. A file is on the same side of the split in all corpora, since its docstrings are in its
source too; and a record comes once.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path

RECORD_BYTES = 1024


class Document(list[str]):
    """Records of one file. origin: its name, which decides where in the order it comes, and whether it is held out."""

    def __init__(self, origin: str, records: Iterable[str]) -> None:
        super().__init__(records)
        self.origin = origin

    def drawn(self, seed: int, what: str) -> float:
        """A number in [0, 1) that depends on these alone."""
        return int.from_bytes(hashlib.sha256(f"{seed} {what} {self.origin}".encode()).digest()[:6], "big") / 2**48


def corpora(seed: int = 3407, most_bytes: int = 2_000_000) -> dict[str, list[Document]]:
    """Name -> documents, in random order, of about so many bytes each: the last document is taken whole."""
    made = {"docstrings": _docstrings(), "sources": _sources(), "pages": _pages(), "logs": _logs(seed)}
    known = set[str]()
    return {name: _some(documents, seed, most_bytes, known) for name, documents in made.items()}


def split(documents: list[Document], seed: int = 3407, held_out: float = 0.2) -> tuple[list[str], list[str]]:
    """Records to learn from, and records of other documents: about a share of all, and of one document at least."""
    held = [each for each in documents if each.drawn(seed, "held out") < held_out] or documents[:1]
    kept = {each.origin for each in held}
    return [record for each in documents if each.origin not in kept for record in each], [record for each in held for record in each]


def _size(document: Document) -> int:
    return sum(len(record.encode()) for record in document)


def _some(documents: Iterable[Document], seed: int, most_bytes: int, known: set[str]) -> list[Document]:
    """Documents in random order, without records that are known."""
    chosen: list[Document] = []
    total = 0
    for document in sorted(documents, key=lambda each: each.drawn(seed, "order")):
        new = Document(document.origin, [record for record in dict.fromkeys(document) if record not in known])
        known.update(new)
        if new:
            chosen.append(new)
            total += _size(new)
        if total > most_bytes:
            break
    return chosen


def _records(origin: str, pieces: list[str], between: str) -> Document:
    """Neighbours together until they come to about RECORD_BYTES; what is longer is cut."""
    records: list[str] = []
    for piece in pieces:
        if records and len(records[-1]) + len(piece) < RECORD_BYTES:
            records[-1] += between + piece
        else:
            records += [piece[at : at + RECORD_BYTES] for at in range(0, len(piece), RECORD_BYTES)]
    return Document(origin, [record for record in records if len(record) > RECORD_BYTES // 4])


def _library() -> list[Path]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in folder.rglob("*.py") if not {"site-packages", "dist-packages", "test", "tests"} & set(path.parts))


def _parsed() -> Iterator[tuple[str, str, ast.Module]]:
    for path in _library():
        try:
            text = path.read_text("utf-8")
            yield str(path), text, ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue


def _docstrings() -> Iterator[Document]:
    described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name, _, tree in _parsed():
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, described)]
        yield _records(name, [text for text in found if len(text) > 80], "\n\n")


def _sources() -> Iterator[Document]:
    for name, text, tree in _parsed():
        found = [ast.get_source_segment(text, node) or "" for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        yield _records(name, found, "\n\n")


def _pages() -> Iterator[Document]:
    root = Path(__file__).resolve().parents[1]
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        yield _records(str(path.relative_to(root)), path.read_text("utf-8").split("\n\n"), "\n\n")
    for each in sorted(distributions(), key=lambda each: each.name):
        if each.name == "pantheraml":  # its description is the README above
            continue
        body = (each.read_text("METADATA") or "").partition("\n\n")[2]
        yield _records(f"package {each.name}", body.split("\n\n"), "\n\n")


def _logs(seed: int) -> Iterator[Document]:
    """A day of a service and of a trainer for each document, as they are written by many programs."""
    for day in range(60):
        draw = random.Random(seed + day)
        lines, at = [], 1_790_000_000 + day * 86_400
        users, hosts = (
            [f"user-{draw.randrange(10**6):06d}" for _ in range(40)],
            [f"10.0.{draw.randrange(8)}.{draw.randrange(256)}" for _ in range(12)],
        )
        for step in range(400):
            at += draw.randrange(1, 40)
            match draw.randrange(4):
                case 0:
                    path = draw.choice(("/v1/chat/completions", "/v1/models", "/health", "/v1/embeddings", "/login"))
                    lines.append(
                        f'{draw.choice(hosts)} - {draw.choice(users)} [{at}] "POST {path} HTTP/1.1" {draw.choice((200, 200, 200, 404, 500))} {draw.randrange(40, 9000)}'
                    )
                case 1:
                    lines.append(
                        json.dumps(
                            {
                                "ts": at,
                                "level": draw.choice(("info", "info", "warn")),
                                "step": step,
                                "loss": round(3 / (1 + step / 50) + draw.random() / 9, 4),
                                "tokens_per_s": draw.randrange(900, 1400),
                                "memory_gib": round(3 + draw.random(), 2),
                            }
                        )
                    )
                case 2:
                    lines.append(
                        f"{at} WARNING retry {draw.randrange(1, 5)} of 5 for {draw.choice(users)}: connection to {draw.choice(hosts)}:{draw.choice((443, 8080, 5432))} timed out after {draw.randrange(1, 30)}.{draw.randrange(10)} s"
                    )
                case _:
                    lines.append(
                        f"{at} INFO worker-{draw.randrange(16)} finished job {draw.randrange(16**8):08x} in {draw.randrange(1, 9000)} ms, queue {draw.randrange(100)}"
                    )
        yield _records(f"day {day}", lines, "\n")
