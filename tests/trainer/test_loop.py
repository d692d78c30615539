"""The loop over an engine of plain numbers: what happens in which order, and how it ends."""

from __future__ import annotations

import math
import os
import signal
import threading
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_constant_schedule, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from pantheraml.data.pack import StepBatch
from pantheraml.engines.engine import StepMetrics, StepValues
from pantheraml.errors import DivergedError, StoppedError
from pantheraml.recipe.load import recipe_from
from pantheraml.recipe.types import OptimSpec
from pantheraml.trainer import loop
from pantheraml.trainer.checkpoint import Checkpoints
from pantheraml.trainer.loop import Position, Rhythm, Stop
from pantheraml.trainer.watch import Watch, read_metrics

# ---- The learning rate -------------------------------------------------------------------------------------------


def stock_rates(make, peak: float, total: int, **how) -> list[float]:
    """What transformers' schedule gives to each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler: LambdaLR = make(optimizer, **how)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize(
    ("kind", "make"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup), ("constant", None)]
)
def test_without_warmup_the_rates_are_those_of_transformers(kind, make, total: int):
    rate = loop.schedule(OptimSpec(schedule=kind, warmup=0.0), 3e-4, total)
    wanted = (
        stock_rates(make, 3e-4, total, num_warmup_steps=0, num_training_steps=total)
        if make
        else stock_rates(get_constant_schedule, 3e-4, total)
    )
    # The same formula in double precision: only the order of two multiplications may differ.
    assert [rate(k) for k in range(total)] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("kind", "make"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)])
def test_after_the_warmup_the_rates_are_those_of_transformers(kind, make):
    total, warm = 40, 10
    rate = loop.schedule(OptimSpec(schedule=kind, warmup=warm / total), 1.0, total)
    wanted = stock_rates(make, 1.0, total, num_warmup_steps=warm, num_training_steps=total)
    assert [rate(k) for k in range(warm, total)] == pytest.approx(wanted[warm:], rel=1e-12)


def test_the_warmup_rises_to_the_peak_and_wastes_no_step_on_zero():
    rate = loop.schedule(OptimSpec(schedule="linear", warmup=0.4), 1.0, 10)
    # By hand: w = 4 steps up, then 1 - (k - 4) / 6.
    assert [rate(k) for k in range(10)] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    cosine = loop.schedule(OptimSpec(schedule="cosine", warmup=0.2), 2.0, 5)
    assert [cosine(k) for k in range(5)] == pytest.approx([2.0, 2.0, 1 + math.cos(math.pi / 4), 1.0, 1 + math.cos(3 * math.pi / 4)])


def test_a_share_of_the_steps_is_rounded_up():
    assert loop.schedule(OptimSpec(schedule="constant", warmup=0.03), 1.0, 40)(0) == 0.5  # 1.2 steps are 2
    assert loop.schedule(OptimSpec(schedule="constant", warmup=0.03), 1.0, 1)(0) == 1.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.999])
def test_every_step_has_a_rate_above_zero(kind, warmup: float):
    for total in (1, 2, 3, 50):
        rate = loop.schedule(OptimSpec(schedule=kind, warmup=warmup), 1.0, total)
        assert all(0 < rate(k) <= 1 for k in range(total))


# ---- How often ---------------------------------------------------------------------------------------------------


def rhythm_of(total: int, **sections) -> Rhythm:
    return Rhythm.of(recipe_from({"model": "tiny:llama", "data": "x.jsonl", **sections}), total)


def test_auto_is_ten_times_a_run_and_at_least_every_step():
    assert (rhythm_of(200).eval, rhythm_of(200).save) == (20, 20)
    assert (rhythm_of(7).eval, rhythm_of(7).save) == (1, 1)


def test_numbers_are_taken_and_end_is_none():
    made = rhythm_of(100, eval={"every": 7, "early_stop": 3}, run={"save_every": "end", "log_every": 4, "best": False})
    assert made == Rhythm(total=100, log=4, eval=7, save=None, early_stop=3, keep_best=False)


# ---- The loop ----------------------------------------------------------------------------------------------------


class FakeEngine:
    """An `Engine` whose weight is how many steps it took, and whose losses the test writes down.

    Args:
        evals: held-out losses in the order in which they are asked for.
        bad_at: the number of the step, from 1, whose loss is not finite. Like the real one it stays as it is from there.
        on_step: is called with the number of each step.
    """

    def __init__(self, evals=(), bad_at: int | None = None, on_step=None) -> None:
        self.weight, self.events, self.rates = 0, [], []
        self._evals, self._bad_at, self._on_step, self._halted = iter(evals), bad_at, on_step, False

    def step(self, batch, k, lr):
        done = k + 1
        self.rates.append(lr)
        self.events.append(f"step {done}")
        self._halted = self._halted or done == self._bad_at
        self.weight += not self._halted
        if self._on_step:
            self._on_step(done)
        return StepMetrics(math.nan if done == self._bad_at else 1 / done, 0.5)

    def read(self, metrics):
        self.events.append(f"read {len(metrics)}")
        return [StepValues(each.loss, each.grad_norm, math.isfinite(each.loss)) for each in metrics]

    def evaluate(self, batches):
        loss = next(self._evals)
        self.events.append(f"eval {loss:g}")
        return loss

    def state_dict(self):
        self.events.append("save")
        return {"weight/w": torch.tensor(float(self.weight))}


class FakeSource:
    def step(self, k):
        return [SimpleNamespace(where=f"rows.jsonl:{2 * k + 1}"), SimpleNamespace(where=f"rows.jsonl:{2 * k + 2}")]


def layout(examples) -> StepBatch:
    return StepBatch(micro=(), label_count=3, tokens=10, where=tuple(example.where for example in examples))


HELD_OUT = [StepBatch(micro=(), label_count=1, tokens=1, where=())]


class Bench:
    """A loop with its folder, ready to run."""

    def __init__(self, folder: Path, engine: FakeEngine, rhythm: Rhythm, *, held_out=HELD_OUT, keep: int = 9) -> None:
        self.engine, self.rhythm, self.held_out, self.folder = engine, rhythm, held_out, folder
        self.checkpoints = Checkpoints(folder / "checkpoints", fingerprint="f", keep=keep)
        self.out, self.stop, self.position = StringIO(), Stop(), Position()

    def run(self) -> Position:
        console = Console(file=self.out, width=200)
        watch = Watch(self.folder, console, total=self.rhythm.total, start=self.position.step, memory_bytes=lambda: 0)
        rate = loop.schedule(OptimSpec(schedule="constant", warmup=0.0), 0.1, self.rhythm.total)
        return loop.run(
            self.engine, FakeSource(), layout, self.held_out, rate, self.rhythm, self.position, self.checkpoints, watch, self.stop
        )

    def metrics(self):
        return read_metrics(self.folder / "metrics.jsonl")

    def weight(self, step: int) -> float:
        return float(self.checkpoints.load(step).tensors["weight/w"])


def rhythm(total: int, *, log: int = 100, eval: int | None = None, save: int | None = None, early_stop=None, keep_best=True) -> Rhythm:
    return Rhythm(total, log, eval, save, early_stop, keep_best)


def test_read_comes_before_eval_and_eval_before_save(tmp_path: Path):
    bench = Bench(tmp_path, FakeEngine([9, 4, 2]), rhythm(6, log=2, eval=3, save=3))
    ended = bench.run()
    assert bench.engine.events == [
        *("eval 9", "step 1", "step 2", "read 2"),
        *("step 3", "read 1", "eval 4", "save"),
        *("step 4", "read 1", "step 5", "step 6", "read 2", "eval 2", "save"),
    ]
    assert bench.checkpoints.steps() == [3, 6] and bench.weight(3) == 3
    assert (ended.step, ended.tokens, ended.first_eval, ended.last_eval) == (6, 60, 9, 2)
    assert (ended.best_step, ended.best_loss, ended.not_better) == (6, 2, 0)


def test_each_step_is_written_once_with_what_it_measured(tmp_path: Path):
    bench = Bench(tmp_path, FakeEngine([9, 4]), rhythm(4, log=3))
    bench.run()
    steps = [line for line in bench.metrics() if "loss" in line]
    assert [(line["step"], line["loss"], line["grad_norm"], line["lr"], line["tokens"], line["labels"]) for line in steps] == [
        (k, 1 / k, 0.5, 0.1, 10, 3) for k in range(1, 5)
    ]
    assert [line for line in bench.metrics() if "eval_loss" in line] == [{"step": 0, "eval_loss": 9}, {"step": 4, "eval_loss": 4}]
    assert bench.engine.rates == [0.1] * 4


def test_a_log_line_shows_the_mean_over_labels_and_where_the_run_stands(tmp_path: Path):
    bench = Bench(tmp_path, FakeEngine(), rhythm(2, log=2), held_out=[])
    bench.run()
    assert "step 2/2  loss 0.7500  lr 1.0e-01" in bench.out.getvalue()  # (1 + 1/2) / 2


def test_without_held_out_rows_nothing_is_evaluated(tmp_path: Path):
    bench = Bench(tmp_path, FakeEngine(), rhythm(4, eval=1, save=2), held_out=[])
    ended = bench.run()
    assert not [event for event in bench.engine.events if event.startswith("eval")]
    assert (ended.first_eval, ended.best_step, bench.checkpoints.steps()) == (None, None, [2, 4])


def test_the_best_evaluation_is_saved_at_once_and_outlives_the_others(tmp_path: Path):
    bench = Bench(tmp_path, FakeEngine([9, 5, 3, 4, 6, 3]), rhythm(5, eval=1, save=2), keep=1)
    ended = bench.run()
    assert (ended.best_step, ended.best_loss, ended.not_better) == (2, 3, 3)  # an equal loss is not better
    assert bench.checkpoints.steps() == [2, 5] and bench.weight(2) == 2


def test_where_the_best_is_not_wanted_it_is_neither_saved_nor_kept(tmp_path: Path):
    bench = Bench(tmp_path, FakeEngine([9, 3, 4, 5, 6]), rhythm(4, eval=1, save=None, keep_best=False), keep=1)
    bench.run()
    assert bench.checkpoints.steps() == [4] and bench.engine.events.count("save") == 1


def test_early_stop_ends_after_so_many_evaluations_without_a_better_one(tmp_path: Path):
    bench = Bench(tmp_path, FakeEngine([9, 3, 4, 2, 5, 6]), rhythm(50, eval=2, early_stop=2))
    ended = bench.run()
    assert (ended.step, ended.ended, ended.best_step) == (10, True, 6)
    assert bench.checkpoints.load(10).state["ended"] is True
    bench.position = Position(**{key: bench.checkpoints.load(10).state[key] for key in Position.__slots__})
    assert bench.run().step == 10  # one that has ended does not go on


def test_going_on_takes_the_steps_that_are_left_and_no_first_evaluation(tmp_path: Path):
    bench = Bench(tmp_path, FakeEngine([2]), rhythm(5))
    bench.position = Position(step=3, tokens=30, first_eval=9.0, best_step=2, best_loss=1.0)
    ended = bench.run()
    assert bench.engine.events == ["step 4", "step 5", "read 2", "eval 2", "save"]
    assert (ended.step, ended.tokens, ended.first_eval, ended.best_step, ended.not_better) == (5, 50, 9.0, 2, 1)


def test_lines_of_steps_that_are_taken_again_are_cut_off(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    bench = Bench(tmp_path, FakeEngine(), rhythm(3), held_out=[])
    bench.position = Position(step=1)
    bench.run()
    assert [(line["step"], line["loss"]) for line in bench.metrics()] == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]


# ---- Not finite --------------------------------------------------------------------------------------------------


def test_diverged_names_step_and_examples_and_saves_the_last_good_state(tmp_path: Path):
    bench = Bench(tmp_path, FakeEngine(bad_at=4), rhythm(9, log=6), held_out=[])
    with pytest.raises(DivergedError, match=r"step 4 is not finite: loss nan, gradient norm 0\.5") as raised:
        bench.run()
    assert "rows.jsonl:7, rows.jsonl:8" in raised.value.why and "step 3 are kept" in raised.value.why
    assert raised.value.exit_code == 5
    assert bench.checkpoints.steps() == [3] and bench.weight(3) == 3
    state = bench.checkpoints.load(3).state
    assert (state["step"], state["tokens"]) == (3, 30)
    assert [line["step"] for line in bench.metrics()] == [1, 2, 3]


def test_diverged_in_the_first_step_has_nothing_to_save(tmp_path: Path):
    bench = Bench(tmp_path, FakeEngine(bad_at=1), rhythm(3, log=1), held_out=[])
    with pytest.raises(DivergedError, match="step 1 is not finite"):
        bench.run()
    assert bench.checkpoints.steps() == [] and bench.metrics() == []


def test_diverged_right_after_a_checkpoint_leaves_it_as_it_is(tmp_path: Path):
    bench = Bench(tmp_path, FakeEngine(bad_at=3), rhythm(9, save=2, log=1), held_out=[])
    with pytest.raises(DivergedError):
        bench.run()
    assert bench.checkpoints.steps() == [2] and bench.engine.events.count("save") == 1


def test_many_examples_are_not_all_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FakeSource, "step", lambda self, k: [SimpleNamespace(where=f"a.jsonl:{i}") for i in range(20)])
    with pytest.raises(DivergedError) as raised:
        Bench(tmp_path, FakeEngine(bad_at=1), rhythm(1), held_out=[]).run()
    assert "a.jsonl:7 and 12 more" in raised.value.why and "a.jsonl:8" not in raised.value.why


@pytest.mark.parametrize("evals", [[math.inf], [3.0, math.nan]])
def test_a_held_out_loss_that_is_not_finite_ends_the_run(tmp_path: Path, evals):
    bench = Bench(tmp_path, FakeEngine(evals), rhythm(4, eval=2, save=2))
    with pytest.raises(DivergedError, match=f"held-out loss after step {0 if len(evals) == 1 else 2} is not finite"):
        bench.run()
    assert bench.checkpoints.steps() == []


# ---- Asked to stop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code", "why"), [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_ends_at_the_step_boundary_with_a_checkpoint(tmp_path: Path, number: int, code: int, why: str):
    bench = Bench(tmp_path, FakeEngine([9], on_step=lambda done: os.kill(os.getpid(), number) if done == 3 else None), rhythm(9, log=100))
    with pytest.raises(StoppedError, match="stopped after step 3 of 9, with a checkpoint saved") as raised, bench.stop.listening():
        bench.run()
    assert raised.value.exit_code == code and why in raised.value.why and "pantheraml resume" in raised.value.fix
    assert bench.checkpoints.steps() == [3] and bench.weight(3) == 3
    assert bench.engine.events[-2:] == ["read 3", "save"] and [line["step"] for line in bench.metrics()] == [0, 1, 2, 3]


def test_several_hosts_hear_a_signal_though_the_next_log_line_is_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Steps of 2 s: they ask each other after each second one, and not at each; the first one was as long as what came before it."""
    now, agreed = [0.0], list[int]()
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])

    def on_step(done: int) -> None:
        now[0] += 2.0
        if done == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    bench = Bench(tmp_path, FakeEngine([9], on_step=on_step), rhythm(99, log=100, eval=100, save=100))

    def most(number: int) -> int:  # another host is slower
        agreed.append(bench.position.step)
        return max(number, 2400)

    bench.stop = Stop(most)
    with pytest.raises(StoppedError, match="stopped after step 7 of 99"), bench.stop.listening():
        bench.run()
    assert agreed == [1, 3, 5, 7] and bench.checkpoints.steps() == [7]


def test_several_hosts_do_not_ask_each_other_after_short_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now, agreed = [0.0], list[int]()
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])

    def on_step(done: int) -> None:
        now[0] += 0.01

    bench = Bench(tmp_path, FakeEngine([9, 9], on_step=on_step), rhythm(99, log=50, eval=100, save=100))

    def most(number: int) -> int:
        agreed.append(bench.position.step)
        return number

    bench.stop = Stop(most)
    bench.run()
    assert agreed == [1, 50, 99]


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path: Path):
    bench = Bench(
        tmp_path, FakeEngine(on_step=lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == 2 else None), rhythm(2), held_out=[]
    )
    with bench.stop.listening():
        assert bench.run().step == 2
    assert bench.checkpoints.steps() == [2]


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path):
    def twice(done: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    bench = Bench(tmp_path, FakeEngine(on_step=twice), rhythm(9), held_out=[])
    with pytest.raises(KeyboardInterrupt), bench.stop.listening():
        bench.run()
    assert bench.checkpoints.steps() == []


def test_the_handlers_that_were_there_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RuntimeError), Stop().listening():
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_the_main_thread_nothing_is_listened_to():
    seen = []

    def elsewhere() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with Stop().listening() as stop:
            seen.append((signal.getsignal(signal.SIGTERM) is before, stop.signal))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(True, None)]
