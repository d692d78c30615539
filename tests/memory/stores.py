"""Small stores for tests, and processes that write into them until they are killed."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pantheraml.memory.rows import Row
from pantheraml.memory.warm import Warm

ROOT = Path(__file__).parents[2]


def lines(n: int, seed: int = 0) -> str:
    """Text like a log's, the same for the same seed."""
    draw = random.Random(seed)
    return "\n".join(
        f"{draw.randrange(10**6)} INFO worker-{draw.randrange(9)} finished job {i} in {draw.randrange(900)} ms" for i in range(n)
    )


def row(number: int, size: int = 150, **how: Any) -> Row:
    """Record `k<number>`, the same each time."""
    how = {"key": f"k{number}", "container": random.Random(number).randbytes(size), "hash": hashlib.sha256(b"%d" % number).digest(), **how}
    return Row(created=number, form="text", raw_size=size, codec=0, stored_bytes=size, **how)


def bands(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, (count, 8))


def same(one: Row, other: Row) -> bool:
    """Equal but for the change that wrote them."""
    return replace(one, seq=0) == replace(other, seq=0)


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one: what is killed or flipped here does not need the disk, and would wait for it often."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as folder:
        yield Path(folder)


def run(code: str, *arguments: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """Runs a program in another process, to its end."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
        **how,
    )


@contextmanager
def start(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Starts one, which is killed at the end."""
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from pantheraml.memory.warm import Warm
from tests.memory.stores import bands, row
folder = Path(sys.argv[1])
"""


def build(folder: Path, **how: Any) -> None:
    """A closed store with something in each table, a few pages large."""
    with Warm(folder, **how) as store:
        fill(store)


def fill(store: Warm) -> None:
    ids = store.insert([row(i) for i in range(1, 41)], bands(40))
    store.insert([row(41, 9000)])  # over pages of its own
    store.insert([row(42, container=None, same_as=ids[0])])
    store.delete([5, 6])
    store.replace([replace(store.rows([8])[8], container=b"another" * 20, hash=bytes(32))])
    store.touch([1, 2, 3], 12345)
    store.set({"something": b"set" * 20})


FILL_AND_DIE = """
store = Warm(folder, keys=None)
from tests.memory.stores import fill
fill(store)
store.checkpoint()
store.insert([row(i) for i in range(200, 220)])
store.delete([10])
store.insert([row(300, 5000)])
os.kill(os.getpid(), signal.SIGKILL)
"""


def copy(source: Path, folder: Path) -> Path:
    """The store anew, without what came of the last test of it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    return folder
