"""Memory that really runs out in the middle of a run: the system refuses an allocation, and the run goes on.

Each run is a process whose address space may not grow beyond what it holds plus three quarters of what a step needs: less
than a whole micro-batch takes and more than half of one does. Both are measured in that process, a step before.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny import losses, tiny_recipe, written

from pantheraml.recipe.load import dump_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux", reason="the limit and what counts against it are Linux's"),
]

STEPS, SHORT_FROM = 6, 3  # steps 4, 5 and 6, as people count, are short of memory
LONG = [
    {"messages": [{"role": "user", "content": f"row {i}"}, {"role": "assistant", "content": " ".join(str(i * j % 97) for j in range(150))}]}
    for i in range(40)
]
# In bfloat16 oneDNN makes machine code for each width that it has not seen, and keeps it: a run with new widths in each step
# needs some 50 MiB more in each, whatever the parts. Rows of one width leave that out.
ALIKE = [
    {
        "messages": [
            {"role": "user", "content": f"row {i + 10}"},
            {"role": "assistant", "content": " ".join(str(10 + i * j % 89) for j in range(150))},
        ]
    }
    for i in range(40)
]

RUNS = """
import os, resource, signal, sys, threading, time
from pathlib import Path
from pantheraml import cli
from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.recipe.load import load_recipe
from pantheraml.trainer import run

run.keep_freed_memory = lambda: False  # what a step needs is read off the process: it may not lie there already
SHORT_FROM, real_step, real_evaluate = int(sys.argv[1]), TorchEngine.step, TorchEngine.evaluate

def held():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

def needed(work):
    seen, done = [held()], threading.Event()
    def look():
        while not done.wait(0.0005):
            seen.append(held())
    looking = threading.Thread(target=look)
    looking.start()
    before = held()
    work()
    done.set()
    looking.join()
    return max(seen) - before

def short_of(room, work):
    resource.setrlimit(resource.RLIMIT_AS, (held() + room, resource.RLIM_INFINITY))
    try:
        return work()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def between(whole, half):
    assert whole > 1.6 * half > 8 << 20, (whole, half)  # so much that pages and small things do not matter
    return (whole + half) // 2

def short_steps(kill_at=None):
    room = None
    def step(self, batch, k, lr):
        nonlocal room
        if k == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if k < SHORT_FROM:
            return real_step(self, batch, k, lr)
        if room is None:
            self._gradients(batch, k, 2)  # the machine code for its shapes, see ALIKE, is there from now on
            room = between(*(needed(lambda: self._gradients(batch, k, parts)) for parts in (1, 2)))
            self._flat.drop_gradients()
        return short_of(room, lambda: real_step(self, batch, k, lr))
    TorchEngine.step = step

def short_evaluation():
    times = 0
    def evaluate(self, batches):
        nonlocal times
        times += 1
        if times != 2:
            return real_evaluate(self, batches)
        whole = needed(lambda: real_evaluate(self, batches))
        self._recovery.parts = 2
        half = needed(lambda: real_evaluate(self, batches))
        self._recovery.parts = 1
        return short_of(between(whole, half), lambda: real_evaluate(self, batches))
    TorchEngine.evaluate = evaluate

for word in sys.argv[2:]:
    folder, how = word.split(":")
    sys.stdout.flush()
    child = os.fork()
    if not child:
        where = os.open(folder + "." + how, os.O_CREAT | os.O_WRONLY)
        os.dup2(where, 1)
        os.dup2(where, 2)
        match how:
            case "short" | "stop":
                short_steps()
            case "kill":
                short_steps(kill_at=SHORT_FROM + 2)
            case "evaluation":
                short_evaluation()
        sys.argv = ["pantheraml", "resume", folder] if how == "resume" else ["pantheraml", "train", folder + ".yaml"]
        try:
            cli.main()
        except SystemExit as ended:
            os._exit(ended.code or 0)
        os._exit(99)
    status = os.waitpid(child, 0)[1]
    print(how, os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status), flush=True)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with the runs `whole`, `short`, `killed`, `never`, `evaluation`, the first two in bfloat16, and what each printed in NAME.how."""
    folder = tmp_path_factory.mktemp("short")
    data, alike = written(folder / "rows.jsonl", LONG), written(folder / "alike.jsonl", ALIKE)
    words = {"whole": ["whole"], "short": ["short"], "killed": ["kill", "resume"], "never": ["stop"], "evaluation": ["evaluation"]}
    words |= {"whole16": ["whole"], "short16": ["short"]}
    for name in words:
        recipe = tiny_recipe(
            folder,
            alike if name.endswith("16") else data,
            data={"eval_fraction": 0.25},
            batch={"size": 10, "micro_tokens": 4096},  # eight rows, and two
            optim={"steps": STEPS},
            eval={"every": 3, "generate_rows": 0},
            run={"name": name, "log_every": 2, "save_every": "end", "keep": 9},
            hardware={"kind": "cpu", "threads": 1, "checkpointing": "off", **({"oom_retries": 0} if name == "never" else {})},
        )
        if name.endswith("16"):
            recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
        (folder / f"{name}.yaml").write_text(dump_recipe(recipe))
    done = subprocess.run(
        [sys.executable, "-c", RUNS, str(SHORT_FROM), *(f"{folder / name}:{how}" for name, hows in words.items() for how in hows)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        # The C library gives back at once what is freed, so that what is held is what is used.
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    printed = {file.name: file.read_text()[-3000:] for file in folder.glob("*.*") if file.suffix not in (".yaml", ".jsonl")}
    ended = ["whole 0", "short 0", "kill -9", "resume 0", "stop 4", "evaluation 0", "whole 0", "short 0"]
    assert done.stdout.splitlines() == ended, (done.stderr, printed)
    return folder


def report(runs: Path, name: str) -> dict:
    return json.loads((runs / name / "report.json").read_text())


def test_no_step_is_lost_and_the_losses_are_those_of_a_run_with_enough_memory(runs: Path):
    for key in ("loss", "grad_norm", "eval_loss"):
        # float32, sums in another order; six steps are too few to blow that up.
        assert losses(runs / "short", key) == pytest.approx(losses(runs / "whole", key), rel=1e-5), key
    assert len(losses(runs / "short")) == STEPS
    assert report(runs, "short")["eval"]["loss_after"] == pytest.approx(report(runs, "whole")["eval"]["loss_after"], rel=1e-5)
    assert report(runs, "short")["train"]["tokens"] == report(runs, "whole")["train"]["tokens"]
    # It learned something, or equal losses would say little.
    assert report(runs, "whole")["eval"]["loss_after"] < 0.99 * report(runs, "whole")["eval"]["loss_before"]


def test_it_is_announced_once_and_stands_in_the_report(runs: Path):
    # Steps 5 and 6 had as little room: had they begun with whole micro-batches again, there were more.
    (note,) = [note for note in report(runs, "short")["notes"] if "memory" in note]
    assert note.startswith(f"Out of memory in step {SHORT_FROM + 1} (free at that moment: ")
    assert "from here on in 2 parts; the batch and its mean loss stay the same" in note and "unknown" not in note
    assert f"- {note}\n" in (runs / "short" / "report.md").read_text()
    assert " ".join((runs / "short.short").read_text().split()).count(note) == 1
    assert not [note for note in report(runs, "whole")["notes"] if "memory" in note]


def test_a_run_killed_after_it_recovered_goes_on_bit_by_bit(runs: Path):
    # Nothing but the recovery asked for a checkpoint at that step, and the resumed run has all the memory it likes.
    assert f"Going on after step {SHORT_FROM + 1} of {STEPS}" in (runs / "killed.resume").read_text()
    assert "Out of memory" not in (runs / "killed.resume").read_text()
    for file in ("adapter/adapter_model.safetensors", f"checkpoints/step-{STEPS:08d}/tensors.safetensors"):
        assert (runs / "killed" / file).read_bytes() == (runs / "short" / file).read_bytes(), file
        assert (runs / "killed" / file).read_bytes() != (runs / "whole" / file).read_bytes(), "halves round differently"
    for key in ("loss", "grad_norm", "eval_loss"):
        assert losses(runs / "killed", key) == losses(runs / "short", key), key
    assert report(runs, "killed")["eval"] == report(runs, "short")["eval"]
    assert any(note.startswith(f"Out of memory in step {SHORT_FROM + 1} (") for note in report(runs, "killed")["notes"])


def test_where_retries_are_not_wanted_it_stops_and_says_what_to_change(runs: Path):
    printed = (runs / "never.stop").read_text()
    assert f"error: out of memory in step {SHORT_FROM + 1}: " in printed and "Traceback" not in printed
    assert "fix: set batch.micro_tokens to 2048 (the result stays the same)" in " ".join(printed.split())
    assert "; the refusal said: [enforce fail at alloc_cpu.cpp" in " ".join(printed.split())
    assert not (runs / "never" / "report.json").exists()


def test_an_evaluation_recovers_alike(runs: Path):
    assert losses(runs / "evaluation", "eval_loss") == pytest.approx(losses(runs / "whole", "eval_loss"), rel=1e-5)
    (note,) = [note for note in report(runs, "evaluation")["notes"] if "memory" in note]
    assert note.startswith("Out of memory in an evaluation (free at that moment: ")
    assert losses(runs / "evaluation")[:3] == losses(runs / "whole")[:3]
    state = json.loads((runs / f"evaluation/checkpoints/step-{STEPS:08d}/state.json").read_text())
    assert state["parts"] == 2 and state["recoveries"] == [note]


def test_in_bfloat16_too(runs: Path):
    # Sums in another order round differently, each by up to 1/256, and up as often as down: in the mean over the 4,500 labels of
    # a step little of it is left.
    assert json.loads((runs / "short16" / "plan.json").read_text())["dtype"] == "bfloat16"
    for key, rel in {"loss": 1e-4, "eval_loss": 1e-4, "grad_norm": 2e-3}.items():
        assert losses(runs / "short16", key) == pytest.approx(losses(runs / "whole16", key), rel=rel), key
    assert len(losses(runs / "short16")) == STEPS
    assert report(runs, "short16")["train"]["tokens"] == report(runs, "whole16")["train"]["tokens"]
    notes = [note for note in report(runs, "short16")["notes"] if "memory" in note]
    assert notes and notes[0].startswith(f"Out of memory in step {SHORT_FROM + 1} (free at that moment: ")
    printed = " ".join((runs / "short16.short").read_text().split())
    assert all(printed.count(note) == 1 and f"- {note}\n" in (runs / "short16" / "report.md").read_text() for note in notes)
    assert not [note for note in report(runs, "whole16")["notes"] if "memory" in note]
