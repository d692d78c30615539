"""What a run survives: kills at any moment, flipped bits, and files that are missing or from another checkpoint.

    python benchmarks/survive.py [--quick] [--seed N] [--device cpu|tpu]

Three counts, each with what it should be:

1. One training run (tiny:llama, LoRA with dropout, a checkpoint after every step) is ended with SIGKILL again and
   again, and goes on each time. Every other kill waits for a random moment; the rest wait until a save is seen under
   way. At the end its adapter, the tensors of its last checkpoint (weights and both moments of the optimizer) and its
   curves must equal, bit by bit, those of a run that nobody disturbed.
2. One random bit of a random file of a checkpoint is flipped. Loading it must say which file is damaged, and the run
   must go on from the checkpoint before it.
3. Each file of a checkpoint is removed, and each is exchanged with its namesake from another checkpoint. Same demands.

Times and places are drawn from the seed. The last line is JSON; the exit status is 1 if any count falls short.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROWS = 200
LONGEST_WAIT_S = 300.0  # for a step or a save to be seen: far more than a slow machine needs to start
LOOK_EVERY_S = 0.001
ANY_MOMENT_S = 0.2  # a step and its save take less on most machines, so any place of both may be hit
MID_SAVE_S = 0.005  # a save of this adapter takes longer: 4 MB are written, hashed and synced
WORDS = ("red", "green", "blue", "stone", "river", "cloud", "maple", "copper", "violet", "amber", "north", "south", "quick", "slow")
# Checkpoints are made in hidden folders and go through hidden folders; one that is left tells that a kill hit a save.
HIDDEN, HALF_WRITTEN = ".*", "unfinished"

# Float32, because `auto` asks the clock which dtype is faster, and on a busy machine two runs may get two answers.
RECIPE = """\
model: {{name: tiny:llama, dtype: float32}}
data: {{train: {rows}, eval_fraction: 0.05}}
adapter: {{kind: lora, rank: 32, dropout: 0.1}}
batch: {{size: 4, micro_tokens: 512}}
optim: {{steps: {steps}, lr: 1.0e-3}}
eval: {{every: 20, generate_rows: 0}}
hardware: {{kind: {device}, simulate_tpu: {simulate}, threads: 1}}
run: {{folder: {folder}, name: run, save_every: 1, log_every: 1}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One SIGKILL: after which step it was due, whether a save was waited for, what it hit, and where the run went on."""

    step: int
    aimed: bool
    inside_save: bool
    newest: int | None
    went_on_after: int | None

    @property
    def resumed(self) -> bool:
        """Whether the run went on from the newest checkpoint that was left; from the start if there was none."""
        return self.went_on_after == self.newest


def main() -> int:
    """Count, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 kills and 10 flips instead of 20 and 40")
    parser.add_argument("--seed", type=int, default=3407, help="of the times and places (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "tpu"), default="cpu", help="tpu: simulated by XLA (default: %(default)s)")
    asked = parser.parse_args()
    kills, flips, steps = (3, 10, 30) if asked.quick else (20, 40, 200)
    chance = random.Random(asked.seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pantheraml-survive-") as name:
        room = Path(name)
        undisturbed = start(room, "undisturbed", steps, asked.device)
        finish(undisturbed)
        hit, same = count_kills(room, undisturbed.folder, kills, steps, chance, asked.device)
        checkpoints = undisturbed.folder / "checkpoints"
        flipped = count_flips(checkpoints, room, flips, chance)
        tampered = count_tampered(checkpoints, room)

    rows = [
        ("killed with SIGKILL, and went on", sum(kill.resumed for kill in hit), kills),
        *((f"  {what}, equal bit by bit", equal, of) for what, (equal, of) in same.items()),
        ("one bit flipped, named and passed over", sum(flipped.values()), len(flipped)),
        ("file missing or exchanged, named and passed over", sum(tampered.values()), len(tampered)),
    ]
    print()
    print(f"{'kill':>4}  {'in step':>7}  {'waited for a save':17}  {'hit a save':10}  {'newest left':>11}  {'went on after':>13}")
    for number, kill in enumerate(hit, 1):
        cells = [yes(kill.aimed), yes(kill.inside_save), shown(kill.newest), shown(kill.went_on_after)]
        print(f"{number:>4}  {kill.step + 1:>7}  {cells[0]:17}  {cells[1]:10}  {cells[2]:>11}  {cells[3]:>13}")
    print()
    for what, count, of in rows:
        print(f"{what:48}  {count:>4} of {of:<4} {'' if count == of else 'FALLS SHORT'}".rstrip())
    for what in (what for what, good in {**flipped, **tampered}.items() if not good):
        print(f"  not found out: {what}")
    inside = sum(kill.inside_save for kill in hit)
    print(f"{inside} of the {kills} kills hit a save; {time.perf_counter() - began:.0f} s in all")

    ok = all(count == of for _, count, of in rows)
    result = {
        "benchmark": "survive",
        "ok": ok,
        "seed": asked.seed,
        "steps": steps,
        "kills": kills,
        "kills_inside_save": inside,
        "resumed": sum(kill.resumed for kill in hit),
        "identical": all(equal == of for equal, of in same.values()),
        "equal": {what: list(pair) for what, pair in same.items()},
        "flips": len(flipped),
        "flips_detected": sum(flipped.values()),
        "tampered": len(tampered),
        "tampered_refused": sum(tampered.values()),
        "kill_list": [asdict(kill) for kill in hit],
    }
    print(json.dumps(result))
    return 0 if ok else 1


# 1. Kills.


@dataclass(frozen=True, slots=True)
class Child:
    """A training process, and where it writes."""

    process: subprocess.Popen[bytes]
    folder: Path
    log: Path


def start(room: Path, name: str, steps: int, device: str) -> Child:
    """Begin the run, or go on with it, in a process of its own."""
    home = room / name
    home.mkdir(exist_ok=True)
    recipe, rows = home / "recipe.yaml", room / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(random.Random(0))), "utf-8")
    recipe.write_text(RECIPE.format(rows=rows, steps=steps, folder=home, device=device, simulate=str(device == "tpu").lower()), "utf-8")
    log = home / "log.txt"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "pantheraml", "train", str(recipe), "--resume"]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=room)
    return Child(process, home / "run", log)


def make_rows(chance: random.Random) -> list[dict[str, str]]:
    """Questions and answers of a few words."""
    return [{"prompt": say(chance, 2, 12) + " -> ", "completion": say(chance, 2, 12)} for _ in range(ROWS)]


def say(chance: random.Random, fewest: int, most: int) -> str:
    """Some words."""
    return " ".join(chance.choices(WORDS, k=chance.randint(fewest, most)))


def finish(child: Child) -> None:
    """Wait for the end of a run. Raises: SystemExit with what it said, if it failed."""
    if child.process.wait():
        sys.exit(f"the run failed with status {child.process.returncode}:\n{child.log.read_text('utf-8', errors='replace')}")


def count_kills(
    room: Path, undisturbed: Path, kills: int, steps: int, chance: random.Random, device: str
) -> tuple[list[Kill], dict[str, tuple[int, int]]]:
    """Kill a run `kills` times from its beginning to its last step, let it end, and compare it with the undisturbed one."""
    # The first falls into the first step or before it, the last behind the last step, where the results are written.
    due = [0, *sorted(chance.sample(range(1, steps), kills - 2)), steps]
    hit: list[Kill] = []
    for number, step in enumerate(due):
        aimed = number % 2 == 1 and step < steps
        child = start(room, "killed", steps, device)
        if not strike(child, step, aimed=aimed, chance=chance):
            finish(child)
            sys.exit(f"the run ended by itself before the kill that was due after step {step}")
        if hit:
            hit[-1] = went_on(hit[-1], child.log)
        left = newest_step(child.folder) or None
        hit.append(Kill(step=step, aimed=aimed, inside_save=bool(hidden(child.folder)), newest=left, went_on_after=None))
        print(f"kill {number + 1} of {kills} in step {step + 1}{', inside a save' if hit[-1].inside_save else ''}", file=sys.stderr)
    child = start(room, "killed", steps, device)
    finish(child)
    hit[-1] = went_on(hit[-1], child.log)
    return hit, compared(undisturbed, child.folder)


def strike(child: Child, step: int, *, aimed: bool, chance: random.Random) -> bool:
    """Kill the run some time after `step` is saved, if `aimed` as soon as a further save is seen; false if it had ended before."""
    try:
        alive = wait_until(child, lambda: child.folder.exists() and newest_step(child.folder) >= step)
        if aimed:
            alive = alive and wait_until(child, lambda: any(HALF_WRITTEN in place.name for place in hidden(child.folder)))
        time.sleep(chance.uniform(0, MID_SAVE_S if aimed else ANY_MOMENT_S))
    finally:
        child.process.send_signal(signal.SIGKILL)
    return child.process.wait() == -signal.SIGKILL and alive


def went_on(kill: Kill, log: Path) -> Kill:
    """The kill, with where the process after it went on; None if that one began anew."""
    said = re.search(r"Going on after step (\d+) of", log.read_text("utf-8", errors="replace"))
    return Kill(**{**asdict(kill), "went_on_after": int(said[1]) if said else None})


def wait_until(child: Child, seen: Callable[[], bool]) -> bool:
    """Look until it is so; false if the process ended before. Raises: SystemExit if it takes too long."""
    end = time.monotonic() + LONGEST_WAIT_S
    while not seen():
        if child.process.poll() is not None:
            return False
        if time.monotonic() > end:
            child.process.kill()
            sys.exit(f"nothing happened for {LONGEST_WAIT_S:.0f} s; the run said:\n{child.log.read_text('utf-8', errors='replace')}")
        time.sleep(LOOK_EVERY_S)
    return True


def newest_step(folder: Path) -> int:
    """Of the newest checkpoint; 0 if there is none."""
    return max((int(place.name.removeprefix("step-")) for place in (folder / "checkpoints").glob("step-*")), default=0)


def hidden(folder: Path) -> list[Path]:
    """What is there only while a checkpoint is written, or an old one is let go."""
    return list((folder / "checkpoints").glob(HIDDEN))


def compared(one: Path, other: Path) -> dict[str, tuple[int, int]]:
    """For each kind of result: how many are equal bit by bit, of how many."""
    adapters = [tensors_of(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other)]
    states = [tensors_of(folder / "checkpoints" / f"step-{newest_step(folder):08d}" / "tensors.safetensors") for folder in (one, other)]
    curves = [curve(folder / "metrics.jsonl") for folder in (one, other)]
    return {
        "tensors of the adapter": equal(*adapters),
        "tensors of the last checkpoint": equal(*states),
        "lines of the curves": equal(*curves),
    }


def tensors_of(file: Path) -> dict[str, Any]:
    """Name -> (dtype, shape, bytes) of a safetensors file, read without any library."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = {name: entry for name, entry in json.loads(raw[8:start]).items() if name != "__metadata__"}
    return {
        name: (entry["dtype"], entry["shape"], raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]])
        for name, entry in header.items()
    }


def curve(file: Path) -> dict[str, Any]:
    """Line number -> what was measured of the model, without the speed. JSON keeps every bit of a number."""
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    lines = [line for line in lines if not line.keys() & {"device", "team"}]  # what machines did is never the same twice
    return {str(number): {key: value for key, value in line.items() if key != "tokens_per_s"} for number, line in enumerate(lines)}


def equal(one: dict[str, Any], other: dict[str, Any]) -> tuple[int, int]:
    """How many entries are in both and equal, of all that are in either."""
    return sum(name in other and other[name] == value for name, value in one.items()), len({*one, *other})


# 2. and 3. Damage. Each on a fresh copy of the last two checkpoints of the undisturbed run.


def count_flips(checkpoints: Path, room: Path, flips: int, chance: random.Random) -> dict[str, bool]:
    """Flip one bit each time; what was done -> whether it was found out."""
    results: dict[str, bool] = {}
    for number in range(flips):
        file = chance.choice(sorted(file.name for file in newest(checkpoints).iterdir()))
        bit = chance.randrange(8 * (newest(checkpoints) / file).stat().st_size)

        def flip(place: Path, file: str = file, bit: int = bit) -> None:
            raw = bytearray((place / file).read_bytes())
            raw[bit // 8] ^= 1 << bit % 8
            (place / file).write_bytes(raw)

        results[f"flip {number + 1}: bit {bit} of {file}"] = found_out(checkpoints, room, flip, file)
    return results


def count_tampered(checkpoints: Path, room: Path) -> dict[str, bool]:
    """Remove each file, and put its namesake from the checkpoint before in its place; what was done -> whether it was found out."""
    results: dict[str, bool] = {}
    for file in sorted(file.name for file in newest(checkpoints).iterdir()):

        def remove(place: Path, file: str = file) -> None:
            (place / file).unlink()

        def exchange(place: Path, file: str = file) -> None:
            other = sorted(place.parent.glob("step-*"))[-2]
            for_here, for_there = (other / file).read_bytes(), (place / file).read_bytes()
            (place / file).write_bytes(for_here)
            assert for_here != for_there, "two checkpoints that are equal prove nothing"

        results[f"{file} removed"] = found_out(checkpoints, room, remove, file)
        results[f"{file} from another checkpoint"] = found_out(checkpoints, room, exchange, file)
    return results


def newest(checkpoints: Path) -> Path:
    """Folder of the last checkpoint."""
    return max(checkpoints.glob("step-*"))


def found_out(checkpoints: Path, room: Path, damage: Callable[[Path], None], file: str) -> bool:
    """Damage a copy; true if loading it names the file, and the checkpoint before it is taken instead, announced."""
    from pantheraml.trainer.checkpoint import Checkpoints, Damaged

    copy = room / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoints, copy)
    before, last = sorted(copy.glob("step-*"))[-2:]
    fingerprint = json.loads((last / "state.json").read_bytes())["fingerprint"]
    store = Checkpoints(copy, fingerprint=fingerprint, keep=2)
    good = store.newest(print)
    assert good and good.step == store.steps()[-1], "the copy must be sound before it is damaged"
    damage(last)
    try:
        store.load(good.step)
    except Damaged as error:
        named = file in str(error)
    else:
        return False
    announced: list[str] = []
    taken = store.newest(announced.append)
    return named and taken is not None and taken.step == int(before.name.removeprefix("step-")) and file in announced[0]


def yes(so: bool) -> str:
    """A cell."""
    return "yes" if so else "-"


def shown(step: int | None) -> str:
    """A cell."""
    return "none" if step is None else str(step)


if __name__ == "__main__":
    sys.exit(main())
