"""The longest sequence that trains in a given memory: ours at each level of checkpointing, against transformers + PEFT.

    python benchmarks/longest.py [--quick] [--shape NAME] [--budget MIB] [--contestants NAME ...] [--most TOKENS] [--time S] [--threads N]

One row, loss on all of it, LoRA (rank 16 on all linear layers) and AdamW, one step. The budget is what a process may have
beyond what it held with its libraries loaded and no model: weights, adapter, optimizer, activations and all that comes with
the first step. Lengths are multiples of 256 tokens, and each try is a process of its own that really takes the step. A thread
in it watches the resident memory and ends it as soon as the budget is exceeded; what counts is the most that was resident
from the first step on (VmHWM, reset after loading, because loading reads weights twice). Limits of the system are not used:
they count addresses, of which torch takes far more than memory.

The search doubles until a length fails. Then it asks the line through the two longest that fitted, and halves the gap after
each length that did not. A try may take so many seconds, its model's loading included. Where time was the limit, the table
says so, and what stands after ~ is not measured: it is that line followed to the budget.

Contestants: ours at hardware.checkpointing = off, cheap, on, tiled and auto, and peft, without and with checkpointing, all in
bfloat16. `off` to `tiled` are planned as if all memory of the machine were free, so that nothing but memory stops them. For
`auto` the budget is the free memory that the plan sees: it chooses what each layer keeps, and refuses what it thinks too long.
Beside what was measured stands what the plan said (plan.memory of the run, from its report), and how far it was off; the
plan counts half a GiB for libraries, most of which a process of this size does not take. The error of the bytes a token, from
two lengths, is free of it.

The last line is JSON. The exit status is 1 if one of ours fails other than for want of memory or time, or losses differ.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import contestants
from contestants import ALPHA, RANK, SHAPES, TRAINERS, Absent, Data, Task
from train_cpu import import_libraries, memory_bytes, processor

LEVELS = {"ours-off": "off", "ours-cheap": "cheap", "ours-on": "on", "ours-tiled": "tiled", "ours-auto": "auto"}
CONTESTANTS = (*LEVELS, "peft", "peft-checkpointing")
GRAIN = 256
"""Tokens; lengths are multiples of it."""
START = 1024
LONGEST = 1 << 20
"""Positions that the model's configuration allows here."""
QUICK_MOST = 2048
BUDGET_MIB = 1024
TIME_S = 150
IMPORT_S = 120
"""Seconds that a process may take before its time begins."""
WATCH_S = 0.01
LOSS_TOLERANCE = 5e-3  # relative: bfloat16 has 8 bits, and a mean of hundreds of tokens loses less
PACKAGES = ("torch", "transformers", "peft", "pantheraml")

Outcome = Literal["fits", "memory", "time", "refused", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """What came of one length.

    Attributes:
        peak_bytes: above what the process held before the model; None if it did not get so far.
        planned_bytes, measured_bytes: as the report of the run has them; ours only.
        seconds: of the step. said: the settings, or why it does not fit.
    """

    tokens: int
    outcome: Outcome
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    measured_bytes: int | None = None
    seconds: float | None = None
    loss: float | None = None
    said: str = ""


def main() -> int:
    """Search for each contestant, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"no length over {QUICK_MOST} tokens")
    parser.add_argument("--shape", choices=[*SHAPES], default="smollm2-135m")
    parser.add_argument("--budget", type=int, default=BUDGET_MIB, metavar="MIB", help=f"default: {BUDGET_MIB}")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--most", type=int, metavar="TOKENS", help="no longer length is tried (default: none is too long)")
    parser.add_argument("--time", type=int, default=TIME_S, metavar="S", help=f"seconds a try may take (default: {TIME_S})")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    most = asked.most or (QUICK_MOST if asked.quick else LONGEST)
    if not GRAIN <= most <= LONGEST:
        parser.error(f"--most is from {GRAIN} to {LONGEST} tokens")
    budget = asked.budget << 20

    with tempfile.TemporaryDirectory(prefix="pantheraml-longest-") as name:
        room = Path(name)
        what: dict[str, Any] = {"weights": asked.shape, "model": str(room / "model"), "budget": budget, "threads": asked.threads}
        done, said = in_child(what, room, IMPORT_S + asked.time)
        if done is None:
            print(said, file=sys.stderr)
            return 1
        planned: dict[str, int] = done["planned_longest"]
        results: dict[str, dict[str, Any]] = {}
        print_header(asked.shape, asked.budget, asked.threads)
        for contestant in asked.contestants:

            def attempt(tokens: int, contestant: str = contestant) -> Try:
                tried = try_length(contestant, tokens, room, asked, budget)
                print(f"{contestant}, {tokens} tokens: {tried.outcome} ({tried.said})", file=sys.stderr)
                return tried

            found = summary(search(attempt, budget, most // GRAIN * GRAIN), budget)
            results[contestant] = {**found, "planned_longest": planned.get(contestant)}
            print_row(contestant, results[contestant])
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    print(f"{processor()}, {asked.threads} threads; " + ", ".join(f"{package} {version}" for package, version in versions.items()))
    problems = wrong(results)
    for problem in problems:
        print(f"WRONG: {problem}")
    result = {
        "benchmark": "longest",
        "ok": not problems,
        "quick": asked.quick,
        "shape": asked.shape,
        "budget_bytes": budget,
        "time_s": asked.time,
        "most_tokens": most // GRAIN * GRAIN,
        "threads": asked.threads,
        "processor": processor(),
        "versions": versions,
        "planned_longest": planned,
        "results": results,
        "wrong": problems,
    }
    print(json.dumps(result))
    return 1 if problems else 0


# The search.


def search(attempt: Callable[[int], Try], budget_bytes: int, most: int) -> list[Try]:
    """All lengths that were tried, until the longest that fits is known to a grain, or is `most`."""
    tries: list[Try] = []
    fits, fails = 0, most + GRAIN
    tokens = min(START, most)
    while True:
        tries.append(attempt(tokens))
        if tries[-1].outcome == "fits":
            fits = tokens
        else:
            fails = tokens
        if fails - fits <= GRAIN:
            break
        if fails > most:  # nothing has failed yet
            tokens = min(2 * fits, most)
            continue
        known = line(tries) if fits == tokens else None
        guess = (fits + fails) // 2 if known is None else length_within(known, budget_bytes)
        tokens = min(max(guess // GRAIN * GRAIN, fits + GRAIN), fails - GRAIN)
    # One length more tells how much a token takes.
    if line(tries) is None and fits > GRAIN:
        tries.append(attempt(fits // 2 // GRAIN * GRAIN))
    return tries


def line(tries: Sequence[Try], figure: str = "peak_bytes") -> tuple[float, float] | None:
    """(bytes, bytes a token) of a figure, through the two longest lengths that fitted; None: there are not two."""
    known = [(each.tokens, getattr(each, figure)) for each in tries if each.outcome == "fits" and getattr(each, figure) is not None]
    if len(known) < 2:
        return None
    (few, less), (many, more) = sorted(known)[-2:]
    slope = (more - less) / (many - few)
    return more - slope * many, slope


def length_within(known: tuple[float, float], budget_bytes: int) -> int:
    """Tokens at which the line reaches the budget; LONGEST, if it does not rise."""
    begin, slope = known
    return min(LONGEST, int((budget_bytes - begin) / slope)) if slope > 0 else LONGEST


def limit_of(tries: Sequence[Try]) -> str:
    """What the next longer length failed of; `most`: it was not tried."""
    longest = max((each.tokens for each in tries if each.outcome == "fits"), default=0)
    longer = [each for each in tries if each.tokens > longest]
    return min(longer, key=lambda each: each.tokens).outcome if longer else "most"


def summary(tries: Sequence[Try], budget_bytes: int) -> dict[str, Any]:
    """The figures of a contestant; those of a run are those of its longest."""
    best = max((each for each in tries if each.outcome == "fits"), key=lambda each: each.tokens, default=None)
    limit, known, planned = limit_of(tries), line(tries), line(tries, "planned_bytes")
    estimated = length_within(known, budget_bytes) // GRAIN * GRAIN if limit == "time" and known else None
    return {
        "longest": best.tokens if best else 0,
        "limit": limit,
        "estimated_longest": estimated,
        "peak_bytes": best and best.peak_bytes,
        "planned_bytes": best and best.planned_bytes,
        "measured_bytes": best and best.measured_bytes,
        "plan_error": _error(best.planned_bytes, best.measured_bytes) if best else None,
        "bytes_per_token": known and round(known[1], 1),
        "planned_bytes_per_token": planned and round(planned[1], 1),
        "plan_error_per_token": _error(planned[1], known[1]) if planned and known else None,
        "seconds": best and best.seconds,
        "settings": best.said if best else "",
        "tries": [asdict(each) for each in tries],
    }


def _error(planned: float | None, measured: float | None) -> float | None:
    """How much more was planned than measured, as a share."""
    return round(planned / measured - 1, 4) if planned is not None and measured else None


def wrong(results: dict[str, dict[str, Any]]) -> list[str]:
    """Which of ours failed for another reason than memory or time, and who came to another loss on the same row."""
    found: list[str] = []
    first: dict[int, tuple[str, float]] = {}
    for name, result in results.items():
        for each in result["tries"]:
            if each["outcome"] == "failed" and name in LEVELS:
                found.append(f"{name}, {each['tokens']} tokens: {each['said']}")
            if (loss := each["loss"]) is None:
                continue
            other, of_other = first.setdefault(each["tokens"], (name, loss))
            if not math.isfinite(loss) or abs(loss / of_other - 1) > LOSS_TOLERANCE:
                found.append(f"{name}, {each['tokens']} tokens: a loss of {loss:.5f}, and {of_other:.5f} of {other}")
    return found


def print_header(shape: str, budget_mib: int, threads: int) -> None:
    """The lines above the rows."""
    print(f"{shape}, bfloat16, LoRA, one row; {budget_mib} MiB beyond the process before the model; {threads} threads")
    print(
        f"{'':19} {'longest':>9} {'limit':>8} {'estimated':>10} {'planned':>9} {'peak MiB':>9} {'plan MiB':>9} {'error':>7} "
        f"{'KiB/token':>10} {'of plan':>8} {'error':>7} {'step s':>7}"
    )


def print_row(name: str, found: dict[str, Any]) -> None:
    """One contestant. `planned`: the longest that the plan's arithmetic gives for the budget."""

    def mib(size: int | None) -> str:
        return "-" if size is None else f"{size / 2**20:,.0f}"

    def kib(size: float | None) -> str:
        return "-" if size is None else f"{size / 2**10:,.1f}"

    def share(error: float | None) -> str:
        return "-" if error is None else f"{error:+.1%}"

    estimated = "-" if found["estimated_longest"] is None else f"~{found['estimated_longest']:,}"
    planned = "-" if found["planned_longest"] is None else f"{found['planned_longest']:,}"
    seconds = "-" if found["seconds"] is None else f"{found['seconds']:.1f}"
    print(
        f"{name:19} {found['longest']:>9,} {found['limit']:>8} {estimated:>10} {planned:>9} {mib(found['peak_bytes']):>9} "
        f"{mib(found['planned_bytes']):>9} {share(found['plan_error']):>7} {kib(found['bytes_per_token']):>10} "
        f"{kib(found['planned_bytes_per_token']):>8} {share(found['plan_error_per_token']):>7} {seconds:>7}",
        flush=True,
    )
    if not found["longest"] or found["limit"] in ("refused", "failed"):
        last = min((each for each in found["tries"] if each["outcome"] != "fits"), key=lambda each: each["tokens"])
        print(f"{'':19} {last['tokens']} tokens: {last['said']}")


# One try: the parent's end.


def try_length(contestant: str, tokens: int, room: Path, asked: argparse.Namespace, budget: int) -> Try:
    """Let a process of its own train one row of so many tokens."""
    with tempfile.TemporaryDirectory(dir=room) as name:
        rows = Path(name) / "rows.jsonl"
        data = Data(longest=tokens, step_rows=1, micro_rows=1, mixed=False)
        contestants.write_rows(rows, data, 1, SHAPES[asked.shape]["vocab_size"])
        level = LEVELS.get(contestant)
        settings: dict[str, Any] = (
            {"hardware": {"checkpointing": level}, "micro_tokens": tokens}
            if level
            else {"checkpointing": contestant == "peft-checkpointing"}
        )
        task = Task(
            model=str(room / "model"),
            rows=str(rows),
            room=name,
            steps=1,
            step_rows=1,
            micro_rows=1,
            longest=tokens,
            threads=asked.threads,
            settings=settings,
        )
        what: dict[str, Any] = {
            "trainer": "ours" if level else "peft",
            "task": asdict(task),
            "budget": budget,
            "time": asked.time,
            "planned_for": budget if level == "auto" else None,
            "threads": asked.threads,
        }
        done, said = in_child(what, Path(name), IMPORT_S + asked.time)
    return Try(tokens=tokens, outcome="failed", said=said) if done is None else Try(tokens=tokens, **done)


def in_child(what: dict[str, Any], room: Path, limit_s: float) -> tuple[dict[str, Any] | None, str]:
    """What a process says last, or None and why there is nothing."""
    quiet = dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
    threads = {"OMP_NUM_THREADS": str(what["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, CHILD, json.dumps(what)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            cwd=room,
            env=os.environ | quiet | threads,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "time", "said": f"nothing came in {limit_s:.0f} s"}, ""
    if done.returncode == 0 and done.stdout.strip():
        return json.loads(done.stdout.splitlines()[-1]), ""
    if done.returncode == -9:
        return {"outcome": "memory", "said": "killed by the system, probably for want of memory"}, ""
    lines = [each.strip() for each in done.stderr.splitlines() if each.strip()]
    return None, f"exit status {done.returncode}: " + " | ".join(lines[-3:])


# One try: the child's end.

CHILD = "--as-child"


class Scales:
    """A lane with one runner for one step, which weighs its process all the while and ends it when the budget or the time is used up."""

    def __init__(self, budget_bytes: int, time_s: float, reports: Any) -> None:
        self._budget, self._time_s, self._reports = budget_bytes, time_s, reports
        self._lock = threading.Lock()
        self._before = memory_bytes("VmRSS")
        self._until = time.monotonic() + time_s
        self._entry, self._armed = "VmRSS", False
        self._most = 0
        self._began = 0.0
        self._over = threading.Event()
        self.settings = ""
        self.figures: dict[str, Any] = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def ready(self, settings: str) -> None:
        """See `contestants.Lane`. What is counted as memory begins here."""
        self.settings = settings
        try:
            Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM
            self._entry = "VmHWM"
        except OSError:
            pass  # then the most is what the watching thread saw
        self._armed = True

    def begin(self) -> None:
        """See `contestants.Lane`."""
        self._began = time.perf_counter()

    def end(self, loss: Callable[[], float], tokens: int, labels: int) -> None:
        """See `contestants.Lane`. The one step is done; what the trainer writes afterwards is not watched."""
        seconds = time.perf_counter() - self._began
        self._look()
        self._over.set()
        self.figures = {"peak_bytes": self._most, "seconds": round(seconds, 2), "loss": round(loss(), 6)}

    def say(self, **figures: Any) -> None:
        """The one line to the parent."""
        self._reports.write(json.dumps(figures) + "\n")
        self._reports.flush()

    def _watch(self) -> None:
        while not self._over.wait(WATCH_S):
            if time.monotonic() > self._until:
                self._stop("time", f"not done in {self._time_s:.0f} s")
            if self._armed:
                self._look()

    def _look(self) -> None:
        with self._lock:
            self._most = max(self._most, memory_bytes(self._entry) - self._before)
            if self._most > self._budget:
                self._stop("memory", f"{self._most / 2**20:,.0f} MiB")

    def _stop(self, outcome: Outcome, said: str) -> None:
        self.say(outcome=outcome, said=said)
        os._exit(0)  # from any thread, in the middle of whatever the others do


def be_child(what: dict[str, Any]) -> None:
    """Do the job that the parent wrote on the command line."""
    # Where memory runs out, this process goes, and not somebody else's.
    Path("/proc/self/oom_score_adj").write_text("1000")
    # Libraries print as they like; the parent hears the report only.
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(what["threads"])
    if "weights" in what:
        json.dump({"planned_longest": write_model(what["weights"], Path(what["model"]), what["budget"])}, reports)
        reports.flush()
        return
    import_libraries(what["trainer"])
    if what["planned_for"] is not None:
        let_the_plan_see(what["planned_for"])
    task = Task(**what["task"])
    scales = Scales(what["budget"], what["time"], reports)
    try:
        TRAINERS[what["trainer"]](task, scales)
    except Absent as absent:
        scales.say(outcome="refused", said=str(absent))
        return
    beside = reported(Path(task.room)) if what["trainer"] == "ours" else {}
    scales.say(outcome="fits", said=scales.settings, **scales.figures, **beside)


def write_model(shape: str, folder: Path, budget: int) -> dict[str, int]:
    """Write the weights, for positions as far as we may come; the longest row that the plan's arithmetic gives for the budget."""
    from pantheraml.hardware.device import Device, Inventory
    from pantheraml.models.load import read_shape
    from pantheraml.planning.batch import rows_that_fit
    from pantheraml.planning.plan import make_plan
    from pantheraml.recipe.load import recipe_from
    from pantheraml.recipe.types import ModelSpec

    contestants.write_weights(shape, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": LONGEST}), "utf-8")
    size = read_shape(ModelSpec(name=str(folder)))
    roomy = Device(kind="cpu", index=0, name="of any size", memory_bytes=None, free_bytes=1 << 60, dtypes=("bfloat16", "float32"))
    here = Inventory(devices=(roomy,), absent=())

    def longest(level: str) -> int:
        def need(grains: int) -> int:
            tokens = grains * GRAIN
            asked = {
                "model": {"name": str(folder), "dtype": "bfloat16", "max_tokens": tokens},
                "data": "rows.jsonl",
                "adapter": {"kind": "lora", "rank": RANK, "alpha": ALPHA},
                "batch": {"size": 1, "micro_tokens": tokens},
                "hardware": {"kind": "cpu", "checkpointing": level},
            }
            return make_plan(recipe_from(asked), here, size, longest_example=tokens).memory.total_bytes

        return rows_that_fit(need, budget, most=LONGEST // GRAIN) * GRAIN

    found = {name: longest(level) for name, level in LEVELS.items() if level != "auto"}
    return {**found, "ours-auto": max(found.values())}  # it may take any of them


def let_the_plan_see(free_bytes: int) -> None:
    """From here on, so much memory is free on this machine. This process does nothing else."""
    from pantheraml.hardware import cpu

    total = cpu.usable_memory()[0]
    cpu.usable_memory = lambda *_: (total, free_bytes)


def reported(room: Path) -> dict[str, int | None]:
    """What the report of the run says of its memory."""
    report = json.loads((room / "runs" / "ours" / "report.json").read_text("utf-8"))
    memory = report["plan"]["memory_bytes"]
    return {"planned_bytes": memory["planned"], "measured_bytes": memory["measured"]}


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        be_child(json.loads(sys.argv[2]))
        sys.exit(0)
    sys.exit(main())
