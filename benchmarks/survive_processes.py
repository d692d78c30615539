"""What a run of several processes survives: one of them is killed at any moment, and all start again from the last checkpoint.

    python benchmarks/survive_processes.py [--quick] [--seed N] [--processes N]

A full fine-tune of tiny:llama, divided by FSDP2 over processes of this CPU (gloo), with a checkpoint after every step, each
process writing its own pieces. A random process is ended with SIGKILL at a random moment, again and again; our launcher ends
the others and starts all again (hardware.restarts). At the end the exported weights, every piece of the last checkpoint
(weights and both moments) and the curves must equal, bit by bit, those of a run that nobody disturbed.

Times and processes are drawn from the seed. The last line is JSON; the exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from survive import ANY_MOMENT_S, LONGEST_WAIT_S, curve, equal, make_rows, newest_step, tensors_of

RECIPE = """\
model: {{name: tiny:llama, dtype: float32}}
data: {{train: {rows}, eval_fraction: 0.05}}
adapter: full
batch: {{size: 4, micro_tokens: 512}}
optim: {{steps: {steps}, lr: 1.0e-4}}
eval: {{every: 20, generate_rows: 0}}
hardware: {{kind: cpu, threads: 1, devices: {processes}, parallel: fsdp, restarts: {restarts}}}
run: {{folder: {folder}, name: run, save_every: 1, log_every: 1}}
"""


def main() -> int:
    """Kill, compare, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 kills instead of 20")
    parser.add_argument("--seed", type=int, default=3407, help="of the times and processes (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    asked = parser.parse_args()
    kills, steps = (2, 12) if asked.quick else (20, 120)
    chance = random.Random(asked.seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pantheraml-survive-") as name:
        room = Path(name)
        undisturbed, killed = (start(room, each, steps, asked.processes, kills) for each in ("undisturbed", "killed"))
        finish(undisturbed)
        hit: list[tuple[int, int]] = []
        for step in sorted(chance.sample(range(steps - 1), kills)):
            rank = chance.randrange(asked.processes)
            if strike(killed, step, rank, chance):
                hit.append((step, rank))
                print(f"kill {len(hit)} of {kills}: process {rank}, after step {step}", file=sys.stderr)
        finish(killed)
        again = killed[1].with_name("log.txt").read_text("utf-8", errors="replace").count("Going on after step")
        same = compared(undisturbed[1], killed[1])

    rows = [("processes killed with SIGKILL", len(hit), kills), *((f"{what}, equal bit by bit", *pair) for what, pair in same.items())]
    for what, count, of in rows:
        print(f"{what:48}  {count:>4} of {of:<4} {'' if count == of > 0 else 'FALLS SHORT'}".rstrip())
    print(f"the run went on from a checkpoint {again} times; {time.perf_counter() - began:.0f} s in all")
    ok = all(count == of > 0 for _, count, of in rows)
    result = {
        "benchmark": "survive_processes",
        "ok": ok,
        "seed": asked.seed,
        "processes": asked.processes,
        "steps": steps,
        "kills": len(hit),
    }
    print(json.dumps(result | {"went_on": again, "equal": {what: list(pair) for what, pair in same.items()}, "kill_list": hit}))
    return 0 if ok else 1


Child = tuple[subprocess.Popen[bytes], Path]
"""The launcher of a run, and the run's folder."""


def start(room: Path, name: str, steps: int, processes: int, kills: int) -> Child:
    """Begin a run; the second one waits, so that they do not share the processor."""
    home, rows = room / name, room / "rows.jsonl"
    home.mkdir()
    if not rows.exists():
        rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(random.Random(0))), "utf-8")
    recipe = home / "recipe.yaml"
    recipe.write_text(RECIPE.format(rows=rows, steps=steps, folder=home, processes=processes, restarts=2 * kills), "utf-8")
    with (home / "log.txt").open("wb") as out:
        command = [sys.executable, "-m", "pantheraml", "train", str(recipe)]
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=room)
    if name == "undisturbed":
        child.wait()
    return child, home / "run"


def finish(child: Child) -> None:
    """Wait for the end of a run. Raises: SystemExit with what it said, if it failed."""
    if child[0].wait():
        said = child[1].with_name("log.txt").read_text("utf-8", errors="replace")
        sys.exit(f"the run failed with status {child[0].returncode}:\n{said[-6000:]}")


def strike(child: Child, step: int, rank: int, chance: random.Random) -> bool:
    """Kill a process of the run some time after `step` is saved; false if the run had ended before."""
    import psutil

    end = time.monotonic() + LONGEST_WAIT_S
    while newest_step(child[1]) < step or rank not in (found := ranks(child[0].pid)):
        if child[0].poll() is not None:
            return False
        if time.monotonic() > end:
            child[0].kill()
            finish(child)
        time.sleep(0.01)
    time.sleep(chance.uniform(0, ANY_MOMENT_S))
    try:
        os.kill(found[rank], signal.SIGKILL)
    except (ProcessLookupError, psutil.NoSuchProcess):  # it had just ended
        return False
    return True


def ranks(launcher: int) -> dict[int, int]:
    """Rank -> process, of those that the launcher has started."""
    import psutil

    found: dict[int, int] = {}
    try:
        for process in psutil.Process(launcher).children():
            found[int(process.environ()["RANK"])] = process.pid
    except (psutil.Error, KeyError):  # one that is just beginning or ending
        pass
    return found


def compared(one: Path, other: Path) -> dict[str, tuple[int, int]]:
    """For each kind of result: how many are equal bit by bit, of how many."""

    def last(folder: Path) -> dict[str, Any]:
        place = folder / "checkpoints" / f"step-{newest_step(folder):08d}"
        return {f"{file.name}/{name}": value for file in place.glob("*.safetensors") for name, value in tensors_of(file).items()}

    return {
        "tensors of the model": equal(*(tensors_of(folder / "model" / "model.safetensors") for folder in (one, other))),
        "pieces of the last checkpoint": equal(last(one), last(other)),
        "lines of the curves": equal(*(curve(folder / "metrics.jsonl") for folder in (one, other))),
    }


if __name__ == "__main__":
    sys.exit(main())
