"""What checksums say of the files of a store: each problem with its file and place. Rows and the ledger are looked at in audit.py."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pantheraml.memory.ledger import START, Head, Tip, unpack_block
from pantheraml.memory.pages import DB, HEAD, SUMS, WAL, Problem, RawFile, Sums, check_pages, read_sums
from pantheraml.memory.wal import Frames, examine


def examine_files(
    folder: Path,
    raw: RawFile,
    *,
    pages: int | None,
    live: bool,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Sums, list[Problem]]:
    """Compares the pages of store.db, the frames of its log, store.sums and store.head with their checksums.

    Args:
        raw: store.db. pages: how many of them, from the first; None: all.
        live: another process may be writing, so what seems wrong is looked at again. progress: hears pages done, and of all.
    """
    sums, frames, taken, found = _side_files(folder)
    for _ in range(8 if live and found else 0):
        time.sleep(0.02)
        sums, frames, taken, found = _side_files(folder)
        if not found:
            break

    def logged() -> frozenset[int]:
        now, took = examine(folder / WAL)[:2] if live else (frames, taken)
        return frozenset(now.page[:took].tolist()) if now else frozenset()

    if all(each.harmless for each in sums.problems):
        known = partial(read_sums, folder / SUMS) if live else lambda: sums
        found += check_pages(raw.handle, known, logged, live=live, first=pages, progress=progress)
    return sums, found


def _side_files(folder: Path) -> tuple[Sums, Frames | None, int, list[Problem]]:
    sums = read_sums(folder / SUMS)
    frames, taken, wrong = examine(folder / WAL, sums.covered)
    head = Head(folder / HEAD).read()
    return sums, frames, taken, [*sums.problems, *wrong, *([Problem(HEAD, "file", head)] if isinstance(head, str) else [])]


def read_tip(connection: sqlite3.Connection, head: tuple[int, bytes] | str = "") -> tuple[Tip, list[Problem]]:
    """Where the ledger ends, and whether it reaches the newest acknowledged change. head: `Head.read`, from before this is called."""
    newest = connection.execute("SELECT seq, block FROM ledger ORDER BY seq DESC LIMIT 1").fetchone()
    block = unpack_block(*newest) if newest else None
    if block is None:
        which = f"entry {newest[0]}" if newest else "its newest entry"
        return Tip(0, START, 1), [Problem(DB, f"ledger, {which}", "it is not what was written")]
    tip = block.tip
    if isinstance(head, tuple) and tip.seq < head[0]:
        return tip, [Problem(WAL, "its end", f"changes {tip.seq + 1} to {head[0]} were acknowledged, and are not there")]
    if isinstance(head, tuple) and tip.seq == head[0] and tip.hash != head[1]:
        return tip, [Problem(HEAD, "hash", f"change {tip.seq} in the ledger is another one than was acknowledged")]
    return tip, []
