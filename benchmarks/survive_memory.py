"""What a memory survives: kills at any moment of puts and compactions, and flipped bits of any of its files.

    python benchmarks/survive_memory.py [--quick] [--seed N]

1. A process puts, replaces, deletes and compacts, and notes each deed before it and after it was acknowledged. It is ended with SIGKILL
   again and again, at random moments, every other time while it compacts. After each kill `verify` must find nothing wrong, and each
   record must be as the last acknowledged deed has left it; a deed that was under way may have happened or not.
2. One random bit of a random byte of each kind of file is flipped, in a store that was closed and in one that a kill has left. It must be
   found, with the file named, by opening or by `verify`; and after `repair` all records must read back but those that stood in the same
   page of 4 KiB or the same cold block.

Times and places are drawn from the seed. The last line is JSON; the exit status is 1 if any count falls short.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pantheraml.memory.store import Memory

KEYS = 400
LONGEST_WAIT_S = 120.0
ANY_MOMENT_S = 0.6  # puts and compactions take less, so any place of them may be hit
PAGE_BYTES, BLOCK_BYTES = 4096, 32 << 10
SMALLER = 8
"""Content is at most so many times smaller in a block, so that what one held comes to at most so many times its size."""


def opened(folder: Path, **settings: Any) -> Memory:
    """A store with so little room that each compaction moves records to cold segments and back."""
    from pantheraml.memory.policy import Budgets
    from pantheraml.memory.store import Memory

    return Memory.open(folder, budgets=Budgets(hot_bytes=1 << 16, warm_bytes=1 << 17), **settings)


def content(key: int, version: int) -> str | bytes:
    """What a record holds in its version: text with neighbours that are like it, and now and then bytes."""
    draw = random.Random(key * 1000 + version)
    if key % 11 == 0:
        return draw.randbytes(draw.randrange(3000))
    words = random.Random(key // 5).choices(("red", "green", "river", "cloud", "maple", "north", "quick", "copper"), k=60)
    return f"record {key}, version {version}: {' '.join(words)} {draw.random()}"


def main() -> int:
    """Kill, flip, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 kills and 8 flips of each kind of file instead of 50 and 60")
    parser.add_argument("--seed", type=int, default=3407, help="of the times and places (default: %(default)s)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        return work(Path(asked.child[0]), Path(asked.child[1]), random.Random(asked.seed))
    kills, flips = (4, 8) if asked.quick else (50, 60)
    chance = random.Random(asked.seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pantheraml-survive-") as name:
        room = Path(name)
        sound, compacting, deeds = killed(room, kills, chance)
        left = room / "left"  # as a kill leaves it, with its log
        shutil.copytree(room / "store", left)
        with opened(room / "store"):
            pass
        found = Counter[str]()
        for state, folder in (("closed", room / "store"), ("killed", left)):
            for kind, paths in files(folder).items():
                for _ in range(flips):
                    done = flipped(folder, room / "flipped", chance.choice(paths), chance)
                    found.update({f"{state} {kind}": 1, f"{state} {kind} found": done[0], f"{state} {kind} cheap": done[1]})
    rows = [("kills after which all is sound", sound, kills)]
    for kind in sorted({each.removesuffix(" found").removesuffix(" cheap") for each in found}):
        rows += [(f"{kind}: found and named", found[f"{kind} found"], found[kind])]
        rows += [(f"{kind}: cost its own block at most", found[f"{kind} cheap"], found[kind])]
    for what, count, of in rows:
        print(f"{what:60}  {count:>4} of {of:<4} {'' if count == of > 0 else 'FALLS SHORT'}".rstrip())
    print(f"{deeds} deeds were acknowledged, {compacting} kills hit a compaction; {time.perf_counter() - began:.0f} s in all")
    ok = all(count == of > 0 for _, count, of in rows)
    said = {"benchmark": "survive_memory", "ok": ok, "seed": asked.seed, "kills": kills, "in_compaction": compacting, "deeds": deeds}
    print(json.dumps(said | {"counts": {what: [count, of] for what, count, of in rows}}))
    return 0 if ok else 1


# ---- Kills -----------------------------------------------------------------------------------------------------------


def work(store: Path, notes: Path, chance: random.Random) -> int:
    """Deeds without end. Each is noted as begun, and as done once it is acknowledged."""
    from pantheraml.memory.record import Record

    out = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    versions = replayed(notes)[0]

    def note(**said: object) -> None:
        os.write(out, (json.dumps(said) + "\n").encode())

    with opened(store, wait_s=10) as memory:
        while True:
            deed = chance.choices(("put", "put_many", "delete", "compact", "get"), (8, 4, 2, 2, 4))[0]
            keys = [chance.randrange(KEYS) for _ in range(1 if deed in ("put", "delete", "get") else 30)]
            new = {key: abs(versions.get(key, 0)) + 1 for key in keys}
            if deed == "compact":
                note(begin="compact")
                memory.compact(now=time.time() + chance.choice((0, 90 * 86_400)))
                note(done="compact")
            elif deed == "get":
                if versions.get(keys[0], 0) > 0:
                    memory.get(str(keys[0]))
            else:
                changed = {key: -version if deed == "delete" else version for key, version in new.items()}
                note(begin="change", versions=changed)
                if deed == "delete":
                    memory.delete(str(keys[0]))
                elif deed == "put":
                    memory.put(str(keys[0]), content(keys[0], new[keys[0]]))
                else:
                    memory.put_many([Record(key=str(key), content=content(key, version)) for key, version in new.items()])
                note(done="change")
                versions |= changed


def replayed(notes: Path) -> tuple[dict[int, int], dict[int, int], bool, int]:
    """(version of each key by what was acknowledged, what a deed under way would make, whether that is compacting, deeds).

    A version below 0 is a deletion.
    """
    versions, pending = dict[int, int](), dict[int, int]()
    compacting, deeds = False, 0
    for line in notes.read_text().splitlines() if notes.exists() else ():
        said = json.loads(line)
        if "begin" in said:
            pending = {int(key): version for key, version in said.get("versions", {}).items()}
            compacting = said["begin"] == "compact"
        else:
            versions |= pending
            pending, compacting, deeds = {}, False, deeds + 1
    return versions, pending, compacting, deeds


def killed(room: Path, kills: int, chance: random.Random) -> tuple[int, int, int]:
    """(kills after which all was sound, kills that hit a compaction, deeds)."""
    store, notes = room / "store", room / "notes.jsonl"
    sound = hit = 0
    for kill in range(kills):
        before = replayed(notes)[3]
        command = [sys.executable, __file__, "--child", str(store), str(notes), "--seed", str(chance.randrange(10**9))]
        child = subprocess.Popen(command, stderr=subprocess.PIPE)
        until = time.monotonic() + LONGEST_WAIT_S
        while child.poll() is None and time.monotonic() < until:
            _, _, compacting, deeds = replayed(notes)
            if deeds > before + 5 and (compacting or kill % 2 == 0):
                break
            time.sleep(0.005)
        time.sleep(chance.uniform(0, ANY_MOMENT_S if kill % 2 == 0 else 0.1))
        child.send_signal(signal.SIGKILL)
        said = child.communicate()[1].decode()
        if child.returncode != -signal.SIGKILL:
            sys.exit(f"the process that puts has failed:\n{said}")
        hit += replayed(notes)[2]
        if kill == kills - 1:  # the last one's files stay as they are, for the flips
            shutil.copytree(store, room / "look")
            store = room / "look"
        wrong = looked(store, notes)
        sound += not wrong
        print(f"kill {kill + 1} of {kills}: {'; '.join(wrong[:3]) or 'sound'}", file=sys.stderr)
    return sound, hit, replayed(notes)[3]


def looked(store: Path, notes: Path) -> list[str]:
    """What is wrong with a store after a kill. Settles what the deed under way has come to."""
    versions, pending, _, _ = replayed(notes)
    announced: list[str] = []
    with opened(store, readonly=True, announce=announced.append) as memory:
        wrong = [*announced, *memory.verify().problems]
        came_to: dict[int, int] = {}
        for key in range(KEYS):
            allowed = [versions.get(key, 0), *([pending[key]] if key in pending else [])]
            held = memory.get(str(key)).content if str(key) in memory else None
            fits = [version for version in allowed if held == (content(key, version) if version > 0 else None)]
            if not fits:
                wrong.append(f"record {key} should have version {allowed}")
            else:
                came_to[key] = fits[-1]
        changed = [key for key in pending if came_to.get(key) == pending[key]]
        if changed and len(changed) < len(pending):
            wrong.append(f"of a deed on {len(pending)} records {len(changed)} were changed")
    if pending:
        with notes.open("a") as out:
            done = {key: version for key, version in came_to.items() if key in pending}
            out.write(json.dumps({"begin": "change", "versions": done}) + "\n" + json.dumps({"done": "change"}) + "\n")
    return wrong


# ---- Flips -----------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, list[Path]]:
    """Kind -> files of a store that are not empty. The lock is none, and store.db-shm is made anew by whoever opens the store."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size and path.name not in ("lock", "store.db-shm"):
            kind = path.name if path.parent == folder else path.parent.name
            found.setdefault(kind, []).append(path.relative_to(folder))
    return found


def flipped(folder: Path, copy: Path, path: Path, chance: random.Random) -> tuple[bool, bool]:
    """(whether the flip is found and the file named, whether it costs no more than its block)."""
    from pantheraml.errors import StorageError
    from pantheraml.memory.store import Memory

    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / "store.db-shm").unlink(missing_ok=True)
    held = readable(folder)
    data = bytearray((copy / path).read_bytes())
    at = chance.randrange(len(data))
    data[at] ^= 1 << chance.randrange(8)
    (copy / path).write_bytes(data)
    said: list[str] = []
    try:
        with opened(copy, readonly=True, announce=said.append) as memory:
            said += memory.verify().problems
    except StorageError as error:
        said.append(str(error))
    named = any(path.name.removesuffix(".copy") in each for each in said)
    Memory.repair(copy, announce=said.append)
    kept = readable(copy)
    lost = {key for key in held if kept.get(key) != held[key]}
    size = sum(len(held[key]) for key in lost)
    return named, len(lost) <= 1 or size <= SMALLER * (BLOCK_BYTES if "cold" in path.parts else PAGE_BYTES)


def readable(folder: Path) -> dict[str, bytes]:
    """Key -> content of all records that can be read."""
    from pantheraml.errors import StorageError

    found: dict[str, bytes] = {}
    copy = folder.with_name("reading")  # to open a store that a kill has left changes its log
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    with opened(copy, readonly=True, announce=lambda said: None) as memory:
        for key in range(KEYS):
            try:
                held = memory.get(str(key)).content if str(key) in memory else None
            except StorageError:
                continue
            if held is not None:
                found[str(key)] = held if isinstance(held, bytes) else str(held).encode()
    return found


if __name__ == "__main__":
    sys.exit(main())
