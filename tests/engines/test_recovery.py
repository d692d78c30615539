"""A step that runs out of memory, really: in its second micro-batch, in forward or in backward, more is asked for than there is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.fakes import FakeBackend

from pantheraml.data.chat import Example
from pantheraml.data.pack import StepBatch, pack_step
from pantheraml.engines.engine import MicroTensors
from pantheraml.engines.torch_engine import TorchEngine, micro_tensors
from pantheraml.errors import DeviceError
from pantheraml.hardware.backend import open_backend
from pantheraml.hardware.device import Absent
from pantheraml.hardware.recovery import Recovery
from pantheraml.models.adapters import attach
from pantheraml.models.decoder import Decoder
from pantheraml.planning.levels import Levels
from pantheraml.planning.memory import Level
from pantheraml.recipe.types import LoRA, OptimSpec
from pantheraml.trainer.sft import sft_loss

NO_MACHINE = 1 << 52  # bytes


class GreedyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        torch.empty(NO_MACHINE, dtype=torch.uint8, device=grads[0].device)
        raise AssertionError


class Greedy:
    """The loss of `model`; asks for more memory than there is from the call `first` on, if it gets more than `most` rows.

    The rows of each call are in `rows`.
    """

    def __init__(self, model: Any, *, most: int, first: int = 1, where: str = "forward") -> None:
        self._loss, self._most, self._first, self._where = sft_loss(model), most, first, where
        self.rows: list[int] = []

    def __call__(self, model: Any, batch: MicroTensors) -> torch.Tensor:
        self.rows.append(len(batch.input_ids))
        loss = self._loss(model, batch)
        if len(self.rows) >= self._first and self.rows[-1] > self._most:
            if self._where == "backward":
                return GreedyBackward.apply(loss)
            torch.empty(NO_MACHINE, dtype=torch.uint8, device=loss.device)
        return loss


@pytest.fixture
def prepared(plan_of: Callable[..., Any]) -> Callable[..., tuple[TorchEngine, Recovery]]:
    def made(
        model: Any, loss: Any = None, *, retries: int = 6, optim: OptimSpec | None = None, **plan: Any
    ) -> tuple[TorchEngine, Recovery]:
        recovery = Recovery({"out of memory": retries}, announce=lambda text: None)
        engine = TorchEngine(FakeBackend("cpu"), recovery)
        # A large epsilon: without it Adam blows rounding up where a gradient is nearly zero.
        optim = optim or OptimSpec(eps=1e-3, clip_norm=0.0)
        engine.prepare(model, loss or sft_loss(model), optim, replace(plan_of(model), **plan), seed=1)
        return engine, recovery

    return made


def of_eight(examples: list[Example]) -> StepBatch:
    """Eight rows, in micro-batches of three, three and two."""
    return pack_step(examples, row_tokens=(32,), micro_tokens=96, packing=False, pad_id=0, trim=True)


def state(engine: TorchEngine) -> torch.Tensor:
    """Everything that a checkpoint holds, as one vector."""
    return torch.cat([tensor.flatten().double() for tensor in engine.state_dict().values()])


def apart(these: torch.Tensor, those: torch.Tensor) -> float:
    return float((these - those).norm() / those.norm())


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    ("most", "parts", "taken"),
    [
        # Three and three rows, the second of which is refused; then the same step in halves, or in single rows.
        (2, 2, [3, 3, 2, 1, 2, 1, 1, 1]),
        (1, 4, [3, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_the_same_step_is_taken_again_in_smaller_parts(
    where: str, most: int, parts: int, taken: list[int], small: Any, prepared: Any, examples: list[Example]
) -> None:
    step = of_eight(examples)
    enough, _ = prepared(small())
    wanted = enough.read([enough.step(step, k, 1e-2) for k in range(3)])

    model = small()
    loss = Greedy(model, most=most, first=2, where=where)
    engine, recovery = prepared(model, loss)
    values = engine.read([engine.step(step, 0, 1e-2)])
    assert loss.rows == taken and recovery.parts == parts
    loss.rows.clear()
    values += engine.read([engine.step(step, k, 1e-2) for k in (1, 2)])
    assert max(loss.rows) <= most and len(recovery.said) == parts // 2  # it stays with what fits
    for value, want in zip(values, wanted, strict=True):
        # float32, sums in another order. Had the gradients of the failed attempt stayed, the norm would be far off.
        assert value.loss == pytest.approx(want.loss, rel=1e-5) and value.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)
    assert apart(state(engine), state(enough)) < 1e-5


def test_without_need_nothing_is_divided(small: Any, prepared: Any, examples: list[Example]) -> None:
    """The reference is the step as torch computes it, without any engine: bit by bit the same."""
    model = small()
    by_hand = copy.deepcopy(model).train()
    step = of_eight(examples)
    engine, recovery = prepared(model)
    engine.step(step, 0, 0.0)
    loss = sft_loss(by_hand)
    for micro in step.micro:
        part = micro_tensors(micro.input_ids, micro.position_ids, micro.labels, torch.device("cpu"))
        (loss(by_hand, part) / step.label_count).backward()
    for (name, parameter), other in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name
    assert recovery.parts == 1 and not recovery.said


def test_each_row_is_taken_once_and_whole(small: Any, prepared: Any, examples: list[Example]) -> None:
    seen: list[MicroTensors] = []
    model = small()
    real = sft_loss(model)

    def loss(_: Any, batch: MicroTensors) -> torch.Tensor:
        seen.append(batch)
        return real(model, batch)

    engine, recovery = prepared(model, loss)
    step = of_eight(examples)
    for parts in (1, 2, 4, 8):
        recovery.restore(parts, [])
        seen.clear()
        engine.step(step, 0, 0.0)
        at = 0
        for micro in step.micro:
            before = at
            rows: dict[str, list[torch.Tensor]] = {name: [] for name in ("input_ids", "position_ids", "labels")}
            while sum(map(len, rows["input_ids"])) < len(micro.input_ids):
                for name, parts_of in rows.items():
                    parts_of.append(getattr(seen[at], name))
                at += 1
            for name, parts_of in rows.items():
                assert torch.equal(torch.cat(parts_of), torch.from_numpy(getattr(micro, name))), (parts, name)
            # What the host knows of the pieces is what it knows of the whole, each counted from its own first token.
            starts, longest, labelled, first = [], [], [], 0
            for piece in seen[before:at]:
                starts += (piece.starts[:-1] + first).tolist()
                longest.append(piece.longest)
                labelled += (piece.labelled + first).tolist()
                assert (piece.starts.dtype, piece.labelled.dtype) == (torch.int32, torch.int64)
                first += piece.input_ids.numel()
            assert [*starts, first] == micro.starts.tolist() and max(longest) == micro.longest
            assert labelled == micro.labelled.tolist()
        assert at == len(seen)


def test_a_row_that_does_not_fit_is_an_error_that_names_what_was_tried(small: Any, prepared: Any, examples: list[Example]) -> None:
    model = small()
    engine, recovery = prepared(model, Greedy(model, most=0, first=2), micro_tokens=96)
    before = state(engine)
    with pytest.raises(DeviceError, match="out of memory in step 7: ") as caught:
        engine.step(of_eight(examples), 6, 1e-2)
    assert recovery.parts == 4
    assert caught.value.why.startswith("a micro-batch of 96 tokens needs more, and still does in 4 parts; the plan had expected ")
    assert caught.value.fix == "set hardware.checkpointing to on"  # one row at once is as little as there is
    original = caught.value.__cause__
    assert "can't allocate memory" in str(original)
    assert len(original.__notes__) == 3 and original.__notes__[2].startswith("Out of memory in step 7, taken in 4 parts: ")
    assert torch.equal(state(engine), before)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_gradients_of_a_failed_step_are_let_go(where: str, small: Any, prepared: Any, examples: list[Example]) -> None:
    """The first micro-batch had left its own, which take as much memory as the weights."""
    model = small()
    engine, _ = prepared(model, Greedy(model, most=0, first=2, where=where), retries=0)
    with pytest.raises(DeviceError):
        engine.step(of_eight(examples), 0, 1e-2)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("retries", "parts"), [(0, 1), (1, 2)])
def test_it_is_tried_as_often_as_is_allowed(retries: int, parts: int, small: Any, prepared: Any, examples: list[Example]) -> None:
    model = small()
    engine, recovery = prepared(model, Greedy(model, most=1), retries=retries, micro_tokens=96)
    with pytest.raises(DeviceError) as caught:
        engine.step(of_eight(examples), 0, 1e-2)
    assert recovery.parts == parts and f"set batch.micro_tokens to {96 // 2 if parts == 1 else 32} " in caught.value.fix


def test_an_update_that_does_not_fit_is_not_taken_again(
    small: Any, prepared: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have changed half of the weights, and smaller micro-batches would not help it."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: torch.empty(NO_MACHINE, dtype=torch.uint8))
    model = small()
    loss = Greedy(model, most=99)
    engine, recovery = prepared(model, loss)
    with pytest.raises(DeviceError, match="out of memory in step 1: "):
        engine.step(of_eight(examples), 0, 1e-2)
    assert loss.rows == [3, 3, 2] and recovery.parts == 1


def test_another_error_is_not_taken_again(small: Any, prepared: Any, examples: list[Example]) -> None:
    calls: list[int] = []

    def broken(*_: Any) -> torch.Tensor:
        calls.append(1)
        raise RuntimeError("shapes do not match")

    engine, _ = prepared(small(), broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        engine.step(of_eight(examples), 0, 1e-2)
    assert len(calls) == 1


def test_dropout_of_a_run_that_goes_on_is_that_of_the_run_that_recovered(small: Any, prepared: Any, examples: list[Example]) -> None:
    def adapted() -> Any:
        return attach(small(), LoRA(rank=4, dropout=0.3), seed=5)

    step = of_eight(examples)
    model = adapted()
    whole, recovery = prepared(model, Greedy(model, most=2, first=2), optim=OptimSpec())
    whole.step(step, 0, 1e-2)
    saved = whole.state_dict()
    wanted = whole.read([whole.step(step, k, 1e-2) for k in (1, 2)])

    again, other = prepared(adapted(), optim=OptimSpec())
    again.load_state_dict(saved)
    other.restore(recovery.parts, recovery.said)
    assert again.read([again.step(step, k, 1e-2) for k in (1, 2)]) == wanted
    assert torch.equal(state(again), state(whole))


@pytest.mark.parametrize("most", [2, 1])
def test_an_evaluation_recovers_and_leaves_the_mode(most: int, small: Any, prepared: Any, examples: list[Example]) -> None:
    batches = [of_eight(examples), of_eight(examples[:4])]
    enough, _ = prepared(small())
    model = small().train()
    loss = Greedy(model, most=most, first=2)
    engine, recovery = prepared(model, loss)
    assert engine.evaluate(batches) == pytest.approx(enough.evaluate(batches), rel=1e-6)
    assert recovery.parts == {2: 2, 1: 4}[most] and model.training
    assert loss.rows[:2] == [3, 3] and loss.rows[2] == 2 and max(loss.rows[2:]) == 2
    assert recovery.said[0].startswith("Out of memory in an evaluation ")


def test_an_evaluation_that_never_fits_is_explained(small: Any, prepared: Any, examples: list[Example]) -> None:
    model = small()
    engine, _ = prepared(model, Greedy(model, most=0))
    with pytest.raises(DeviceError, match="out of memory in an evaluation: "):
        engine.evaluate([of_eight(examples)])


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_gpu_that_refuses_goes_on_in_smaller_parts(kind: str, where: str, small: Any, plan_of: Any, examples: list[Example]) -> None:
    backend = open_backend(kind)
    answer = backend.probe()
    if isinstance(answer, Absent):
        pytest.skip(answer.why)
    step, losses, norms = of_eight(examples), [], []
    for most in (99, 2):
        model = small().to(backend.torch_device(0))
        recovery = Recovery({"out of memory": 6}, device=lambda: (backend, 0), announce=lambda text: None)
        engine = TorchEngine(backend, recovery)
        engine.prepare(model, Greedy(model, most=most, first=2, where=where), OptimSpec(eps=1e-3, clip_norm=0.0), plan_of(model), seed=1)
        values = engine.read([engine.step(step, k, 1e-2) for k in range(3)])
        losses.append([value.loss for value in values])
        norms.append([value.grad_norm for value in values])
    assert recovery.parts == 2
    assert (recovery.history[0].free_before_bytes or 0) > 0 and (recovery.history[0].free_after_bytes or 0) > 0
    # float32, sums in another order, and on a GPU with other kernels for other shapes.
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and norms[1] == pytest.approx(norms[0], rel=1e-3)


class GreedyAt(Greedy):
    """The loss of `model` at the levels of its decoder; asks for more than there is while a layer keeps what `refused` names."""

    def __init__(self, model: Any, levels: Levels, refused: set[Level]) -> None:
        super().__init__(model, most=99)
        self.decoder = Decoder(model, levels, allowed=("keep", "cheap", "all", "tiled"))
        self._loss, self._refused = sft_loss(model, self.decoder), refused
        self.seen: list[Levels] = []

    def __call__(self, model: Any, batch: MicroTensors) -> torch.Tensor:
        self.seen.append(self.decoder.levels)
        self._first, self._most = 1, -1 if self._refused & set(self.decoder.levels) else 99
        return super().__call__(model, batch)


def test_layers_keep_less_before_rows_are_divided_and_no_bit_changes(small: Any, plan_of: Any, examples: list[Example]) -> None:
    ends = []
    for refused in (set[Level](), {"keep", "cheap"}):
        model = small()
        loss = GreedyAt(model, ("cheap", "keep"), refused)
        said: list[str] = []
        recovery = Recovery({"out of memory": 6}, announce=said.append)
        engine = TorchEngine(FakeBackend("cpu"), recovery)
        engine.prepare(model, loss, OptimSpec(), plan_of(model), seed=1, relief=loss.decoder.lower)
        engine.rehearse(of_eight(examples))
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
        values = engine.read([engine.step(of_eight(examples), k, 1e-2) for k in range(2)])
        ends.append((state(engine), values, loss.decoder.levels, said, recovery.parts))
    (plain, wanted, _, silent, _), (lowered, found, levels, said, parts) = ends
    assert torch.equal(plain, lowered) and wanted == found
    assert silent == [] and levels == ("all", "all") and parts == 1
    # Before the first step, at the largest shape: one level down, and another.
    assert len(said) == 2 and said[0].startswith("Out of memory in a rehearsal at the largest shape")
    assert "from here on with layers at 2 cheap" in said[0] and "from here on with layers at 2 all" in said[1]
