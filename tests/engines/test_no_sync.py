"""No step waits for the device: nothing in it asks for a value, or makes a tensor whose size depends on values.

On a GPU each of these would stop the host until all that it has asked for is computed. Here it is an error, on the CPU,
where the same calls are made. What runs inside of a kernel of the table is the kernel's matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.fakes import FakeBackend
from torch.utils._python_dispatch import TorchDispatchMode

from pantheraml.data.chat import Example
from pantheraml.data.pack import StepBatch, pack_step
from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.models.adapters import attach
from pantheraml.models.decoder import Decoder, decodes
from pantheraml.planning.memory import Level
from pantheraml.recipe.types import LoRA, OptimSpec
from pantheraml.trainer.sft import sft_loss

# Operators that bring a value to the host, or need one to know the size of their result.
WAITING = frozenset(
    {
        *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere"),
        *("masked_select", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave"),
    }
)
# What reads memory without an operator.
READING = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
# transformers' own forward looks at the positions, once for each mask, to leave out a mask that no row needs. A mask of four
# dimensions would keep it from that, but holds neither for windows nor for every kind of attention. The kernels need no mask.
STOCK = "find_packed_sequence_indices"


class Waits(AssertionError):
    """A step would have waited."""


class Never(TorchDispatchMode):
    """Args: except_in: the name of a function that may wait, and how often it did."""

    def __init__(self, except_in: str | None) -> None:
        super().__init__()
        self._except_in, self.waited = except_in, 0

    def asked(self, what: str) -> None:
        frames = inspect.stack(context=0)
        if self._except_in is None or all(frame.function != self._except_in for frame in frames):
            raise Waits(what)
        self.waited += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)
        if (name in WAITING and kwargs is not None and kwargs.get("output_size") is None) or by_mask:
            self.asked(func.name() + (" by a mask" if by_mask else ""))
        return func(*args, **(kwargs or {}))


@contextmanager
def never_waiting(except_in: str | None = None) -> Iterator[Never]:
    """Within the block, to wait is an error."""
    never = Never(except_in)

    def looked_at(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def look(*args: Any, **options: Any) -> Any:
            never.asked(f"Tensor.{name}")
            return real(*args, **options)

        return look

    with pytest.MonkeyPatch.context() as patch, never:
        for name in READING:
            patch.setattr(torch.Tensor, name, looked_at(name, getattr(torch.Tensor, name)))
        yield never


@pytest.fixture
def step(examples: list[Example]) -> StepBatch:
    """Packed rows with padding, in two micro-batches, the last with an empty row."""
    made = pack_step(examples, row_tokens=(48,), micro_tokens=96, packing=True, pad_id=0, trim=False)
    assert len(made.micro) == 2 and any(len(micro.starts) > 3 for micro in made.micro)
    return made


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: t.tolist(),
        lambda t: bool(t.sum() > 0),
        lambda t: float(t[0]),
        lambda t: t[t > 1],
        lambda t: t.nonzero(),
        lambda t: torch.where(t > 1),
        lambda t: torch.equal(t, t),
        lambda t: t.masked_select(t > 1),
        lambda t: t.unique(),
        lambda t: t.long().repeat_interleave(t.long()),
        lambda t: t.cpu(),
        lambda t: t.index_put_((t > 1,), t[:2]),
    ],
)
def test_the_test_finds_what_waits(wait: Callable[[torch.Tensor], Any]) -> None:
    values = torch.arange(4.0)
    with pytest.raises(Waits), never_waiting():
        wait(values)
    with never_waiting():
        assert values[1:].add(1).where(values[1:] > 1, 0.0) is not values


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("adapter", ["lora", "dropout", "full"])
@pytest.mark.parametrize("level", ["keep", "cheap", "all", "tiled"])
def test_a_step_does_not_wait(family: str, adapter: str, level: Level, small: Any, plan_of: Any, step: StepBatch) -> None:
    model = small(family)
    assert decodes(model) is None
    assert waits_of(model, adapter, level, plan_of, step, except_in=None) == 0


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_by_the_models_own_forward_it_waits_for_its_mask_alone(adapter: str, small: Any, plan_of: Any, step: StepBatch) -> None:
    model = small("falcon_h1")
    assert decodes(model) is not None
    # Two operators and a method for each mask of each micro-batch and step.
    assert 0 < waits_of(model, adapter, "keep", plan_of, step, except_in=STOCK) <= 3 * 2 * 2


def waits_of(model: Any, adapter: str, level: Level, plan_of: Any, step: StepBatch, *, except_in: str | None) -> int:
    """How often two steps waited, the first of a run and one like those after it."""
    if adapter != "full":
        model = attach(model, LoRA(rank=4, dropout=0.1 if adapter == "dropout" else 0.0), seed=0)
    engine = TorchEngine(FakeBackend("cpu"))
    plan = replace(plan_of(model), levels=(level, level))
    decoder = Decoder(model, plan.levels) if decodes(model) is None else None
    engine.prepare(model, sft_loss(model, decoder), OptimSpec(weight_decay=0.1, clip_norm=0.5), plan, seed=1)
    with never_waiting(except_in) as never:
        metrics = [engine.step(step, k, 1e-2) for k in range(2)]
    assert all(value.ok for value in engine.read(metrics))
    return never.waited


@pytest.mark.parametrize("pinned", [False, True])
def test_a_batch_is_copied_from_memory_for_which_the_host_need_not_wait(
    pinned: bool, small: Any, plan_of: Any, step: StepBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: locked.append(tuple(tensor.shape)) or tensor)
    backend = FakeBackend("cpu")
    backend.pinned_memory = pinned
    model = small()
    engine = TorchEngine(backend)
    engine.prepare(model, sft_loss(model), OptimSpec(), plan_of(model), seed=1)
    engine.step(step, 0, 1e-2)
    shapes = [shape for micro in step.micro for shape in (*[micro.input_ids.shape] * 3, micro.starts.shape, micro.labelled.shape)]
    assert locked == (shapes if pinned else [])
