"""Recorded micro-batches: the same training as without, and the plain way wherever a recording would not be right.

What records here is a tape of the operators on the CPU. Like a CUDA graph it runs the same operators in the same memory again,
so that a value which the host has looked at, or a tensor from outside that was exchanged, stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.fakes import FakeBackend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pantheraml.data.chat import Example
from pantheraml.data.pack import IGNORED, LENGTHS_AN_OCTAVE, StepBatch, labelled_tokens, lengthened, next_length, pack_step, segments
from pantheraml.engines.engine import MicroTensors
from pantheraml.engines.graphs import MOST_SHAPES, Graphs, recurring
from pantheraml.engines.torch_engine import TorchEngine, micro_tensors
from pantheraml.models.adapters import attach
from pantheraml.models.decoder import Decoder
from pantheraml.planning.memory import Level
from pantheraml.recipe.types import LoRA, OptimSpec
from pantheraml.trainer.sft import sft_loss


class Tape(TorchDispatchMode):
    """Writes down each operator with the tensors it had; `play` runs them in the same tensors again."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(not isinstance(leaf, Tensor | None) for leaf in tree_leaves(out)):
            raise RuntimeError(f"{func} is not permitted while a recording is made")
        # A view is the same memory the second time.
        if not any(returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns):
            self.steps.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, out in self.steps:
            for mine, again in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if mine is not again:
                    mine.copy_(again)


def record(compute: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """A `Recorder`. Unlike a CUDA graph it computes at once as well."""
    with Tape() as tape:
        result = compute()
    return result, tape.play


def drawn_steps(count: int, *, rows: int = 4, longest: int = 30) -> list[StepBatch]:
    """Steps of examples with lengths and labels as they come, each laid out in a single row."""
    draw = np.random.default_rng(0)
    made = []
    for _ in range(count):
        lengths = draw.integers(2, longest, rows)
        examples = [Example(draw.integers(7, 263, n).astype(np.int32), np.arange(n) >= n // 2, "rows") for n in lengths]
        made.append(pack_step(examples, row_tokens=(128,), micro_tokens=128, packing=True, pad_id=0, trim=True))
    return made


def trained(
    small: Any,
    plan_of: Any,
    steps: list[StepBatch],
    graphs: Graphs | None,
    *,
    family: str = "llama",
    level: Level = "cheap",
    dtype: str = "float32",
    loss_of: Any = None,
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses, and what was learned."""
    model = attach(small(family), LoRA(rank=4), seed=0)
    plan = replace(plan_of(model), levels=(level, level), dtype=dtype)
    engine = TorchEngine(FakeBackend("cpu"), graphs=graphs)
    loss = sft_loss(model, Decoder(model, plan.levels))
    engine.prepare(model, loss if loss_of is None else loss_of(loss), OptimSpec(weight_decay=0.1), plan, seed=1)
    values = engine.read([engine.step(step, k, 1e-2) for k, step in enumerate(steps)])
    assert all(value.ok for value in values)
    return [value.loss for value in values], engine.state_dict()


def assert_same(found: tuple[list[float], dict[str, Tensor]], wanted: tuple[list[float], dict[str, Tensor]], *, within: float) -> None:
    np.testing.assert_allclose(found[0], wanted[0], rtol=within)
    for name, tensor in wanted[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=within, atol=within, msg=name)


@pytest.mark.parametrize("level", ["keep", "cheap", "all", "tiled"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
def test_a_run_over_mixed_lengths_is_the_same_recorded(family: str, level: Level, small: Any, plan_of: Any) -> None:
    steps, graphs = drawn_steps(24), Graphs(record)
    found = trained(small, plan_of, steps, graphs, family=family, level=level)
    assert graphs.trouble is None
    assert graphs.recorded >= 3 and graphs.replayed > graphs.recorded
    assert graphs.replayed + graphs.usual == sum(len(step.micro) for step in steps)
    assert_same(found, trained(small, plan_of, steps, None, family=family, level=level), within=2e-4)


def test_in_bfloat16_as_well(small: Any, plan_of: Any) -> None:
    steps, graphs = drawn_steps(2) * 4, Graphs(record)
    found = trained(small, plan_of, steps, graphs, dtype="bfloat16")
    assert graphs.trouble is None and graphs.replayed > 0
    assert_same(found, trained(small, plan_of, steps, None, dtype="bfloat16"), within=2e-2)


def test_a_shape_is_recorded_when_it_comes_again(small: Any, plan_of: Any) -> None:
    graphs = Graphs(record)
    trained(small, plan_of, drawn_steps(1) * 6, graphs)
    assert (graphs.usual, graphs.recorded, graphs.replayed) == (2, 1, 4)
    assert graphs.said == "recorded shapes: 1; replayed micro-batches: 4 of 6"


def test_a_value_that_the_host_decides_is_found_out(small: Any, plan_of: Any) -> None:
    """Each call has another factor, which a recording would hold fast."""
    steps = drawn_steps(1) * 6

    def growing(loss: Any) -> Any:
        calls = iter(range(1, 100))
        return lambda model, batch: loss(model, batch) * float(next(calls))

    graphs = Graphs(record)
    losses, _ = trained(small, plan_of, steps, graphs, loss_of=growing)
    assert graphs.trouble == "a recording came to another loss or other gradients" and graphs.replayed == 0
    assert (graphs.recorded, graphs.usual) == (1, 2) and "in the usual way" in graphs.said
    # The second step's loss is the one computed in the usual way.
    plain, _ = trained(small, plan_of, steps[:2], None, loss_of=growing)
    np.testing.assert_allclose(losses[:2], plain, rtol=1e-6)


def test_gradients_alone_are_looked_at_too(small: Any, plan_of: Any) -> None:
    def growing(loss: Any) -> Any:
        calls = iter(range(1, 100))

        def same_value(model: Any, batch: MicroTensors) -> Tensor:
            value, factor = loss(model, batch), float(next(calls))
            return value * factor - (value * (factor - 1)).detach()

        return same_value

    graphs = Graphs(record)
    trained(small, plan_of, drawn_steps(1) * 3, graphs, loss_of=growing)
    assert graphs.trouble == "a recording came to another loss or other gradients"


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing\nmore"), MemoryError("no room")])
def test_what_cannot_be_recorded_is_computed_in_the_usual_way(error: Exception, small: Any, plan_of: Any) -> None:
    asked = []

    def never(compute: Any) -> Any:
        asked.append(compute())  # gradients are half-way there when it fails
        raise error

    steps, graphs = drawn_steps(2) * 3, Graphs(never)
    found = trained(small, plan_of, steps, graphs)
    assert len(asked) == 1 and graphs.trouble == str(error).splitlines()[0] and graphs.recorded == 0
    assert_same(found, trained(small, plan_of, steps, None), within=2e-4)


def test_a_step_that_fails_leaves_no_recording_behind(small: Any, plan_of: Any) -> None:
    """Its gradients are let go of, so a recording would write into memory that is somebody else's."""
    model = attach(small("llama"), LoRA(rank=4), seed=0)
    plan, graphs, fail = replace(plan_of(model), levels=("cheap", "cheap")), Graphs(record), [False]
    engine, loss = TorchEngine(FakeBackend("cpu"), graphs=graphs), sft_loss(model, Decoder(model))

    def failing(model: Any, batch: MicroTensors) -> Tensor:
        if fail[0]:
            raise RuntimeError("the device is gone")
        return loss(model, batch)

    engine.prepare(model, failing, OptimSpec(), plan, seed=1)
    (one,), (other,) = drawn_steps(1), drawn_steps(1, rows=2)
    for k in range(3):
        engine.step(one, k, 1e-2)
    assert graphs.replayed == len(one.micro) and graphs._recordings
    fail[0] = True
    with pytest.raises(RuntimeError, match="gone"):
        engine.step(other, 3, 1e-2)
    assert not graphs._recordings
    fail[0] = False
    engine.step(one, 4, 1e-2)
    assert graphs.replayed == len(one.micro)


def test_there_are_no_more_recordings_than_allowed(small: Any, plan_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pantheraml.engines.graphs.MOST_SHAPES", 1)
    assert MOST_SHAPES > 1
    graphs = Graphs(record)
    trained(small, plan_of, drawn_steps(4) * 3, graphs)
    assert graphs.recorded == 1 and graphs.trouble is None


@pytest.mark.parametrize("number", [*range(1, 40), 1000, 1024, 1025, 8191])
def test_lengths_recur(number: int) -> None:
    length = next_length(number)
    assert number <= length <= number + max(0, number - 1) / LENGTHS_AN_OCTAVE and next_length(length) == length


def test_there_are_few_lengths() -> None:
    assert len({next_length(number) for number in range(1025, 2049)}) == LENGTHS_AN_OCTAVE


def test_a_longer_row_has_the_same_examples_and_one_without_labels() -> None:
    (micro,) = drawn_steps(1)[0].micro
    ids, positions, labels = (array[:, :41] for array in (micro.input_ids, micro.position_ids, micro.labels))
    longer = lengthened(ids, positions, labels, most=128)
    assert lengthened(ids, positions, labels, most=42)[0].shape == (1, 42)
    assert lengthened(ids, positions, labels, most=8)[0] is ids
    assert [array.shape for array in longer] == [(1, 44)] * 3 and [array.dtype for array in longer] == [np.int64] * 3
    for given, made in zip((ids, positions, labels), longer, strict=True):
        np.testing.assert_array_equal(made[:, :41], given)
    starts, _ = segments(positions)
    np.testing.assert_array_equal(segments(longer[1])[0], [*starts, 44])
    np.testing.assert_array_equal(labelled_tokens(longer[2]), labelled_tokens(labels))
    two = tuple(np.repeat(array, 2, axis=0) for array in (ids, positions, labels))
    assert all(made is given for made, given in zip(lengthened(*two, most=128), two, strict=True))


def test_what_is_added_to_a_batch_counts_for_nothing() -> None:
    (micro,) = drawn_steps(1)[0].micro
    batch = micro_tensors(*lengthened(micro.input_ids, micro.position_ids, micro.labels, most=128), torch.device("cpu"))
    more = recurring(batch)
    tokens, examples, labelled = batch.input_ids.numel(), len(batch.starts) - 1, len(batch.labelled)
    assert more.starts.dtype == torch.int32 and more.labelled.dtype == torch.int64
    assert more.starts[: examples + 1].equal(batch.starts) and more.starts[examples:].eq(tokens).all()
    assert more.labelled[:labelled].equal(batch.labelled)
    assert batch.labels.flatten()[more.labelled[labelled:]].eq(IGNORED).all() and len(more.labelled) == next_length(labelled)
    assert batch.longest <= more.longest <= tokens


def test_what_is_stopped_records_nothing_more_and_computes_no_padding(small: Any, plan_of: Any) -> None:
    graphs, lengths = Graphs(record), []
    steps = drawn_steps(1) * 4

    def watched(loss: Any) -> Any:
        return lambda model, batch: lengths.append(batch.input_ids.shape[1]) or loss(model, batch)

    assert graphs.stop("memory ran out") == "without recorded steps" and graphs.stop("again") is None
    found = trained(small, plan_of, steps, graphs, loss_of=watched)
    assert graphs.trouble == "memory ran out" and graphs.recorded == graphs.replayed == 0
    assert set(lengths) == {micro.input_ids.shape[1] for micro in steps[0].micro}
    assert found[0] == trained(small, plan_of, steps, None)[0]
