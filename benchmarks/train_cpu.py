"""A LoRA training step on the CPU, against transformers + PEFT and TRL: tokens a second, memory, share of the peak.

    python benchmarks/train_cpu.py [--quick] [--shape NAME ...] [--data WORD ...] [--contestants NAME ...] [--rounds N] [--threads N] [--trl-best JSON]

Contestants: peft (transformers + PEFT in a plain loop, bfloat16 weights), trl (SFTTrainer at its defaults), trl-best (at the
best settings of a small grid, searched once for each shape and kind of data), ours and ours-int8 (`pantheraml.train`).
All train the same LoRA (rank 16 on all linear layers) from the same weights on the same tokens with the same AdamW.

Each lives in a process of its own, so that its memory is its own, and takes a step when it is told to. The steps go
round: one of each, the other way about in every second round; in between, a product of matrices (bfloat16, 2048^3) in
yet another process measures what the processor can do at all. Whoever is not at work is blocked; its threads wait as they do
by default, which with GNU's OpenMP is to spin for some milliseconds and then sleep. A ratio is the median of the ratios of the
rounds, with the smallest and the largest.

Tokens are real ones, without padding. Data: a number means full rows of so many tokens, two a step, loss on all; `mix`
means lognormal lengths (mean 200, at most 1024), 16 examples a step, prompts masked; `mix:N` the same for at most N.
Memory is the most that was resident during the steps (VmHWM, reset after loading); beside it stands what that is
above the process with its libraries imported. Contestants are alive together: together they must fit into memory.

The last line is JSON. The exit status is 1 if anybody counts other labels or comes to another loss, or if one of ours fails.
Whether we are as much faster as we want to be is printed, and not judged.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import contestants
from contestants import SHAPES, TRAINERS, TRL_DEFAULTS, Absent, Data, Task

CONTESTANTS = ("peft", "trl", "trl-best", "ours", "ours-int8")
SHAPES_HERE = ("smollm2-135m", "qwen2.5-0.5b")
DATA = ("512", "1024", "mix")
WARM_UP = 2
# Rows that the plain loop takes at once where it is not those of the data: with four of up to 1024 tokens, activations
# and float32 logits of this model would need some 20 GB.
PLAIN_LOOP_ROWS = {"qwen2.5-0.5b": 1}
SEARCH_STEPS = 6  # of which the first is a warm-up
PEAK_SIZE = 2048
PEAK_PRODUCTS = 5
MIX_LONGEST = 1024
LOSS_TOLERANCE = 5e-3  # relative: bfloat16 has 8 bits, and a mean of thousands of tokens loses less
INT8_LOSS_TOLERANCE = 2e-2
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "pantheraml")


@dataclass(frozen=True, slots=True)
class Aim:
    """What we want of one of ours: a median `ratio` of at least `least` against another contestant."""

    who: str
    against: str
    least: float
    mixed: bool


AIMS = (
    Aim("ours", "trl", 3.2, False),
    Aim("ours", "trl-best", 2.5, False),
    Aim("ours", "trl", 6.0, True),
    Aim("ours-int8", "ours", 1.2, False),
)
AIM_MEMORY = 0.7  # of TRL's, at most
AIM_SHARE = {"qwen2.5-0.5b": 0.6}  # of the measured peak of bfloat16 products, at least, on full rows


def main() -> int:
    """Run all cases, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds on smollm2-135m with rows of 512 tokens")
    parser.add_argument("--shape", nargs="+", choices=[*SHAPES], help="default: " + " ".join(SHAPES_HERE))
    parser.add_argument("--data", nargs="+", type=parse_data, help="default: " + " ".join(DATA))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, help="steps of each that are timed (default: 7)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--trl-best", type=json.loads, help="TRL's best settings from an earlier run's JSON (trl_best), instead of a search"
    )
    asked = parser.parse_args()
    shapes = asked.shape or (SHAPES_HERE[:1] if asked.quick else SHAPES_HERE)
    datas = asked.data or [parse_data(word) for word in (DATA[:1] if asked.quick else DATA)]
    rounds = asked.rounds or (3 if asked.quick else 7)

    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="pantheraml-train-cpu-") as name:
        for shape in shapes:
            weights = Path(name) / shape
            with Child({"weights": shape, "model": str(weights)}, Path(name), asked.threads) as writer:
                writer.report()
            for data in datas:
                room = Path(name) / f"{shape}-{words_of(data)}"
                room.mkdir()
                cases.append(run_case(shape, data, asked.contestants, rounds, asked.threads, weights, room, asked.trl_best))
                print_case(cases[-1])
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    print(f"{processor()}, {asked.threads} threads; " + ", ".join(f"{package} {version}" for package, version in versions.items()))
    wrong = [problem for case in cases for problem in case["wrong"]]
    result = {
        "benchmark": "train_cpu",
        "ok": not wrong,
        "quick": asked.quick,
        "rounds": rounds,
        "threads": asked.threads,
        "processor": processor(),
        "versions": versions,
        "cases": cases,
    }
    print(json.dumps(result))
    return 1 if wrong else 0


def parse_data(word: str) -> Data:
    """`512`, `mix` or `mix:256`."""
    kind, _, most = word.partition(":")
    try:
        if kind == "mix":
            return Data(longest=int(most or MIX_LONGEST), step_rows=16, micro_rows=4, mixed=True)
        return Data(longest=int(word), step_rows=2, micro_rows=2, mixed=False)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word} is neither a number of tokens nor mix nor mix:N") from error


def words_of(data: Data) -> str:
    """As on the command line."""
    return f"mix-{data.longest}" if data.mixed else str(data.longest)


# One case: a shape, and a kind of data.


def run_case(
    shape: str,
    data: Data,
    names: Sequence[str],
    rounds: int,
    threads: int,
    weights: Path,
    room: Path,
    known_best: dict[str, Any] | None,
) -> dict[str, Any]:
    """Search, warm up, go round, and what came of it."""
    vocab = SHAPES[shape]["vocab_size"]
    rows = room / "rows.jsonl"
    contestants.write_rows(rows, data, WARM_UP + rounds, vocab)
    task = Task(
        model=str(weights),
        rows=str(rows),
        room=str(room),
        steps=WARM_UP + rounds,
        step_rows=data.step_rows,
        micro_rows=data.micro_rows,
        longest=data.longest,
        threads=threads,
    )
    searched: list[dict[str, Any]] = []
    best = known_best or TRL_DEFAULTS
    if "trl-best" in names and known_best is None:
        contestants.write_rows(room / "search.jsonl", data, SEARCH_STEPS, vocab)
        best, searched = search(replace(task, rows=str(room / "search.jsonl"), steps=SEARCH_STEPS), data, threads)
    jobs = {name: job(name, task, best) for name in names}
    if data.mixed and "peft" in jobs:
        jobs["peft"]["task"]["micro_rows"] = PLAIN_LOOP_ROWS.get(shape, data.micro_rows)
    seen, left_out = race(jobs, rounds, room, threads)

    read = contestants.read_rows(rows)
    flops = contestants.flops_per_token(shape, read)
    peak = statistics.median(each["flops"] / each["seconds"] for each in seen.pop("peak")["steps"])
    result: dict[str, Any] = {
        "shape": shape,
        "data": words_of(data),
        "step_rows": data.step_rows,
        "tokens": sum(len(row["input_ids"]) for row in read),
        "labels": sum(contestants.label_count(row) for row in read),
        "peak_gflops": round(peak / 1e9, 1),
        "searched": searched,
        "trl_best": best if "trl-best" in names else None,
        "left_out": left_out,
        "results": {name: summary(name, seen, flops, peak) for name in seen},
    }
    result["wrong"] = wrong(result, seen, read, data, best) + [f"{name}: {why}" for name, why in left_out.items() if why["failed"]]
    result["aims"] = aims(result, data.mixed, shape)
    return result


def job(name: str, task: Task, best: dict[str, Any]) -> dict[str, Any]:
    """What a child is told: which trainer, and how it is set."""
    settings: dict[str, Any] = {"trl-best": best, "ours-int8": {"model": {"load_in_8bit": True}}}.get(name, {})
    room = Path(task.room) / name
    room.mkdir(exist_ok=True)
    return {"trainer": name.split("-")[0], "task": asdict(replace(task, room=str(room), settings=settings))}


def search(task: Task, data: Data, threads: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """TRL's fastest settings, and all that were tried: one axis after the other, each from the best so far.

    Without checkpointing; then the numbers' types, the attention, and for a mix of lengths the layout.
    """
    best = {**TRL_DEFAULTS, "weights": "bfloat16", "arguments": {"gradient_checkpointing": False}}
    plain = {**best["arguments"], "bf16": False}  # bfloat16 weights and adapters, without autocast
    axes: list[list[dict[str, Any]]] = [
        [{}, {"adapters": "bfloat16"}, {"adapters": "bfloat16", "arguments": plain}],
        [{"attention": "eager"}],
    ]
    if data.mixed:
        axes.append([{"layout": layout} for layout in contestants.trl_layouts(task) if layout != "padded"])
    tried: list[dict[str, Any]] = []
    fastest = 0.0
    for axis in axes:
        start = best
        for change in axis:
            settings = {**start, **change}
            said = contestants.trl_said(settings)
            print(f"TRL: {said} ...", file=sys.stderr)
            try:
                speed = trial(replace(task, settings=settings), threads)
            except Gone as gone:
                tried.append({"settings": said, "left_out": str(gone)})
                continue
            tried.append({"settings": said, "tokens_per_s": round(speed, 1)})
            if speed > fastest:
                best, fastest = settings, speed
    return best, tried


def trial(task: Task, threads: int) -> float:
    """Tokens per second of a few steps alone, the median. Raises: Gone."""
    with Child({"trainer": "trl", "task": asdict(task)}, Path(task.room), threads) as child:
        child.report()
        child.step()
        steps = [child.step() for _ in range(task.steps - 1)]
    return statistics.median(step["tokens"] / step["seconds"] for step in steps)


def race(
    jobs: dict[str, dict[str, Any]], rounds: int, room: Path, threads: int
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """All steps and memory of each contestant and of `peak`, and who is left out and why."""
    children: dict[str, Child] = {}
    seen: dict[str, dict[str, Any]] = {}
    left_out: dict[str, dict[str, Any]] = {}

    def step(name: str) -> None:
        try:
            seen[name]["steps"].append(children[name].step())
        except Gone as gone:
            left_out[name] = {"why": str(gone), "failed": True}
            children.pop(name).stop()
            del seen[name]

    try:
        for name, what in {**jobs, "peak": {"trainer": "peak"}}.items():
            print(f"{room.name}: {name} loads", file=sys.stderr)
            children[name] = Child(what, room, threads)
            try:
                seen[name] = {**children[name].report(), "steps": []}
            except Gone as gone:
                left_out[name] = {"why": str(gone), "failed": not gone.absent}
                children.pop(name).stop()
                continue
            for _ in range(WARM_UP):
                if name in children:
                    step(name)
        for number in range(rounds):
            print(f"{room.name}: round {number + 1} of {rounds}", file=sys.stderr)
            for name in list(children) if number % 2 == 0 else list(children)[::-1]:
                step(name)
    finally:
        for child in children.values():
            child.stop()
    return seen, left_out


# What came of it.


def summary(name: str, seen: dict[str, dict[str, Any]], flops: float, peak: float) -> dict[str, Any]:
    """The figures of one contestant; speeds are medians of the rounds."""
    mine = seen[name]
    speed = statistics.median(speeds(mine))
    last = mine["steps"][-1]
    return {
        "settings": mine["settings"],
        "tokens_per_s": round(speed, 1),
        "seconds": [round(step["seconds"], 4) for step in mine["steps"][WARM_UP:]],
        "ratios": {other: spread(speeds(mine), speeds(seen[other])) for other in ("trl", "trl-best", "ours") if other in seen},
        "useful_gflops": round(speed * flops / 1e9, 1),
        "share_of_peak": round(speed * flops / peak, 4),
        "peak_bytes": last["peak_bytes"],
        "peak_above_start_bytes": last["peak_bytes"] - mine["start_bytes"],
        "loading_peak_bytes": mine["loading_peak_bytes"],
        "peak_was_reset": mine["peak_was_reset"],
        "memory_ratios": {
            other: round(last["peak_bytes"] / seen[other]["steps"][-1]["peak_bytes"], 3) for other in ("trl", "trl-best") if other in seen
        },
        "tokens": [step["tokens"] for step in mine["steps"]],
        "labels": [step["labels"] for step in mine["steps"]],
        "losses": [round(step["loss"], 6) for step in mine["steps"]],
    }


def speeds(seen: dict[str, Any]) -> list[float]:
    """Tokens per second of each round."""
    return [step["tokens"] / step["seconds"] for step in seen["steps"][WARM_UP:]]


def spread(mine: list[float], others: list[float]) -> dict[str, float]:
    """Median, smallest and largest of the ratios of the rounds."""
    each = [a / b for a, b in zip(mine, others, strict=True)]
    return {"median": round(statistics.median(each), 3), "min": round(min(each), 3), "max": round(max(each), 3)}


def wrong(
    result: dict[str, Any], seen: dict[str, dict[str, Any]], read: list[dict[str, list[int]]], data: Data, best: dict[str, Any]
) -> list[str]:
    """Who did not learn the same labels of the same tokens, or came to another loss. Layouts with other steps are not compared."""
    found: list[str] = []
    steps = [read[start : start + data.step_rows] for start in range(0, len(read), data.step_rows)]
    labels = [sum(contestants.label_count(row) for row in step) for step in steps]
    tokens = [sum(len(row["input_ids"]) for row in step) for step in steps]
    comparable = [name for name in seen if not (name == "trl-best" and best["layout"] in contestants.OTHER_STEPS)]
    for name in comparable:
        mine = result["results"][name]
        if mine["labels"] != labels or mine["tokens"] != tokens:
            found.append(f"{name}: labels {mine['labels']} of tokens {mine['tokens']} instead of {labels} of {tokens}")
        tolerance = INT8_LOSS_TOLERANCE if name == "ours-int8" else LOSS_TOLERANCE
        losses = result["results"][comparable[0]]["losses"]
        worst = max(abs(a / b - 1) if math.isfinite(a) else math.inf for a, b in zip(mine["losses"], losses, strict=True))
        if worst > tolerance:
            found.append(f"{name}: a loss differs by {worst:.1e} from that of {comparable[0]}")
    return found


def aims(result: dict[str, Any], mixed: bool, shape: str) -> list[dict[str, Any]]:
    """Which aims of ours are reached in this case."""
    results, found = result["results"], []
    for aim in AIMS:
        if aim.mixed == mixed and {aim.who, aim.against} <= results.keys():
            value = results[aim.who]["ratios"][aim.against]["median"]
            found.append(_aim(f"{aim.who} at least {aim.least} x {aim.against}", value, value >= aim.least))
    for name in ("ours", "ours-int8"):
        if name in results and "trl" in results:
            value = results[name]["memory_ratios"]["trl"]
            found.append(_aim(f"{name} at most {AIM_MEMORY} of the memory of trl", value, value <= AIM_MEMORY))
    if "ours" in results and shape in AIM_SHARE and not mixed:
        value = results["ours"]["share_of_peak"]
        found.append(_aim(f"ours at least {AIM_SHARE[shape]} of the peak", value, value >= AIM_SHARE[shape]))
    return found


def _aim(text: str, value: float, reached: bool) -> dict[str, Any]:
    return {"aim": text, "value": value, "reached": reached}


def print_case(case: dict[str, Any]) -> None:
    """The table of one case."""
    print(
        f"\n{case['shape']}, data {case['data']}, {case['step_rows']} rows a step; matrix peak {case['peak_gflops']:,.0f} GFLOP/s (bfloat16)"
    )
    print(
        f"{'':10} {'tokens/s':>9} {'x TRL defaults':>19} {'x TRL best':>19} {'GFLOP/s':>8} {'of peak':>7} "
        f"{'peak MiB':>9} {'above start':>11} {'of TRL':>6} {'loss':>9}"
    )
    for name, mine in case["results"].items():
        against = " ".join(f"{_ratio(mine['ratios'].get(other)):>19}" for other in ("trl", "trl-best"))
        memory = mine["memory_ratios"].get("trl")
        print(
            f"{name:10} {mine['tokens_per_s']:>9,.1f} {against} {mine['useful_gflops']:>8,.1f} {mine['share_of_peak']:>7.1%} "
            f"{mine['peak_bytes'] / 2**20:>9,.0f} {mine['peak_above_start_bytes'] / 2**20:>11,.0f} "
            f"{'-' if memory is None else format(memory, '.2f'):>6} {mine['losses'][-1]:>9.4f}"
        )
    for name, why in case["left_out"].items():
        print(f"{name:10} {'failed' if why['failed'] else 'not here'}: {why['why']}")
    for name, mine in case["results"].items():
        print(f"  {name}: {mine['settings']}")
    for each in case["searched"]:
        print(f"  tried for TRL: {each['settings']}: {each.get('tokens_per_s', each.get('left_out'))}")
    for problem in case["wrong"]:
        print(f"  WRONG: {problem}")
    for aim in case["aims"]:
        print(f"  {'reached' if aim['reached'] else 'FALLS SHORT'}: {aim['aim']} ({aim['value']:.3g})")


def _ratio(spread: dict[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['median']:.2f} ({spread['min']:.2f}-{spread['max']:.2f})"


def processor() -> str:
    """As Linux names it."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor")


# The parent's end of a child.


class Gone(Exception):
    """A child that ended before its time; `absent` if it cannot take part here at all."""

    def __init__(self, why: str, *, absent: bool = False) -> None:
        super().__init__(why)
        self.absent = absent


class Child:
    """A process that does one job, blocked until it is told to take a step. `with` ends it."""

    def __init__(self, what: dict[str, Any], room: Path, threads: int) -> None:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", dir=room)  # noqa: SIM115 - closed by stop()
        quiet = dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
        environment = {**os.environ, **quiet, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, CHILD, json.dumps({**what, "threads": threads})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=room,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def report(self) -> dict[str, Any]:
        """What it says next. Raises: Gone."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Gone(self._last_words())
        said = json.loads(line)
        if "absent" in said:
            raise Gone(said["absent"], absent=True)
        return said

    def step(self) -> dict[str, Any]:
        """Let it take one step. Raises: Gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise Gone(self._last_words()) from error
        return self.report()

    def stop(self) -> None:
        """End it, wherever it is."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        killed = "killed, probably for want of memory" if status == -9 else f"exit status {status}"
        return f"{killed}: " + " | ".join(lines[-3:])


# The child's end.

CHILD = "--as-child"
LIBRARIES = {"ours": ("pantheraml.trainer.run",), "peft": (), "trl": ("trl.trainer.sft_trainer",)}


class PipeLane:
    """A lane in which a step begins when a line comes in, and a line goes out when it is done."""

    def __init__(self, reports: Any) -> None:
        self._reports = reports
        self._start_bytes = self._began = 0

    def imported(self) -> None:
        """The libraries are here, the model is not."""
        self._start_bytes = memory_bytes("VmRSS")

    def ready(self, settings: str) -> None:
        """See `contestants.Lane`. What is counted as memory begins here."""
        loading = memory_bytes("VmHWM")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM
            reset = True
        except OSError:
            reset = False
        self.say(settings=settings, start_bytes=self._start_bytes, loading_peak_bytes=loading, peak_was_reset=reset)

    def begin(self) -> None:
        """See `contestants.Lane`."""
        if not sys.stdin.readline():
            sys.exit("the benchmark has ended")
        self._began = time.perf_counter()

    def end(self, loss: Any, tokens: int, labels: int) -> None:
        """See `contestants.Lane`."""
        seconds = time.perf_counter() - self._began
        self.say(seconds=seconds, loss=loss(), tokens=tokens, labels=labels, peak_bytes=memory_bytes("VmHWM"))

    def multiply(self) -> None:
        """Not a trainer: products of matrices, as fast as this processor does them."""
        import torch

        torch.manual_seed(0)
        a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, dtype=torch.bfloat16) for _ in range(2))
        self.ready("F.linear")
        while True:
            self.begin()
            with torch.no_grad():
                for _ in range(PEAK_PRODUCTS):
                    torch.nn.functional.linear(a, b)
            self.say(seconds=time.perf_counter() - self._began, flops=PEAK_PRODUCTS * 2 * PEAK_SIZE**3)

    def say(self, **figures: Any) -> None:
        """One line to the parent."""
        self._reports.write(json.dumps(figures) + "\n")
        self._reports.flush()


def memory_bytes(entry: str) -> int:
    """VmRSS (now) or VmHWM (the most) of this process."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


def be_child(what: dict[str, Any]) -> None:
    """Do the job that the parent wrote on the command line."""
    # Where memory runs out, this process goes, and not somebody else's.
    Path("/proc/self/oom_score_adj").write_text("1000")
    # Libraries print as they like; the parent hears reports only.
    lane = PipeLane(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(what["threads"])
    if "weights" in what:
        contestants.write_weights(what["weights"], Path(what["model"]))
        lane.say(done=True)
    elif what["trainer"] == "peak":
        lane.multiply()
    else:
        try:
            import_libraries(what["trainer"])
            lane.imported()
            TRAINERS[what["trainer"]](Task(**what["task"]), lane)
        except Absent as absent:
            lane.say(absent=str(absent))


def import_libraries(trainer: str) -> None:
    """What a trainer needs, so that memory can be looked at before the model is there."""
    for library in ("peft", *(f"transformers.models.{family}.modeling_{family}" for family in ("llama", "qwen2")), *LIBRARIES[trainer]):
        importlib.import_module(library)


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        be_child(json.loads(sys.argv[2]))
        sys.exit(0)
    sys.exit(main())
