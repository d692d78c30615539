"""Loss of power: what a writer has told the system is recorded, and disks are made that have what was synced and a part of the rest.

As in ALICE (Pillai et al., OSDI 2014): data that no fsync has covered may be there, or not, or half, in any order; names appear in the order
in which they were made (as ext4's journal has it), and with the next fsync at the latest.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.memory.stores import PRELUDE, ROOT, memory_folder, row

from pantheraml.memory.pages import SHM
from pantheraml.memory.warm import Warm

__all__ = ["memory_folder"]
CALLS = "openat,write,pwrite64,ftruncate,fsync,fdatasync,rename,unlink"
WRITER = """
import random
rng, n = random.Random(0), 0
store = Warm(folder, wal_bytes=60_000)
for i in range(40):
    count = rng.choice((1, 2, 20))
    with store.write():
        ids = store.insert([row(n + k, rng.choice((5, 150, 6000))) for k in range(count)], bands(count, i))
        if i % 3 == 0: store.delete(ids[:1])
    print(*[f"k{n + k}" for k in range(i % 3 == 0, count)], flush=True)
    n += count
    if i == 25: store.vacuum()
    if i == 32:
        store.close()
        store = Warm(folder, wal_bytes=60_000)
store.close()
"""


@dataclass
class Data:
    """The bytes of a file: what is on the disk, and what was written since, (offset, bytes) or (size,)."""

    disk: bytearray = field(default_factory=bytearray)
    since: list[tuple[int] | tuple[int, bytes]] = field(default_factory=list["tuple[int] | tuple[int, bytes]"])
    at: int = 0

    def sync(self) -> None:
        for each in self.since:
            put(self.disk, each)
        self.since = []


def put(data: bytearray, what: tuple[int] | tuple[int, bytes]) -> None:
    end = what[0] + (len(what[1]) if len(what) == 2 else 0)
    data.extend(bytes(max(end - len(data), 0)))
    if len(what) == 2:
        data[what[0] : end] = what[1]
    else:
        del data[end:]


def recorded(folder: Path) -> list[tuple[str, str, tuple[int] | tuple[int, bytes] | str]]:
    """(call, path, what) of all that a writer in `folder` has told the system, its acknowledgements among it."""
    strace = shutil.which("strace")
    if not strace:
        pytest.skip("no strace: nothing can be recorded")
    trace = folder.with_name("trace")
    watch = [strace, "-f", "-y", "-xx", "-s", "4000000", "-e", f"trace={CALLS}", "-o", str(trace)]
    subprocess.run([*watch, sys.executable, "-c", PRELUDE + WRITER, str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    found = []
    for line in trace.read_text("latin1").splitlines():
        call = re.fullmatch(r"\d+ +(\w+)\((.*)\) += (\d+).*", line)
        if not call:
            continue
        name, said = call[1], call[2]
        texts = [bytes.fromhex(each.replace("\\x", "")) for each in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', said)]
        handle = re.match(r"(\d+)<((?:\\x..)*)>", said)
        path = bytes.fromhex(handle[2].replace("\\x", "")).decode() if handle else texts[0].decode() if texts else ""
        if handle and handle[1] == "1" and name == "write":
            found.append(("told", "", texts[0].decode()))
        elif (not path.startswith(f"{folder}/") and path != str(folder)) or path.endswith((SHM, "/lock")):
            continue
        elif name == "openat" and "O_CREAT" in said:
            found.append(("create", path, ""))
        elif name == "rename":
            found.append((name, path, texts[1].decode()))
        elif name in ("fsync", "fdatasync", "unlink"):
            found.append((name, path, ""))
        elif name == "ftruncate":
            found.append((name, path, (int(said.rsplit(",", 1)[1]),)))
        elif name == "pwrite64":
            found.append((name, path, (int(said.rsplit(",", 1)[1]), texts[-1])))
        elif name == "write":
            found.append((name, path, (-1, texts[-1])))
    return found


def after_a_loss_of_power(calls: list, cut: int, rng: random.Random) -> tuple[dict[str, bytes], set[str]]:
    """What may be on the disk after so many calls, and the keys that were acknowledged by then."""
    now: dict[str, Data] = {}
    disk: dict[str, Data] = {}
    names: list = []  # made or changed since the last fsync
    told: set[str] = set()

    def settle(count: int) -> None:
        for name, path, what in names[:count]:
            if name == "create":
                disk[path] = what
            elif name == "rename" and path in disk:
                disk[what] = disk.pop(path)
            elif name == "unlink":
                disk.pop(path, None)
        del names[:count]

    for name, path, what in calls[:cut]:
        if name == "told":
            told |= set(what.split())
        elif name == "create" and path not in now:
            now[path] = Data()
            names.append((name, path, now[path]))
        elif name == "rename":
            now[what] = now.pop(path)
            names.append((name, path, what))
        elif name == "unlink" and now.pop(path, None):
            names.append((name, path, None))
        elif name in ("fsync", "fdatasync"):
            if path in now:
                now[path].sync()
            settle(len(names))
        elif path in now and name != "create":
            data = now[path]
            if name == "write":
                what = (data.at, what[1])
                data.at += len(what[1])
            data.since.append(what)
    settle(rng.randrange(len(names) + 1))
    left: dict[str, bytes] = {}
    for path, data in disk.items():
        content, likely, in_order = bytearray(data.disk), rng.random(), rng.random() < 0.5
        for each in data.since[: rng.randrange(len(data.since) + 1)] if in_order else data.since:
            if in_order or rng.random() < likely:
                put(content, each)
            elif len(each) == 2 and len(each[1]) > 512 and rng.random() < 0.3:  # some of its sectors
                put(content, (each[0], each[1][: rng.randrange(0, len(each[1]), 512)]))
        left[Path(path).name] = bytes(content)
    return left, told


def test_nothing_that_was_acknowledged_is_lost_with_the_power(memory_folder):
    calls = recorded(memory_folder / "s")
    assert sum(name == "told" for name, _, _ in calls) >= 40 and sum(name == "fdatasync" for name, _, _ in calls) > 40
    rng = random.Random(0)
    folder = memory_folder / "t"
    for i in range(120):
        cut = rng.randrange(1, len(calls) + 1)
        left, told = after_a_loss_of_power(calls, cut, rng)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in left.items():
            (folder / name).write_bytes(data)
        with Warm(folder, check="full", announce=lambda said: None) as store:
            assert all(each.harmless for each in (*store.problems, *store.verify())), (i, cut)
            there = {each.key for each in store.scan()}
            assert told <= there and len(there) <= len(told) + 20, (i, cut)
            store.insert([row(10**6)])  # and it goes on
        with Warm(folder, check="full") as store:
            assert store.problems == () and store.verify() == [], (i, cut)
