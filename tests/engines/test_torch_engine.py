"""One step against its definition, and what must not change it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.fakes import FakeBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pantheraml.data.chat import Example
from pantheraml.data.pack import MicroBatch, StepBatch, pack_step
from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.errors import DeviceError, PantheraError
from pantheraml.hardware.cpu import CpuBackend
from pantheraml.models.adapters import attach
from pantheraml.models.decoder import Decoder
from pantheraml.planning.plan import Plan
from pantheraml.recipe.types import LoRA, OptimSpec
from pantheraml.trainer.sft import sft_loss

USUAL = OptimSpec()
Prepared = Callable[..., TorchEngine]
SHAPE: dict[str, Any] = {"row_tokens": (32,), "micro_tokens": 64, "packing": True, "pad_id": 0, "trim": False}


def batch(examples: list[Example], **shape: Any) -> StepBatch:
    return pack_step(examples, **{**SHAPE, **shape})


@pytest.fixture(scope="module")
def prepared(plan_of: Callable[..., Plan]) -> Prepared:
    """An engine with this model in it."""

    def engine(model: Any, optim: OptimSpec | None = USUAL, *, backend: Any = None, seed: int = 1, **changes: Any) -> TorchEngine:
        made = TorchEngine(backend or CpuBackend())
        plan = replace(plan_of(model), **changes)
        made.prepare(model, sft_loss(model, Decoder(model, plan.levels)), optim, plan, seed=seed)
        return made

    return engine


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_bits(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


def grads(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def difference(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> float:
    """Over all tensors at once, relative, in the 2-norm."""
    assert these.keys() == those.keys()
    apart = sum((these[name] - those[name]).double().square().sum() for name in these)
    return float((apart / sum(those[name].double().square().sum() for name in those)).sqrt())


# What may not change a step: how its examples are laid out. Each is (shape of the batch, plan).
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unpacked": ({"packing": False}, {}),
    "trimmed": ({"packing": False, "trim": True}, {}),
    "one at a time": ({"packing": False, "micro_tokens": 32}, {}),
    "all at once": ({"packing": False, "micro_tokens": 256}, {}),
    "packed one row at a time": ({"micro_tokens": 32}, {}),
    "longer rows": ({"row_tokens": (64,), "micro_tokens": 128}, {}),
    "another pad token": ({"pad_id": 77}, {}),
    "cheap": ({}, {"levels": ("cheap", "cheap")}),
    "checkpointing": ({}, {"levels": ("all", "all")}),
    "tiled": ({}, {"levels": ("tiled", "tiled")}),
    "mixed": ({}, {"levels": ("all", "keep")}),
}


@pytest.fixture(scope="module")
def usual(small: Any, prepared: Prepared, examples: list[Example]) -> Any:
    """Loss, gradients and new weights of one step, packed into rows of 32, two at once."""
    return stepped(small(), prepared, batch(examples))


def stepped(model: Any, prepared: Prepared, step: StepBatch, **changes: Any) -> Any:
    # No clipping, so that gradients are compared as they are; a large rate, so that a wrong one shows.
    engine = prepared(model, OptimSpec(clip_norm=0.0), **changes)
    (values,) = engine.read([engine.step(step, 0, 1e-2)])
    return values, grads(model), weights(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_does_not_depend_on_the_layout(layout: str, usual: Any, small: Any, prepared: Prepared, examples: list[Example]) -> None:
    shape, changes = LAYOUTS[layout]
    step = batch(examples, **shape)
    assert len(step.micro) == {"one at a time": 8, "all at once": 1}.get(layout, len(step.micro))
    values, gradients, _ = stepped(small(), prepared, step, **changes)
    assert values.loss == pytest.approx(usual[0].loss, rel=1e-6)
    assert values.grad_norm == pytest.approx(usual[0].grad_norm, rel=1e-5)
    # float32, sums in another order. Weights are not compared after Adam's first step: it divides each gradient by
    # its own size, so that one of 1e-9 moves its weight as far as one of 1.
    assert difference(gradients, usual[1]) < 1e-5


def test_where_each_shape_is_compiled_all_micro_batches_have_one(
    usual: Any, small: Any, plan_of: Callable[..., Plan], examples: list[Example]
) -> None:
    model, step, shapes = small(), batch(examples), set[Any]()
    assert len({each.label_count for each in step.micro}) > 1
    loss = sft_loss(model, static=True)

    def watched(of: Any, micro: Any) -> torch.Tensor:
        shapes.add((micro.input_ids.shape, micro.labelled.shape))
        return loss(of, micro)

    engine = TorchEngine(FakeBackend("cpu", static_shapes=True))
    engine.prepare(model, watched, OptimSpec(clip_norm=0.0), plan_of(model), seed=1)
    (values,) = engine.read([engine.step(step, 0, 1e-2)])
    assert shapes == {((2, 32), (64,))}
    assert values.loss == pytest.approx(usual[0].loss, rel=1e-6)
    assert difference(grads(model), usual[1]) < 1e-5  # as in another layout


def test_a_step_does_not_depend_on_the_order_of_its_examples(usual: Any, small: Any, prepared: Prepared, examples: list[Example]) -> None:
    values, gradients, _ = stepped(small(), prepared, batch(examples[::-1]))
    assert values.loss == pytest.approx(usual[0].loss, rel=1e-6)
    assert difference(gradients, usual[1]) < 1e-5


def test_padding_may_stand_on_the_left(usual: Any, small: Any, prepared: Prepared, examples: list[Example]) -> None:
    """Not our layout, but nothing in a step may depend on where in its row an example begins."""
    micro = []
    for example in examples:
        left = 32 - len(example.tokens)
        padded = batch([example], packing=False, micro_tokens=32).micro[0]
        positions = np.concatenate([np.arange(left), np.arange(32 - left)])[None]
        micro.append(
            MicroBatch(np.roll(padded.input_ids, left), positions, np.roll(padded.labels, left), padded.real_tokens, padded.label_count)
        )
    step = StepBatch(tuple(micro), sum(each.label_count for each in micro), sum(each.real_tokens for each in micro), ())
    values, gradients, _ = stepped(small(), prepared, step)
    assert values.loss == pytest.approx(usual[0].loss, rel=1e-6)
    assert difference(gradients, usual[1]) < 1e-5


@pytest.mark.parametrize("layout", ["unpacked", "one at a time", "checkpointing", "tiled"])
def test_ten_steps_in_another_layout_end_at_the_same_place(layout: str, small: Any, prepared: Prepared, examples: list[Example]) -> None:
    shape, changes = LAYOUTS[layout]
    ends, losses = [], []
    for options, plan in (({}, {}), (shape, changes)):
        model = small()
        # A large epsilon: without it Adam blows rounding up where a gradient is nearly zero.
        engine = prepared(model, OptimSpec(eps=1e-3), **plan)
        steps = [batch(examples[k % 4 : k % 4 + 5], **options) for k in range(10)]
        losses.append([value.loss for value in engine.read([engine.step(step, k, 3e-3) for k, step in enumerate(steps)])])
        ends.append(weights(model))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert difference(*ends) < 1e-4
    assert losses[0][-1] < losses[0][0]


def test_checkpointing_recomputes_with_the_same_dropout(small: Any, prepared: Prepared, examples: list[Example]) -> None:
    found = []
    for level in ("keep", "all"):
        model = attach(small(), LoRA(rank=4, dropout=0.5), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.05)
        found.append(stepped(model, prepared, batch(examples), levels=(level, level)))
    assert found[0][0].loss == found[1][0].loss
    assert difference(found[0][1], found[1][1]) < 1e-6


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_steps_are_adamw_by_hand_in_float64(clip_norm: float, small: Any, prepared: Prepared, examples: list[Example]) -> None:
    lrs, optim = (1e-2, 3e-3, 2e-2), OptimSpec(weight_decay=0.3, beta1=0.8, beta2=0.95, eps=1e-4, clip_norm=clip_norm)
    model = small("qwen2")  # it has biases
    exact = copy.deepcopy(model).double()
    engine = prepared(model, optim)
    names = dict(exact.named_parameters())
    theirs = torch.optim.AdamW(
        [
            {"params": [p for name, p in names.items() if "norm" not in name and "bias" not in name], "weight_decay": 0.3},
            {"params": [p for name, p in names.items() if "norm" in name or "bias" in name], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.95),
        eps=1e-4,
        foreach=False,
    )
    for k, lr in enumerate(lrs):
        step = examples[2 * k : 2 * k + 3]
        (values,) = engine.read([engine.step(batch(step), k, lr)])
        theirs.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for example in step:
            tokens, learned = torch.tensor(example.tokens, dtype=torch.int64), torch.tensor(example.loss)
            logits = exact(input_ids=tokens[None], use_cache=False).logits[0]
            loss = loss + F.cross_entropy(logits[:-1][learned[1:]], tokens[1:][learned[1:]], reduction="sum")
        loss = loss / sum(int(example.loss.sum()) for example in step)
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in names.values()))
        if clip_norm and norm > clip_norm:
            for parameter in names.values():
                parameter.grad.mul_(clip_norm / norm)
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        # float32 against float64: forward, backward and update, some thousand roundings of 2^-24.
        assert values.loss == pytest.approx(loss.item(), rel=1e-5)
        assert values.grad_norm == pytest.approx(norm, rel=1e-4)
    moved = {
        name: (parameter.double() - before)
        for (name, parameter), before in zip(model.named_parameters(), small("qwen2").double().parameters(), strict=True)
    }
    wanted = {
        name: (parameter - before) for (name, parameter), before in zip(names.items(), small("qwen2").double().parameters(), strict=True)
    }
    # How far each tensor moved, not where it stands: a missing decay would hide in the latter.
    for name in names:
        assert difference({name: moved[name].detach()}, {name: wanted[name].detach()}) < 1e-3, name


def test_a_parameter_without_gradient_is_an_error_that_names_it(small: Any, prepared: Prepared, examples: list[Example]) -> None:
    model = small()
    model.register_parameter("forgotten", torch.nn.Parameter(torch.ones(2)))
    before = weights(model)
    engine = prepared(model)
    with pytest.raises(PantheraError) as caught:
        engine.step(batch(examples), 0, 1e-2)
    assert "1 of" in caught.value.what and "got no gradient: forgotten" in caught.value.what
    assert "would not train what it says" in caught.value.why and "requires_grad_(False)" in caught.value.fix
    assert same_bits(weights(model), before)


def test_a_model_without_trainable_parameters_is_refused(small: Any, prepared: Prepared) -> None:
    with pytest.raises(ValueError, match="no parameter of the model trains"):
        prepared(small().requires_grad_(False))


@pytest.mark.parametrize("first", [True, False], ids=["in the first step", "later"])
def test_what_is_not_finite_updates_nothing_then_or_later(first: bool, small: Any, prepared: Prepared, examples: list[Example]) -> None:
    model = small()
    engine = prepared(model, OptimSpec(weight_decay=0.1))
    if not first:
        for k in range(2):
            engine.step(batch(examples), k, 1e-2)
    embedding = model.get_input_embeddings().weight
    token = int(examples[0].tokens[0])
    sound = embedding.detach()[token].clone()
    with torch.no_grad():
        embedding[token] = float("inf")
    before = engine.state_dict()
    broken = engine.step(batch(examples), 2, 1e-2)
    after_broken = engine.state_dict()
    with torch.no_grad():
        embedding[token] = sound  # the cause is gone, but the step after it was not planned for
    mended = engine.step(batch(examples), 3, 1e-2)
    values = engine.read([broken, mended])
    assert [value.ok for value in values] == [False, True]
    assert not math.isfinite(values[0].loss) and math.isfinite(values[1].loss)
    with torch.no_grad():
        embedding[token] = float("inf")
    for state in (after_broken, engine.state_dict()):
        for name, tensor in state.items():
            # In the first step the moments are made, and stay zero.
            assert torch.equal(tensor, before.get(name, torch.zeros_like(tensor))), name


def adapted(small: Any, **options: Any) -> Any:
    return attach(small(), LoRA(rank=4, **options), seed=5)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_restored_run_goes_on_bit_by_bit(dropout: float, small: Any, prepared: Prepared, examples: list[Example]) -> None:
    def go(engine: TorchEngine, steps: range) -> list[float]:
        return [value.loss for value in engine.read([engine.step(batch(examples[k % 3 : k % 3 + 5]), k, 1e-2) for k in steps])]

    whole = prepared(adapted(small, dropout=dropout), OptimSpec(weight_decay=0.1))
    go(whole, range(2))
    saved = whole.state_dict()
    copied = {name: tensor.clone() for name, tensor in saved.items()}
    torch.manual_seed(99)  # what happens between two steps is nobody's business
    wanted = go(whole, range(2, 5))
    assert same_bits(saved, copied)  # a copy, not a view

    model = adapted(small, dropout=dropout)
    again = prepared(model, OptimSpec(weight_decay=0.1))
    go(again, range(1))  # it may have moved already
    again.load_state_dict(saved)
    assert same_bits(again.state_dict(), saved)
    assert go(again, range(2, 5)) == wanted
    assert same_bits(again.state_dict(), whole.state_dict())
    if dropout:
        other = prepared(adapted(small, dropout=dropout), OptimSpec(weight_decay=0.1), seed=2)
        other.load_state_dict(saved)
        assert go(other, range(2, 5)) != wanted  # dropout is drawn from the run's seed


def test_each_step_draws_its_own_dropout(small: Any, prepared: Prepared, examples: list[Example]) -> None:
    model = adapted(small, dropout=0.5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.05)
    engine = prepared(model)
    # Nothing moves at a rate of 0: only the number of the step differs.
    first, second, again = (value.loss for value in engine.read([engine.step(batch(examples), k, 0.0) for k in (0, 1, 0)]))
    assert first == again != second


def test_state_names_and_shapes(small: Any, prepared: Prepared, examples: list[Example]) -> None:
    model = adapted(small)
    engine = prepared(model)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if "lora_" in name}
    assert {name: tuple(tensor.shape) for name, tensor in engine.state_dict().items()} == {f"weight/{n}": s for n, s in trained.items()}
    engine.step(batch(examples), 0, 1e-2)
    kinds = {"weight": None, "exp_avg": None, "exp_avg_sq": None, "step": ()}
    assert {name: tuple(tensor.shape) for name, tensor in engine.state_dict().items()} == {
        f"{kind}/{name}": shape if fixed is None else fixed for kind, fixed in kinds.items() for name, shape in trained.items()
    }


def test_a_state_from_before_the_first_step_begins_anew(small: Any, prepared: Prepared, examples: list[Example]) -> None:
    engine = prepared(adapted(small))
    fresh = engine.state_dict()
    first = engine.read([engine.step(batch(examples), 0, 1e-2)])
    ended = engine.state_dict()
    engine.load_state_dict(fresh)
    assert same_bits(engine.state_dict(), fresh)
    assert engine.read([engine.step(batch(examples), 0, 1e-2)]) == first
    assert same_bits(engine.state_dict(), ended)


def damaged(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    last = sorted(name for name in state if name.startswith("weight/" if "weight" in how else "exp_avg/"))[-1]
    rest = {name: tensor for name, tensor in state.items() if name != last}
    match how.split()[0]:
        case "missing":
            return rest
        case "renamed":
            return {**rest, last + "x": state[last]}
        case "unknown":
            return {**state, last + "x": state[last]}
        case _:
            return {**state, last: torch.zeros(*state[last].shape, 2)}


@pytest.mark.parametrize(
    "how", ["missing weight", "renamed weight", "unknown weight", "reshaped weight", "missing moment", "unknown moment", "reshaped moment"]
)
def test_a_state_that_does_not_fit_is_refused_whole(how: str, small: Any, prepared: Prepared, examples: list[Example]) -> None:
    engine = prepared(adapted(small))
    engine.step(batch(examples), 0, 1e-2)
    saved = engine.state_dict()
    engine.step(batch(examples), 1, 1e-2)
    now = engine.state_dict()
    wrong = damaged(saved, how)
    with pytest.raises(ValueError, match=r"does not fit this model: .*lora_"):
        engine.load_state_dict(wrong)
    if how.endswith("weight"):
        with pytest.raises(ValueError, match=r"does not fit this model: .*lora_"):
            engine.load_weights(wrong)
    assert same_bits(engine.state_dict(), now)  # nor half of it


def test_load_weights_leaves_the_moments(small: Any, prepared: Prepared, examples: list[Example]) -> None:
    engine = prepared(adapted(small))
    engine.step(batch(examples), 0, 1e-2)
    first = engine.state_dict()
    engine.step(batch(examples), 1, 1e-2)
    second = engine.state_dict()
    engine.load_weights(first)
    wanted = {name: (first if name.startswith("weight/") else second)[name] for name in second}
    assert same_bits(engine.state_dict(), wanted)


class Products(TorchDispatchMode):
    """How many matrix products there were of each dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().partition(".")[0] in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_"):
            self.seen[args[-1].dtype] += 1
        return result


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_bfloat16_is_for_the_products_not_for_what_trains(adapter: bool, small: Any, prepared: Prepared, examples: list[Example]) -> None:
    model = small().bfloat16()
    if adapter:
        model = attach(model, LoRA(rank=4), seed=0)
    engine = prepared(model, dtype="bfloat16")
    with Products() as products:
        (values,) = engine.read([engine.step(batch(examples), 0, 1e-5)])
    exact = small() if not adapter else attach(small(), LoRA(rank=4), seed=0)
    (wanted,) = prepared(exact).read([prepared(exact).step(batch(examples), 0, 1e-5)])
    # bfloat16 keeps 8 bits; the mean of some fifty losses is better than each.
    assert values.loss == pytest.approx(wanted.loss, rel=2e-2)
    assert values.grad_norm == pytest.approx(wanted.grad_norm, rel=5e-2)
    assert set(products.seen) == {torch.bfloat16}
    for parameter in model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    assert all(tensor.dtype == torch.float32 for tensor in engine.state_dict().values())


def test_a_batch_without_labels_changes_nothing_at_first(small: Any, prepared: Prepared, examples: list[Example]) -> None:
    silent = [Example(each.tokens, np.zeros(len(each.tokens), bool), each.where) for each in examples]
    model = small()
    before = weights(model)
    engine = prepared(model)
    (values,) = engine.read([engine.step(batch(silent), 0, 1e-2)])
    assert (values.loss, values.grad_norm, values.ok) == (0.0, 0.0, True)
    assert same_bits(weights(model), before)


def out_of_memory(*_: Any) -> torch.Tensor:
    raise MemoryError("DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    ("plan", "fix"),
    [
        ({"micro_tokens": 128}, "set batch.micro_tokens to 64 (the result stays the same)"),
        ({"micro_tokens": 64}, "set batch.micro_tokens to 32 (the result stays the same)"),
        ({"micro_tokens": 48}, "set hardware.checkpointing to on"),  # one row of 32 either way
        ({"micro_tokens": 48, "row_tokens": (16, 32)}, "set batch.micro_tokens to 32 (the result stays the same)"),
        ({"micro_tokens": 32, "levels": ("all", "all")}, "set model.max_tokens below 32, or choose a smaller model"),
    ],
)
def test_out_of_memory_says_what_to_change(plan: dict[str, Any], fix: str, small: Any, plan_of: Any, examples: list[Example]) -> None:
    model = small()
    engine = TorchEngine(FakeBackend("cpu", memory_bytes=3 << 30))
    engine.prepare(model, out_of_memory, OptimSpec(), replace(plan_of(model), **plan), seed=1)
    with pytest.raises(DeviceError) as caught:
        engine.step(batch(examples), 6, 1e-2)
    assert caught.value.what == "out of memory in step 7: 0 KiB in use, 3.0 GiB free on cpu:0"
    assert f"a micro-batch of {plan['micro_tokens']} tokens needs more" in caught.value.why
    assert caught.value.fix == fix
    with pytest.raises(DeviceError, match="out of memory in an evaluation"):
        engine.evaluate([batch(examples)])


def test_out_of_memory_in_the_update_is_explained_too(
    small: Any, prepared: Prepared, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first update makes both moments: twice the memory of what trains.
    monkeypatch.setattr(torch.optim.AdamW, "step", out_of_memory)
    with pytest.raises(DeviceError, match="out of memory in step 1"):
        prepared(small(), backend=FakeBackend("cpu")).step(batch(examples), 0, 1e-2)


def test_another_error_stays_what_it_is(small: Any, plan_of: Any, examples: list[Example]) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    model = small()
    engine = TorchEngine(FakeBackend("cpu"))
    engine.prepare(model, broken, OptimSpec(), plan_of(model), seed=1)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        engine.step(batch(examples), 0, 1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_is_the_mean_by_hand_and_leaves_the_mode(training: bool, small: Any, prepared: Prepared, examples: list[Example]) -> None:
    model = adapted(small, dropout=0.5).train(training)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.05)
    engine = prepared(model, None)
    state = torch.get_rng_state()
    found = engine.evaluate([batch(examples[:3]), batch(examples[3:], packing=False)])
    assert model.training == training and torch.equal(torch.get_rng_state(), state)
    model.eval()
    losses = []
    for example in examples:
        tokens, learned = torch.tensor(example.tokens, dtype=torch.int64), torch.tensor(example.loss)
        with torch.no_grad():
            logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        losses += F.cross_entropy(logits[:-1], tokens[1:], reduction="none")[learned[1:]].tolist()
    # Over labels, not over batches or examples.
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluating_nothing_is_zero_and_an_error_leaves_the_mode(small: Any, plan_of: Any, examples: list[Example]) -> None:
    model = small().train()
    engine = TorchEngine(FakeBackend("cpu"))
    engine.prepare(model, out_of_memory, None, plan_of(model), seed=1)
    assert engine.evaluate([]) == 0.0
    with pytest.raises(DeviceError):
        engine.evaluate([batch(examples)])
    assert model.training
    assert engine.read([]) == []
