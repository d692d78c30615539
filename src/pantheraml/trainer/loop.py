"""THE loop: steps, log lines, evaluations and checkpoints, over any engine. It knows neither device nor method."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pantheraml.data.chat import Example
from pantheraml.data.pack import StepBatch
from pantheraml.data.source import Source
from pantheraml.distributed.heartbeat import Heartbeat
from pantheraml.distributed.listening import listening
from pantheraml.engines.engine import Engine, StepMetrics
from pantheraml.errors import DivergedError, StoppedError
from pantheraml.hardware.recovery import Recovery
from pantheraml.recipe.types import OptimSpec, Recipe
from pantheraml.trainer.watch import StepRecord, Watch

PREEMPTED, INTERRUPTED = 75, 130
_HEARD_WITHIN_MS = 5000
"""So long several processes take steps, at most, without asking each other whether one was told to stop."""
USUAL_COUNT = 10  # evaluations and checkpoints of a run where the recipe says auto


@dataclass(slots=True)
class Position:
    """Where a run stands; what a checkpoint keeps beside the tensors."""

    step: int = 0
    tokens: int = 0
    train_s: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    not_better: int = 0
    first_eval: float | None = None
    last_eval: float | None = None
    ended: bool = False
    parts: int = 1
    """In how many parts each micro-batch is taken since memory ran out."""
    reliefs: int = 0
    """How often less was kept in memory from then on, before micro-batches were divided."""
    recoveries: list[str] = field(default_factory=list)
    """What was said of each time that it did."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """Steps between log lines, evaluations and checkpoints; None: only at the end."""

    total: int
    log: int
    eval: int | None
    save: int | None
    early_stop: int | None
    keep_best: bool

    @classmethod
    def of(cls, recipe: Recipe, total: int) -> Rhythm:
        """As the recipe asks."""

        def every(asked: int | str) -> int | None:
            return asked if isinstance(asked, int) else max(1, total // USUAL_COUNT) if asked == "auto" else None

        return cls(
            total, recipe.run.log_every, every(recipe.eval.every), every(recipe.run.save_every), recipe.eval.early_stop, recipe.run.best
        )


class Stop:
    """Whether somebody asked the run to end at the next step boundary.

    Args:
        agree: the largest of the numbers that the hosts of a run have; None: there is one host.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.signal: int | None = None
        self._agree = agree
        self._last: int | None = None
        self._next, self._since = 0, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether several hosts ask each other after this step, though nothing else is: their steps are long. They agree on that, too."""
        return self._agree is not None and step >= self._next

    def asked(self, step: int, *, boundary: bool) -> int | None:
        """The signal; of several hosts all take it after the same step. boundary: of something else that all do then."""
        if self._agree is None:
            return self.signal
        if not boundary and not self.due(step):
            return None
        now, steps = time.monotonic(), 1 if self._last is None else max(1, step - self._last)
        each_ms = min(int(1000 * (now - self._since) / steps), 2**32 - 1)
        number, most_ms = divmod(self._agree((self.signal or 0) << 32 | each_ms), 2**32)  # the largest of both, while there is no signal
        self._last, self._next, self._since = step, step + max(1, _HEARD_WITHIN_MS // max(1, most_ms)), now
        return number or None

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Within the block SIGTERM and Ctrl-C are requests; a second Ctrl-C ends at once. See `listening`."""

        def note(number: int) -> None:
            if self.signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number

        with listening(note):
            yield self


class Keeper(Protocol):
    """What the loop needs of `Checkpoints`."""

    @property
    def run(self) -> Path:
        """The folder of the run."""
        ...

    def steps(self) -> list[int]:
        """Steps for which there is a checkpoint."""
        ...

    def save(self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any], *, best: int | None) -> Path:
        """Write one."""
        ...


def schedule(optim: OptimSpec, peak: float, total: int) -> Callable[[int], float]:
    """Learning rate of step k, from 0.

    Warm-up over w = ceil(warmup * total) steps: peak * (k + 1) / w. After it, with p = (k - w) / (total - w):
    cosine peak * (1 + cos(pi p)) / 2, linear peak * (1 - p), constant peak.
    """
    warm = math.ceil(optim.warmup * total)

    def rate(k: int) -> float:
        if k < warm:
            return peak * (k + 1) / warm
        passed = (k - warm) / max(1, total - warm)
        match optim.schedule:
            case "cosine":
                return peak * (1 + math.cos(math.pi * passed)) / 2
            case "linear":
                return peak * (1 - passed)
            case "constant":
                return peak

    return rate


def run(
    engine: Engine,
    source: Source,
    layout: Callable[[Sequence[Example]], StepBatch],
    held_out: Sequence[StepBatch],
    rate: Callable[[int], float],
    rhythm: Rhythm,
    position: Position,
    checkpoints: Keeper,
    watch: Watch,
    stop: Stop,
    recovery: Recovery | None = None,
    pulse: Heartbeat | None = None,
) -> Position:
    """Train from `position` to the end, and return where it ended.

    Args:
        recovery: that of the engine, which stands where the position says, or further on. What it comes to becomes part of the
            position, so that a run which goes on does so alike.
        pulse: shows a launcher that steps are done; None: nobody looks.
    Raises:
        DivergedError: a loss or gradient was not finite. The weights are those before it, in a checkpoint.
        StoppedError: asked to stop, with a checkpoint saved.
        StorageError, DeviceError: from disk and device.
    """
    pending: list[tuple[StepMetrics, StepRecord, tuple[str, ...]]] = []
    recovery, pulse = recovery or Recovery(), pulse or Heartbeat(None, 0)
    clock = time.perf_counter()

    def save() -> None:
        pulse.rest()
        position.parts, position.reliefs, position.recoveries = recovery.parts, recovery.reliefs, list(recovery.said)
        checkpoints.save(position.step, engine.state_dict(), asdict(position), best=position.best_step if rhythm.keep_best else None)

    def recovered() -> bool:
        """A run that was killed must not take a step in another way than this one did."""
        return (recovery.parts, recovery.reliefs) != (position.parts, position.reliefs)

    def flush() -> None:
        """Bring the numbers of the last steps over, look at them, and show them."""
        nonlocal clock
        values = engine.read([metrics for metrics, _, _ in pending])
        now = time.perf_counter()
        tokens = sum(record.tokens for _, record, _ in pending)
        records: list[StepRecord] = []
        for value, (_, record, where) in zip(values, pending, strict=True):
            if not value.ok:
                watch.steps(records, 0.0, 0)
                position.step = record.step - 1
                position.tokens += sum(each.tokens for each in records)
                if position.step and position.step not in checkpoints.steps():
                    save()
                raise _diverged(record.step, value.loss, value.grad_norm, where)
            records.append(record.measured(value.loss, value.grad_norm))
        position.train_s += now - clock
        position.tokens += tokens
        watch.steps(records, now - clock, tokens)
        pending.clear()
        clock = time.perf_counter()

    def evaluate() -> bool:
        """Measure the held-out loss; true if it is time to stop early."""
        nonlocal clock
        pulse.rest()
        loss = engine.evaluate(held_out)
        if not math.isfinite(loss):
            raise _diverged_evaluation(position.step, loss)
        better = position.best_loss is None or loss < position.best_loss
        position.last_eval = loss
        if better:
            position.best_loss, position.best_step = loss, position.step
        position.not_better = 0 if better else position.not_better + 1
        watch.evaluation(position.step, loss, better)
        clock = time.perf_counter()
        return rhythm.early_stop is not None and position.not_better >= rhythm.early_stop

    if held_out and position.first_eval is None:
        position.first_eval = engine.evaluate(held_out)
        if not math.isfinite(position.first_eval):
            raise _diverged_evaluation(0, position.first_eval)
        watch.evaluation(0, position.first_eval, False)
        clock = time.perf_counter()
    while position.step < rhythm.total and not position.ended:
        k = position.step
        batch = layout(source.step(k))
        record = StepRecord(step=k + 1, lr=rate(k), tokens=batch.tokens, labels=batch.label_count)
        pending.append((engine.step(batch, k, record.lr), record, batch.where))
        position.step = done = k + 1
        pulse.beat()

        last = done == rhythm.total
        eval_due = bool(held_out) and (last or _due(done, rhythm.eval))
        save_due = last or _due(done, rhythm.save) or recovered()
        boundary = eval_due or save_due or _due(done, rhythm.log)
        if not boundary and stop.due(done):
            engine.read([pending[-1][0]])  # a device may be steps behind what it was told to do
        asked = stop.asked(done, boundary=boundary)
        save_due = save_due or asked is not None
        if eval_due or save_due or _due(done, rhythm.log):
            flush()
        if eval_due:
            position.ended = evaluate()
            best = rhythm.keep_best and position.best_step == done
            save_due = save_due or position.ended or best or recovered()
        if save_due:
            save()
            clock = time.perf_counter()
        if asked is not None and not last:
            raise stopped(asked, done, rhythm.total, checkpoints.run)
    return position


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def stopped(number: int, done: int, total: int, run: Path) -> StoppedError:
    """The error that ends a run which somebody asked to stop, after its checkpoint was saved."""
    preempted = number == signal.SIGTERM
    return StoppedError(
        f"stopped after step {done} of {total}, with a checkpoint saved",
        why="the system asked the process to end (SIGTERM)" if preempted else "you pressed Ctrl-C",
        fix=f"go on later with: pantheraml resume {run}",
        exit_code=PREEMPTED if preempted else INTERRUPTED,
    )


def _diverged_evaluation(step: int, loss: float) -> DivergedError:
    return DivergedError(
        f"the held-out loss after step {step} is not finite: {loss:g}",
        why="the weights grew until the model's numbers overflow; the last checkpoint is from before that",
        fix="lower optim.lr, and start again",
    )


def _diverged(step: int, loss: float, norm: float, where: tuple[str, ...]) -> DivergedError:
    shown = ", ".join(where[:8]) + (f" and {len(where) - 8} more" if len(where) > 8 else "")
    return DivergedError(
        f"step {step} is not finite: loss {loss:g}, gradient norm {norm:g}",
        why=f"the weights were not updated, and those of step {step - 1} are kept; the step's examples are {shown}",
        fix="lower optim.lr, or look at those rows for text that is not like the rest, and start again",
    )
