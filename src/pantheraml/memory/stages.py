"""Training against a clock: a run of the trainer after the other, each as long as the speed of the last one allows.

How fast a machine trains is known once it does, and changes when others use it too. So the time is divided into stages: each begins with
the weights of the one before, takes its share of the time that is left at the speed that was measured last, and learns at the rate that
a cosine over all of the time has in its middle; the last one goes down to zero. On a processor a few steps tell beforehand
how many threads are faster: beside other programs one thread may be ten times as fast as two that wait for each other.
"""

from __future__ import annotations

import random
import shutil
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, cos, pi
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.data.prepare import IN_MEMORY
from pantheraml.recipe.kinds import in_host_memory
from pantheraml.trainer.folder import MODEL
from pantheraml.trainer.watch import METRICS, read_metrics

if TYPE_CHECKING:
    from rich.console import Console

    from pantheraml.recipe.types import HardwareAsk
    from pantheraml.trainer.runs import Run

BATCH = 6
"""Texts in a step. A few thousand tokens: for as many tokens, more steps taught more than larger ones."""
RATE = 3e-3
OPTIMIZER: dict[str, Any] = {"weight_decay": 0.1, "beta2": 0.95}
WARM_STEPS = 50
"""In which the rate rises, at the beginning of each stage: AdamW's moments begin anew."""
PILOT_STEPS = 12
STAGES, STAGE_S = 8, 30.0
"""Most stages, and seconds that one has at least. Starting the trainer costs about three of them."""
MOST_EPOCHS = 12
LEAST_SHARE, MOST_COPIES = 0.1, 4.0
"""A kind of which there is less is seen more often, at most so many times as often."""
_ZLIB_BYTES = 1 << 20
"""Of a kind, that tell how much it says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """What came of all stages. folder: of the last run. train_s: of steps alone."""

    folder: Path
    steps: int
    tokens: int
    train_s: float


class Texts:
    """An endless stream of texts in random order, those of each kind all once before one comes again.

    A kind's share is what its texts come to once zlib has compressed them: of what repeats itself less is to be learned.
    """

    def __init__(self, texts: Sequence[str], kinds: Sequence[str], seed: int) -> None:
        self._draw, self._texts = random.Random(seed), texts
        self._places: dict[str, list[int]] = defaultdict(list)
        for i, kind in enumerate(kinds):
            self._places[kind].append(i)
        self._left: dict[str, list[int]] = {kind: [] for kind in self._places}
        self.weights = _weights({kind: [texts[i] for i in places] for kind, places in self._places.items()})
        """How often a text of each kind is drawn, beside one of another kind."""

    def take(self, count: int) -> list[str]:
        """The next ones."""
        kinds = list(self._places)
        drawn = self._draw.choices(kinds, [self.weights[kind] * len(self._places[kind]) for kind in kinds], k=count)
        return [self._texts[self._next(kind)] for kind in drawn]

    def _next(self, kind: str) -> int:
        if not self._left[kind]:
            self._left[kind] = self._draw.sample(self._places[kind], len(self._places[kind]))
        return self._left[kind].pop()


def _weights(texts: dict[str, list[str]]) -> dict[str, float]:
    """Of a text of each kind: how much zlib leaves of it, and more where the kind comes to less than `LEAST_SHARE`."""
    sizes, left = {}, {}
    for kind, some in texts.items():
        sizes[kind] = sum(map(len, some))
        sample = "".join(some)[:_ZLIB_BYTES].encode()
        left[kind] = len(zlib.compress(sample)) / len(sample)
    total = sum(sizes[kind] * left[kind] for kind in texts)
    return {kind: left[kind] * min(MOST_COPIES, max(1.0, LEAST_SHARE * total / (sizes[kind] * left[kind]))) for kind in texts}


class Stages:
    """Runs of the trainer in a folder.

    Args:
        base: folder of the model to begin with. texts: what it learns. count: how many there are.
        context: tokens of a model. console: shows the progress. announce: hears what is done.
    """

    def __init__(
        self,
        folder: Path,
        base: Path,
        texts: Texts,
        *,
        count: int,
        context: int,
        hardware: HardwareAsk,
        seed: int,
        console: Console | None,
        announce: Callable[[str], None],
    ) -> None:
        from rich.console import Console

        self._folder, self._base, self._texts, self._seed = folder, base, texts, seed
        self._most_steps = ceil(MOST_EPOCHS * count / BATCH)
        self._hardware, self._announce = hardware, announce
        self._console = console or Console(quiet=True)
        self._speeds: dict[int | None, float] = {}
        """Steps a second by so many threads, when they were used last; None: as many as the trainer chooses."""
        self._start_s = 0.0
        """What a run takes beside its steps."""
        self._said: dict[str, Any] = {
            "data": {"train": [IN_MEMORY], "format": "text", "too_long": "split", "shuffle": False, "eval_fraction": 0.0},
            "adapter": {"kind": "full"},
            "batch": {"size": BATCH},
            "eval": {"every": "end", "generate_rows": 0},
        }
        self._context = context

    def for_steps(self, steps: int) -> Taught:
        """One run of so many steps."""
        run = self._train("run", self._base, steps, "cosine", RATE, None)
        return Taught(folder=run.folder, steps=steps, tokens=_seen(run)["tokens"], train_s=_seen(run)["train_s"])

    def for_minutes(self, minutes: float) -> Taught:
        """Runs that end in about so many minutes from now, and have `PILOT_STEPS` at least."""
        begun, seconds = time.monotonic(), minutes * 60
        self._try()
        stages = max(1, min(STAGES, int(seconds / STAGE_S)))
        done = Taught(folder=self._base, steps=0, tokens=0, train_s=0.0)
        while stages:
            spent_s = time.monotonic() - begun
            speed = max(self._speeds.values())
            left = min(int((seconds - spent_s - stages * self._start_s) * speed), self._most_steps - done.steps)
            if left < stages * PILOT_STEPS:  # they come to an end with this one
                stages = 1
            steps, threads = max(PILOT_STEPS, ceil(left / stages)), max(self._speeds, key=self._speeds.__getitem__)
            passed = min(1.0, max(spent_s / seconds, done.steps / self._most_steps)) if done.steps else 0.0
            middle = passed + (1 - passed) / stages / 2
            rate = RATE * (1 + cos(pi * (middle if stages > 1 else passed))) / 2
            base = done.folder / MODEL if done.steps else self._base
            run = self._timed(f"stage{stages}", base, steps, "constant" if stages > 1 else "linear", rate, threads)
            if done.steps:
                shutil.rmtree(done.folder)
            seen = _seen(run)
            done = Taught(
                folder=run.folder, steps=done.steps + steps, tokens=done.tokens + seen["tokens"], train_s=done.train_s + seen["train_s"]
            )
            stages -= 1
            self._announce(f"{done.steps} steps in {time.monotonic() - begun:.0f} s, {seen['tokens_per_s']:,.0f} tokens/s of late")
        return done

    def _try(self) -> None:
        """A few steps, on a processor with one thread as well."""
        from pantheraml.hardware.cpu import usable_cores
        from pantheraml.hardware.find import find

        kind = find(self._hardware).device.kind
        several = in_host_memory(kind) and self._hardware.threads is None and usable_cores() > 1
        for threads in (None, 1) if several else (None,):
            shutil.rmtree(self._timed("pilot", self._base, PILOT_STEPS, "constant", RATE, threads).folder)

    def _timed(self, name: str, base: Path, steps: int, schedule: str, rate: float, threads: int | None) -> Run:
        """A run, and a note of its speed."""
        begun = time.monotonic()
        run = self._train(name, base, steps, schedule, rate, threads)
        self._start_s = time.monotonic() - begun - _seen(run)["train_s"]
        taken = [line["tokens"] / line["tokens_per_s"] for line in read_metrics(run.folder / METRICS) if "tokens_per_s" in line]
        # The first steps of a process are slower than all others.
        late = taken[len(taken) // 2 :]
        self._speeds[threads] = len(late) / sum(late)
        return run

    def _train(self, name: str, base: Path, steps: int, schedule: str, rate: float, threads: int | None) -> Run:
        from pantheraml.recipe.load import recipe_from
        from pantheraml.trainer.run import train

        said = {
            "model": {"name": str(base), "max_tokens": self._context},
            "hardware": self._hardware.model_dump(exclude_unset=True) | ({} if threads is None else {"threads": threads}),
            "optim": {"steps": steps, "schedule": schedule, "lr": rate, "warmup": min(0.1, WARM_STEPS / steps), **OPTIMIZER},
            "run": {"folder": str(self._folder), "name": name, "seed": self._seed, "save_every": "end", "log_every": 4},
        }
        rows = [{"text": text} for text in self._texts.take(steps * BATCH)]
        return train(recipe_from(self._said | said), rows=rows, console=self._console)


def _seen(run: Run) -> dict[str, Any]:
    """What the run says of its steps."""
    return (run.report or {})["train"]
