"""A LoRA training step on a GPU, against transformers + PEFT, TRL, Liger and Unsloth: tokens a second, memory, first step.

    python benchmarks/train_gpu.py all [--quick] [--shape NAME ...] [--batch ROWSxTOKENS ...] [--only NAME ...]
    python benchmarks/train_gpu.py ours --level keep|cheap|all|offload --base bf16|nf4|fp8|int8 [--shape NAME] [--batch ...]
    python benchmarks/train_gpu.py peft|trl|liger|unsloth [--level ...] [--base ...]
    python benchmarks/train_gpu.py weights [--shape NAME ...]

`all` runs each contestant in a process of its own, one after the other, since one GPU holds one of them. All train the
same LoRA (rank 16 on all linear layers) from the same random weights, written once, on the same full rows, with the same
AdamW and loss on every token; a step takes the whole batch at once. Levels say what is kept for the backward pass: all of
it (keep), all but what is cheap to compute again (cheap), only the inputs of the layers (all: recompute all), or those in
the host's memory (offload). Three warm-ups, then the median of the steps, each between two synchronisations.

Memory is the most that torch had allocated on the device during the steps; `reserved` is what it had taken from the driver.
`start` is the time from the beginning of the process to the first step, without the writing of weights, and `first step` that step, compilation included.
A contestant that is not installed is named and left out. Without a GPU, `--device cpu --shape tiny` runs the same code on
a model that is good for nothing else; such figures are marked.

The last line is JSON. The exit status is 1 if losses differ, or one of ours fails other than for want of memory; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contestants
from contestants import SHAPES, TRAINERS, Absent, Data, Task

BEGAN = time.perf_counter()
SHAPES_HERE = ("llama-3.2-1b", "llama-3.1-8b")
BATCHES = ("4x2048", "2x2048", "1x8192")
LEVELS = {"keep": "off", "cheap": "cheap", "all": "on", "offload": "offload"}  # as the recipe calls them
BASES = {"bf16": {}, "nf4": {"load_in_4bit": True}, "fp8": {"load_in_fp8": True}, "int8": {"load_in_8bit": True}}
WARM_UP = 3
LOSS_TOLERANCE = {"bf16": 5e-3, "nf4": 5e-2, "fp8": 2e-2, "int8": 2e-2}  # relative to the first contestant in bfloat16
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "liger-kernel", "unsloth", "pantheraml")
NO_GPU = "NOT A FIGURE OF A GPU: this ran on the CPU, to show that it runs"


@dataclass(frozen=True, slots=True)
class Entry:
    """One contestant: who, what it keeps for the backward pass, and how it holds the frozen base."""

    who: str
    level: str
    base: str

    def __str__(self) -> str:
        return f"{self.who}-{self.level}-{self.base}"


OFFERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ours": (tuple(LEVELS), tuple(BASES)),
    "peft": (("keep", "all"), ("bf16",)),
    "trl": (("keep", "all"), ("bf16",)),
    "liger": (("keep", "all"), ("bf16",)),
    "unsloth": (("keep", "all", "offload"), ("bf16", "nf4")),
}
"""Levels and bases of each contestant."""

LINE_UP = (
    Entry("peft", "keep", "bf16"),
    Entry("peft", "all", "bf16"),
    Entry("trl", "all", "bf16"),
    Entry("trl", "keep", "bf16"),
    Entry("liger", "keep", "bf16"),
    Entry("liger", "all", "bf16"),
    Entry("unsloth", "keep", "bf16"),
    Entry("unsloth", "all", "bf16"),
    Entry("unsloth", "offload", "bf16"),
    Entry("unsloth", "offload", "nf4"),
    *(Entry("ours", level, "bf16") for level in LEVELS),
    Entry("ours", "keep", "nf4"),
    Entry("ours", "offload", "nf4"),
    Entry("ours", "keep", "int8"),
    Entry("ours", "keep", "fp8"),
    Entry("ours", "cheap", "fp8"),
)


def main() -> int:
    """Do what the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=["all", "weights", *OFFERS])
    parser.add_argument("--quick", action="store_true", help="the first shape and batch, one warm-up and two steps")
    parser.add_argument("--shape", nargs="+", choices=[*SHAPES], help="default: all of " + " ".join(SHAPES_HERE))
    parser.add_argument("--batch", nargs="+", type=parse_batch, help="rows x tokens; default: all of " + " ".join(BATCHES))
    parser.add_argument("--only", nargs="+", default=[""], help="of all: those whose names begin so, as in ours-keep or unsloth")
    parser.add_argument("--level", choices=[*LEVELS], default="keep")
    parser.add_argument("--base", choices=[*BASES], default="bf16")
    parser.add_argument("--steps", type=int, help="that are timed (default: 7)")
    parser.add_argument("--device", default="cuda", help="cuda, xpu, or cpu for the shape tiny")
    parser.add_argument("--weights", type=Path, default=Path(tempfile.gettempdir()) / "pantheraml-random-weights", help="their folder")
    asked = parser.parse_args()
    asked.shape = asked.shape or list(SHAPES_HERE[:1] if asked.quick else SHAPES_HERE)
    asked.batch = asked.batch or [parse_batch(word) for word in (BATCHES[:1] if asked.quick else BATCHES)]
    asked.warm_up, asked.steps = 1 if asked.quick else WARM_UP, asked.steps or (2 if asked.quick else 7)
    if asked.device == "cpu" and asked.shape != ["tiny"]:
        parser.error("--device cpu is for --shape tiny: it shows that the code runs, and measures nothing")
    if asked.contestant in OFFERS:
        levels, bases = OFFERS[asked.contestant]
        if asked.level not in levels or asked.base not in bases:
            parser.error(f"{asked.contestant} has the levels {', '.join(levels)} and the bases {', '.join(bases)}")
    # Before transformers is imported: nothing is looked up or told to anybody.
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"})
    if asked.device != "cpu" and (missing := no_gpu(asked.device)):
        print(missing, file=sys.stderr)
        return 2
    before = time.perf_counter()
    for shape in asked.shape:
        prepare(shape, asked)
    asked.prepared_s = time.perf_counter() - before
    match asked.contestant:
        case "weights":
            return 0
        case "all":
            return run_all(asked)
        case _:
            return run_one(asked)


def parse_batch(word: str) -> Data:
    """`4x2048`: rows times tokens."""
    rows, _, tokens = word.partition("x")
    try:
        return Data(longest=int(tokens), step_rows=int(rows), micro_rows=int(rows), mixed=False)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word} is not ROWSxTOKENS, as in 4x2048") from error


def no_gpu(device: str) -> str | None:
    """Why nothing can be measured here; None: it can."""
    import torch

    if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == device:  # pyright: ignore[reportOptionalMemberAccess]
        return None
    return (
        f"train_gpu.py needs a GPU, and torch {torch.__version__} finds none of the kind {device} here\n"
        "  why: tokens a second and memory of a GPU can be measured on a GPU only\n"
        "  fix: run it on a machine with one; --device cpu --shape tiny shows that the code runs"
    )


def prepare(shape: str, asked: argparse.Namespace) -> None:
    """Write the weights, unless they are there."""
    folder = asked.weights / shape
    if not (folder / "tokenizer.json").exists():  # written last
        print(f"writing {folder}", file=sys.stderr)
        contestants.write_weights(shape, folder, asked.device)


# One contestant, in this process.


class Stopwatch:
    """A lane with one runner: steps begin at once, and each is timed between two synchronisations of the device."""

    def __init__(self, device: str, prepared_s: float) -> None:
        import torch

        self._prepared_s = prepared_s
        self._gpu: Any = None if device == "cpu" else torch.accelerator
        self.settings = ""
        self.start_s = self._began = 0.0
        self.steps: list[dict[str, float]] = []

    def ready(self, settings: str) -> None:
        """See `contestants.Lane`. What is counted as memory begins here."""
        self.settings, self.start_s = settings, time.perf_counter() - BEGAN - self._prepared_s
        if self._gpu:
            self._gpu.reset_peak_memory_stats()

    def begin(self) -> None:
        """See `contestants.Lane`."""
        self._synchronize()
        self._began = time.perf_counter()

    def end(self, loss: Callable[[], float], tokens: int, labels: int) -> None:
        """See `contestants.Lane`."""
        self._synchronize()
        seconds = time.perf_counter() - self._began
        self.steps.append({"seconds": seconds, "loss": loss(), "tokens": tokens, "labels": labels})

    def memory(self) -> dict[str, int | None]:
        """The most that was allocated and reserved on the device, in bytes; None without one."""
        if not self._gpu:
            return {"peak_bytes": None, "reserved_bytes": None}
        return {"peak_bytes": self._gpu.max_memory_allocated(), "reserved_bytes": self._gpu.max_memory_reserved()}

    def _synchronize(self) -> None:
        if self._gpu:
            self._gpu.synchronize()


def run_one(asked: argparse.Namespace) -> int:
    """Train with one contestant on each shape and batch asked for, and print its row and its figures."""
    entry = Entry(asked.contestant, asked.level, asked.base)
    if len(asked.shape) > 1 or len(asked.batch) > 1:
        sys.exit("one contestant has one process, so name one --shape and one --batch (all has them all)")
    (shape,), (data,) = asked.shape, asked.batch
    result: dict[str, Any] = {"benchmark": "train_gpu", "contestant": str(entry), "shape": shape, "batch": batch_name(data)}
    with tempfile.TemporaryDirectory(prefix="pantheraml-train-gpu-") as room:
        rows = Path(room) / "rows.jsonl"
        contestants.write_rows(rows, data, asked.warm_up + asked.steps, SHAPES[shape]["vocab_size"])
        task = Task(
            model=str(asked.weights / shape),
            rows=str(rows),
            room=room,
            steps=asked.warm_up + asked.steps,
            step_rows=data.step_rows,
            micro_rows=data.micro_rows,
            longest=data.longest,
            device=asked.device,
            settings=settings_of(entry, data),
        )
        lane = Stopwatch(asked.device, asked.prepared_s)
        try:
            TRAINERS[entry.who](task, lane)
        except Absent as absent:
            result["absent"] = str(absent)
        else:
            result |= figures(lane, asked.warm_up, contestants.flops_per_token(shape, contestants.read_rows(rows)))
    result |= {"gpu": asked.device != "cpu", "device": device_name(asked.device), "versions": versions()}
    print_header()
    print_row(str(entry), result, {})
    print(json.dumps(result))
    return 0


def settings_of(entry: Entry, data: Data) -> dict[str, Any]:
    """What the trainer of this entry is told."""
    again = entry.level != "keep"
    match entry.who:
        case "ours":
            micro_tokens = data.step_rows * data.longest
            return {"model": BASES[entry.base], "hardware": {"checkpointing": LEVELS[entry.level]}, "micro_tokens": micro_tokens}
        case "trl":
            return {"arguments": {} if again else {"gradient_checkpointing": False}}
        case "unsloth":
            recompute = {"keep": False, "all": True, "offload": "unsloth"}[entry.level]
            return {"recompute": recompute, "load_in_4bit": entry.base == "nf4"}
        case _:
            return {"checkpointing": again}


def figures(lane: Stopwatch, warm_up: int, flops: float) -> dict[str, Any]:
    """What was measured; the speed is the median of the steps after the warm-up."""
    timed = lane.steps[warm_up:]
    speed = statistics.median(step["tokens"] / step["seconds"] for step in timed)
    return {
        "settings": lane.settings,
        "tokens_per_s": round(speed, 1),
        "useful_tflops": round(speed * flops / 1e12, 3),
        **lane.memory(),
        "start_s": round(lane.start_s, 2),
        "first_step_s": round(lane.steps[0]["seconds"], 2),
        "seconds": [round(step["seconds"], 4) for step in lane.steps],
        "tokens": [step["tokens"] for step in lane.steps],
        "labels": [step["labels"] for step in lane.steps],
        "losses": [round(step["loss"], 6) for step in lane.steps],
    }


def device_name(device: str) -> str:
    """As its driver names it."""
    import torch

    return "CPU" if device == "cpu" else str(torch.get_device_module(device).get_device_name())


def versions() -> dict[str, str | None]:
    """Of everything that takes part; None: not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


# All contestants.


def run_all(asked: argparse.Namespace) -> int:
    """A table for each shape and batch."""
    cases: list[dict[str, Any]] = []
    for shape in asked.shape:
        for data in asked.batch:
            print(f"\n{shape}, {batch_name(data)}" + (f"; {NO_GPU}" if asked.device == "cpu" else ""))
            print_header()
            results: dict[str, dict[str, Any]] = {}
            for entry in (each for each in LINE_UP if str(each).startswith(tuple(asked.only))):
                results[str(entry)] = in_own_process(entry, shape, data, asked)
                print_row(str(entry), results[str(entry)], results)
            cases.append({"shape": shape, "batch": batch_name(data), "results": results, "wrong": wrong(results)})
            for problem in cases[-1]["wrong"]:
                print(f"WRONG: {problem}")
    problems = [problem for case in cases for problem in case["wrong"]]
    result = {
        "benchmark": "train_gpu",
        "ok": not problems,
        "quick": asked.quick,
        "gpu": asked.device != "cpu",
        "device": device_name(asked.device),
        "versions": versions(),
        "steps": asked.steps,
        "cases": cases,
    }
    print(f"{result['device']}; " + ", ".join(f"{package} {version or '-'}" for package, version in result["versions"].items()))
    print(json.dumps(result))
    return 1 if problems else 0


def in_own_process(entry: Entry, shape: str, data: Data, asked: argparse.Namespace) -> dict[str, Any]:
    """The figures of one contestant, or why there are none (`absent`, `failed`)."""
    words = [entry.who, "--level", entry.level, "--base", entry.base, "--shape", shape, "--batch", batch_name(data)]
    words += ["--steps", str(asked.steps), "--device", asked.device, "--weights", str(asked.weights), *(["--quick"] if asked.quick else [])]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "out of memory" in line] or lines
    return {"failed": f"exit status {done.returncode}: {telling[-1] if telling else 'it said nothing'}"}


def wrong(results: dict[str, dict[str, Any]]) -> list[str]:
    """Who came to other labels or another loss than the first, and who of ours failed though there was memory."""
    found = [
        f"{name}: {result['failed']}"
        for name, result in results.items()
        if name.startswith("ours") and "out of memory" not in result.get("failed", "out of memory")
    ]
    ran = {name: result for name, result in results.items() if "losses" in result}
    first = next(iter(ran), "")
    for name, result in ran.items():
        if result["labels"] != ran[first]["labels"]:
            found.append(f"{name}: labels {result['labels']} instead of {ran[first]['labels']}")
        pairs = zip(result["losses"], ran[first]["losses"], strict=True)
        worst = max(abs(a / b - 1) if math.isfinite(a) else math.inf for a, b in pairs)
        if worst > LOSS_TOLERANCE[name.split("-")[-1]]:
            found.append(f"{name}: a loss differs by {worst:.1e} from that of {first}")
    return found


def batch_name(data: Data) -> str:
    """As on the command line."""
    return f"{data.step_rows}x{data.longest}"


def print_header() -> None:
    """The line above the rows."""
    print(
        f"{'':20} {'tokens/s':>10} {'x peft':>7} {'x unsloth':>9} {'TFLOP/s':>8} {'peak GiB':>8} {'reserved':>8} "
        f"{'start s':>8} {'first step s':>12} {'loss':>9}"
    )


def print_row(name: str, result: dict[str, Any], others: dict[str, dict[str, Any]]) -> None:
    """One contestant; ratios to those that ran before it: peft keep, and the fastest Unsloth in bfloat16."""
    if "tokens_per_s" not in result:
        print(f"{name:20} {'not here: ' + result['absent'] if 'absent' in result else 'failed: ' + result['failed']}")
        return
    speed = result["tokens_per_s"]
    plain = [other["tokens_per_s"] for key, other in others.items() if key == "peft-keep-bf16" and "tokens_per_s" in other]
    rival = [
        other["tokens_per_s"]
        for key, other in others.items()
        if key.startswith("unsloth") and key.endswith("bf16") and "tokens_per_s" in other
    ]
    ratios = [f"{speed / max(each):.2f}" if each else "-" for each in (plain, rival)]
    memory = ["-" if size is None else f"{size / 2**30:.2f}" for size in (result["peak_bytes"], result["reserved_bytes"])]
    print(
        f"{name:20} {speed:>10,.0f} {ratios[0]:>7} {ratios[1]:>9} {result['useful_tflops']:>8.3g} {memory[0]:>8} {memory[1]:>8} "
        f"{result['start_s']:>8.1f} {result['first_step_s']:>12.2f} {result['losses'][-1]:>9.4f}"
    )
    print(f"{'':20} {result['settings']}" + ("" if result["gpu"] else f" ({NO_GPU})"))


if __name__ == "__main__":
    sys.exit(main())
