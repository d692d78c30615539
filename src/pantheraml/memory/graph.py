"""Approximate search: a graph of one tenant's vectors in which near ones are linked (HNSW, arXiv 1603.09320), by usearch.

The graph holds no vectors of its own: it points into the blocks, which it keeps alive. Rows are known by their serial numbers.
Deleted ones stay in it; whoever searches leaves them out, and builds it anew when they are many.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pantheraml.errors import MissingExtra
from pantheraml.memory.columns import Block
from pantheraml.memory.features import I64

LINKS = 24
"""Of a vector, on the upper floors of the graph; twice as many on the lowest. About 300 bytes a vector."""
BUILD_BREADTH = 96
"""Candidates that are looked at for each vector that is put in."""
BREADTH = 384
"""Candidates that a search looks at, at least."""
STEP_ROWS = 16
"""Put in at once, while searches wait: some milliseconds."""


class Graph:
    """Many threads may search at once; one may add. Raises: MissingExtra without usearch."""

    def __init__(self, dimensions: int) -> None:
        try:
            from usearch.index import Index
        except ImportError as error:
            raise MissingExtra("usearch", needed_for="approximate search", install='"pantheraml[memory]"') from error
        self._empty: Callable[[], Any] = lambda: Index(
            ndim=dimensions, metric="cos", dtype="i8", connectivity=LINKS, expansion_add=BUILD_BREADTH, enable_key_lookups=False
        )
        self._index: Any = self._empty()
        self._mapped: Path | None = None
        self._kept: list[Block] = []
        self._readers = self._waiting = 0
        self._writing = False
        self._turn = threading.Condition()
        self.upto = 0
        """All rows of the tenant with a smaller serial number are in."""
        self.file: tuple[str, ...] | None = None
        """Where it is saved, and in which state; see index.py."""

    def __len__(self) -> int:
        return len(self._index)

    def add(self, block: Block, rows: NDArray[np.intp], *, threads: int = 1) -> None:
        """Rows of a block, rising, none before `upto`. Vectors of zeros have no direction, and are left out. See `writable`."""
        if not any(block is each for each in self._kept):
            self._kept.append(block)
        for begin in range(0, len(rows), STEP_ROWS * threads):
            step = rows[begin : begin + STEP_ROWS * threads]
            with self._alone():
                # It keeps the address of what it is given, so only slices of the block itself will do.
                for run in np.split(step, np.flatnonzero(np.diff(step) != 1) + 1):
                    first, last = int(run[0]), int(run[-1]) + 1
                    if block.scale[first:last].all():
                        self._index.add(block.serial[first:last], block.code[first:last], copy=False, threads=threads)
                    else:
                        for row in run[block.scale[run] != 0].tolist():
                            self._index.add(block.serial[row : row + 1], block.code[row : row + 1], copy=False, threads=1)
                self.upto = int(block.serial[step[-1]]) + 1

    def search(self, code: NDArray[np.int8], count: int) -> tuple[I64, int]:
        """(serial numbers of about so many nearest ones, `upto` at that moment)."""
        with self._among_readers():
            self._index.expansion_search = max(BREADTH, count)
            found = self._index.search(code, min(count, len(self._index)), threads=1) if len(self._index) else None
            return (np.empty(0, np.int64) if found is None else found.keys.astype(np.int64)), self.upto

    def to_bytes(self) -> bytes:
        """As usearch writes it, with the vectors."""
        with self._among_readers():
            return bytes(self._index.save())

    def load(self, data: Path | bytes, upto: int) -> None:
        """What `to_bytes` gave; a file is mapped, and not read until `writable`.

        Raises: RuntimeError, ValueError for what usearch cannot read.
        """
        with self._alone():
            if isinstance(data, Path):
                self._index.view(data)
                self._mapped = data
            else:
                self._read(data)
            self.upto = upto

    def writable(self) -> bool:
        """Read what is only mapped, so that something can be added. Returns False if the file is gone or cannot be read."""
        with self._alone():
            try:
                if self._mapped is not None:
                    self._read(self._mapped)
            except (OSError, RuntimeError, ValueError):
                return False
            return True

    def _read(self, data: Path | bytes) -> None:
        """From here on the graph holds the vectors that it has."""
        index = self._empty()
        index.load(data)
        self._index, self._mapped = index, None

    @contextmanager
    def _among_readers(self) -> Iterator[None]:
        with self._turn:
            self._waiting += 1
            self._turn.wait_for(lambda: not self._writing)
            self._waiting -= 1
            self._readers += 1
            self._turn.notify_all()
        try:
            yield
        finally:
            with self._turn:
                self._readers -= 1
                self._turn.notify_all()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Readers go first: what is not yet in the graph is searched exactly, so nobody waits for it."""
        with self._turn:
            self._turn.wait_for(lambda: not (self._writing or self._readers or self._waiting))
            self._writing = True
        try:
            yield
        finally:
            with self._turn:
                self._writing = False
                self._turn.notify_all()
