"""The flat parameters: one update for all of them, and a model that is to others what it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakes import FakeBackend
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pantheraml.data.chat import Example
from pantheraml.data.pack import StepBatch, pack_step
from pantheraml.engines.adamw import open_adamw
from pantheraml.engines.flat import ALIGNED, FlatParameters, norm_of
from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.errors import PantheraError
from pantheraml.export.safetensors import save_adapter, save_full
from pantheraml.models.adapters import attach
from pantheraml.models.load import load_tokenizer
from pantheraml.recipe.types import LoRA, ModelSpec, OptimSpec
from pantheraml.trainer.sft import sft_loss

LRS = (1e-2, 3e-3, 2e-2, 1e-2, 5e-3)


@pytest.fixture
def prepared(plan_of: Callable[..., Any]) -> Callable[..., TorchEngine]:
    def made(model: Any, optim: OptimSpec | None = None, **plan: Any) -> TorchEngine:
        engine = TorchEngine(FakeBackend("cpu"))
        engine.prepare(model, sft_loss(model), optim or OptimSpec(), replace(plan_of(model), **plan), seed=1)
        return engine

    return made


def batch(examples: list[Example]) -> StepBatch:
    return pack_step(examples, row_tokens=(32,), micro_tokens=64, packing=True, pad_id=0, trim=False)


class Parts(nn.Module):
    """Parameters of sizes that no block divides; one is a scalar, one bfloat16, and one lies in memory the other way round."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(7, 45))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.turned = nn.Parameter(torch.randn(5, 51).T)
        self.low = nn.Parameter(torch.randn(300).bfloat16())


def drawn(model: nn.Module, k: int, size: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(k)
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 40.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_update_is_clipping_and_adamw_as_they_are_written_down(clip_norm: float, weight_decay: float) -> None:
    """In float64 and parameter by parameter, from the formula of the module, without torch's optimizers."""
    optim = OptimSpec(weight_decay=weight_decay, beta1=0.8, beta2=0.95, eps=1e-4, clip_norm=clip_norm)
    model = Parts()
    exact = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    begun = copy.deepcopy(exact)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in exact.items()}
    flat = FlatParameters(model, lambda parameter: weight_decay if parameter.ndim >= 2 else 0.0)
    assert len(flat.parts) == (2 if weight_decay else 1)
    adamw = open_adamw(flat, optim)
    clipped = []
    for k, lr in enumerate(LRS, start=1):
        grads = drawn(model, k, size=0.5 * k)
        flat.zero_gradients()
        sum((parameter * grads[name]).sum() for name, parameter in model.named_parameters() if name in grads).backward()
        gradients = flat.checked_gradients()
        norm = norm_of(gradients)
        adamw.step(gradients, norm, torch.zeros(()), lr)

        # bfloat16 has no gradients of its own here: the parameter is float32 by now.
        wanted_norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))
        assert norm.item() == pytest.approx(wanted_norm, rel=1e-6)
        factor = min(1.0, clip_norm / (wanted_norm + 1e-6)) if clip_norm else 1.0
        clipped.append(factor < 1)
        for name, weight in exact.items():
            m, v = moments[name]
            grad = grads[name].double() * factor
            m.mul_(0.8).add_(0.2 * grad)
            v.mul_(0.95).add_(0.05 * grad**2)
            decay = weight_decay if weight.ndim >= 2 else 0.0
            weight -= lr * (decay * weight + m / (1 - 0.8**k) / ((v / (1 - 0.95**k)).sqrt() + 1e-4))
    assert set(clipped) == {0.0: {False}, 1.0: {True}, 40.0: {False, True}}[clip_norm]
    for name, parameter in model.named_parameters():
        if name in exact:
            moved, wanted = parameter.detach().double() - begun[name], exact[name] - begun[name]
            # Five float32 updates, each rounded at 2^-24 of a weight, which is some hundred times what it moves.
            assert float((moved - wanted).norm() / wanted.norm()) < 2e-5, name
    state = adamw.state()
    for name, (m, v) in moments.items():
        for moment, want in (("exp_avg", m), ("exp_avg_sq", v)):
            assert float((state[f"{moment}/{name}"].double() - want).norm() / want.norm()) < 1e-6


def test_parameters_and_gradients_are_views_that_stay_where_they_are(small: Any, prepared: Any, examples: list[Example]) -> None:
    model = attach(small(), LoRA(rank=3), seed=0)
    engine = prepared(model)
    places: list[dict[str, tuple[int, int]]] = []
    for k in range(3):
        engine.step(batch(examples), k, 1e-2)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        places.append({name: (p.data_ptr(), p.grad.data_ptr()) for name, p in trained.items()})
    assert places[0] == places[1] == places[2]
    for tensors in (list(trained.values()), [p.grad for p in trained.values()]):
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
        assert all(tensor.data_ptr() % 16 == 0 and tensor.is_contiguous() for tensor in tensors)
    # No block of 8-bit states would be of two parameters.
    first = min(weight for weight, _ in places[0].values())
    assert all((weight - first) % (4 * ALIGNED) == 0 for weight, _ in places[0].values())


class Calls(TorchDispatchMode):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name, self.tensors = name, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._name in func.name():
            self.tensors.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_one_kernel_updates_all(weight_decay: float, small: Any, prepared: Any, examples: list[Example]) -> None:
    engine = prepared(small(), OptimSpec(weight_decay=weight_decay))
    with Calls("_fused_adamw_") as calls:
        engine.step(batch(examples), 0, 1e-2)
    assert calls.tensors == ([1] if not weight_decay else [1, 1])


def test_the_norm_counts_what_is_added_last() -> None:
    # In one go in float32 this is 16: from 2^24 equal values on, none of a lane changes its sum.
    ones = torch.ones(()).expand(1 << 28)
    assert norm_of(ones).item() == 2**14
    odd = torch.randn(3 * (1 << 16) + 77, dtype=torch.float64)
    for values in (odd, odd[:5], odd[:0]):
        assert norm_of(values.float()).item() == pytest.approx(values.norm().item(), rel=1e-6)
    assert not torch.isfinite(norm_of(torch.tensor([1.0, float("nan")]))) and not torch.isfinite(norm_of(torch.full((2,), 1e30)))


def test_a_checkpoint_of_single_parameters_goes_on(small: Any, prepared: Any, examples: list[Example]) -> None:
    """As runs before this wrote it: torch's AdamW over each parameter by itself, with torch's own clipping."""
    model = attach(small(), LoRA(rank=4), seed=5)
    alone = {name: p for name, p in model.named_parameters() if p.requires_grad}
    theirs = torch.optim.AdamW(list(alone.values()), weight_decay=0.0, eps=1e-3)
    gradient_of = prepared(copy.deepcopy(model), OptimSpec(clip_norm=0.0, lr=0.0))

    def step(k: int, lr: float) -> None:
        """Gradients come from an engine that never moves."""
        gradient_of.load_weights({f"weight/{name}": p.detach() for name, p in alone.items()})
        gradient_of.step(batch(examples[k : k + 4]), k, 0.0)
        for (name, parameter), other in zip(alone.items(), (p for p in gradient_of._model.parameters() if p.requires_grad), strict=True):
            parameter.grad = other.grad.clone()
            assert other.shape == parameter.shape, name
        torch.nn.utils.clip_grad_norm_(alone.values(), 0.5)
        theirs.param_groups[0]["lr"] = lr
        theirs.step()

    for k, lr in enumerate(LRS[:2]):
        step(k, lr)
    saved = {f"weight/{name}": p.detach().clone() for name, p in alone.items()}
    for name, parameter in alone.items():
        saved |= {f"{kind}/{name}": theirs.state[parameter][kind].clone() for kind in ("exp_avg", "exp_avg_sq", "step")}

    engine = prepared(attach(small(), LoRA(rank=4), seed=6), OptimSpec(clip_norm=0.5, eps=1e-3))
    engine.load_state_dict(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in engine.state_dict().items())
    for k, lr in enumerate(LRS[2:], start=2):
        step(k, lr)
        engine.step(batch(examples[k : k + 4]), k, lr)
    for name, tensor in engine.state_dict().items():
        kind, _, parameter = name.partition("/")
        wanted = alone[parameter].detach() if kind == "weight" else theirs.state[alone[parameter]][kind]
        assert float((tensor - wanted).norm()) <= 1e-5 * float(wanted.norm()), name

    some = next(name for name in saved if name.startswith("step/"))
    with pytest.raises(ValueError, match=r"its parameters have done .* steps, and they are updated together"):
        engine.load_state_dict({**saved, some: torch.tensor(7.0)})


def sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.rglob("*.safetensors")}


def test_what_is_saved_is_as_large_as_before(small: Any, prepared: Any, examples: list[Example], tmp_path: Path) -> None:
    """A view saved as its storage would be the whole vector, once for each parameter."""
    tokenizer = load_tokenizer(ModelSpec(name="tiny:llama"))
    plain, adapted = attach(small(), LoRA(rank=4), seed=0), attach(small(), LoRA(rank=4), seed=0)
    prepared(adapted).step(batch(examples), 0, 1e-2)
    for name, model in (("plain", plain), ("adapted", adapted)):
        save_adapter(model, tokenizer, tmp_path / name)
    assert sizes(tmp_path / "adapted") == sizes(tmp_path / "plain")

    whole = small(vocab_size=320)
    save_full(whole, tokenizer, tmp_path / "whole", verify=False)
    prepared(whole).step(batch(examples), 0, 1e-2)
    save_full(whole, tokenizer, tmp_path / "trained")  # reads it back, and compares
    assert sizes(tmp_path / "trained") == sizes(tmp_path / "whole")
    whole.save_pretrained(tmp_path / "stock")
    again = type(whole).from_pretrained(tmp_path / "stock")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole.parameters(), again.parameters(), strict=True))
    assert sizes(tmp_path / "stock") == sizes(tmp_path / "whole")
    twin = copy.deepcopy(whole)
    assert sum(p.untyped_storage().nbytes() for p in twin.parameters()) == sum(p.nbytes for p in whole.parameters())


@pytest.mark.parametrize("how", ["data", "dtype", "gradient", "parameter"])
def test_what_was_replaced_while_it_trains_is_an_error(how: str, small: Any, prepared: Any, examples: list[Example]) -> None:
    model = small()
    loss = sft_loss(model)
    engine = prepared(model)
    engine.step(batch(examples), 0, 1e-2)
    up = model.model.layers[0].mlp.up_proj
    match how:
        case "data":
            up.weight.data = up.weight.data.clone()
        case "dtype":
            model.double()
        case "parameter":
            up.weight = nn.Parameter(up.weight.detach().clone())
        case _:
            engine._loss = lambda model, part: (model.zero_grad(set_to_none=True), loss(model, part))[1]
    with pytest.raises(PantheraError, match=r"were replaced while they train") as caught:
        engine.step(batch(examples), 1, 1e-2)
    assert how == "gradient" or "mlp.up_proj" in caught.value.what or how == "dtype"
    assert "copy_" in caught.value.fix


def test_a_new_engine_takes_over_from_an_old_one(small: Any, prepared: Any, examples: list[Example]) -> None:
    model = small()
    old = prepared(model)
    old.step(batch(examples), 0, 1e-2)
    moved = {name: p.detach().clone() for name, p in model.named_parameters()}
    new = prepared(model)
    assert all(torch.equal(p, moved[name]) for name, p in model.named_parameters())
    new.step(batch(examples), 0, 1e-2)
    with pytest.raises(PantheraError, match="were replaced"):
        old.step(batch(examples), 1, 1e-2)


def test_parameters_that_are_one_stay_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs = nn.Embedding(6, 4)
            self.outputs = nn.Linear(4, 6, bias=False)
            self.outputs.weight = self.inputs.weight  # one object, as transformers ties
            self.twin = nn.Parameter(self.inputs.weight.data)  # another object, the same memory
            self.held = nn.Parameter(self.inputs.weight.data, requires_grad=False)

    model = Tied()
    flat = FlatParameters(model, lambda _: 0.0)
    assert flat.weights.numel() == ALIGNED and set(flat) == {"inputs.weight", "twin"}
    assert model.outputs.weight is model.inputs.weight
    assert model.twin.data_ptr() == model.inputs.weight.data_ptr() == model.held.data_ptr() == flat.weights.data_ptr()
    flat.zero_gradients()
    (model.inputs.weight.sum() + 2 * model.outputs.weight.sum() + 4 * model.twin.sum()).backward()
    assert (model.inputs.weight.grad == 7).all() and norm_of(flat.checked_gradients()).item() == pytest.approx(7 * 24**0.5)


def test_gradients_are_zeroed_where_they_are(small: Any, prepared: Any, examples: list[Example]) -> None:
    """A step's gradients are its own: those of two steps at a rate of 0 are the same bits."""
    model = small()
    engine = prepared(model)
    seen = []
    for _ in range(2):
        engine.step(batch(examples), 0, 0.0)
        seen.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
