"""Moments in 8 bits by bitsandbytes, on the CPU. Paged ones, and those of a GPU, have not been run by a test."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.fakes import FakeBackend
from torch import nn

from pantheraml.data.chat import Example
from pantheraml.data.pack import StepBatch, pack_step
from pantheraml.engines import adamw
from pantheraml.engines.adamw import check_installed, open_adamw
from pantheraml.engines.flat import FlatParameters, norm_of
from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.errors import DeviceError, MissingExtra
from pantheraml.models.adapters import attach
from pantheraml.recipe.types import LoRA, OptimSpec
from pantheraml.trainer.checkpoint import Checkpoints
from pantheraml.trainer.sft import sft_loss

EIGHT = OptimSpec(states="8bit")
installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture
def prepared(plan_of: Callable[..., Any]) -> Callable[..., TorchEngine]:
    def made(model: Any, optim: OptimSpec = EIGHT) -> TorchEngine:
        engine = TorchEngine(FakeBackend("cpu"))
        engine.prepare(model, sft_loss(model), optim, plan_of(model), seed=1)
        return engine

    return made


def batch(examples: list[Example]) -> StepBatch:
    return pack_step(examples, row_tokens=(32,), micro_tokens=64, packing=True, pad_id=0, trim=False)


def adapted(small: Any) -> Any:
    return attach(small(), LoRA(rank=4), seed=5)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(37, 45))
        self.vector = nn.Parameter(torch.randn(300))
        self.other = nn.Parameter(torch.randn(3, 11))


@installed
@pytest.mark.parametrize("chunk", [1 << 24, 512])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_the_8_bit_adamw_of_each_parameter_alone(chunk: int, weight_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, so no block of moments is shared by two parameters, and none is lost where the vector is cut."""
    import bitsandbytes

    monkeypatch.setattr(adamw, "CHUNK", chunk)
    model, alone = Parts(), {name: p.detach().clone() for name, p in Parts().named_parameters()}
    theirs = bitsandbytes.optim.AdamW8bit(
        [{"params": [p], "weight_decay": weight_decay if p.ndim >= 2 else 0.0} for p in alone.values()], lr=1e-2, min_8bit_size=0
    )
    flat = FlatParameters(model, lambda parameter: weight_decay if parameter.ndim >= 2 else 0.0)
    ours = open_adamw(flat, OptimSpec(states="8bit", clip_norm=0.0))
    for k in range(5):
        flat.zero_gradients()
        generator = torch.Generator().manual_seed(k)
        for name, parameter in model.named_parameters():
            alone[name].grad = torch.randn(parameter.shape, generator=generator)
            (parameter * alone[name].grad).sum().backward()
        gradients = flat.checked_gradients()
        ours.step(gradients, norm_of(gradients), torch.zeros(()), 1e-2)
        theirs.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, alone[name]), name
        state, blocks = theirs.state[alone[name]], ours.state()[f"exp_avg/{name}"]
        assert torch.equal(blocks[: parameter.numel()], state["state1"].flatten()) and blocks.dtype == torch.uint8
        assert torch.equal(ours.state()[f"exp_avg_sq_scale/{name}"], state["absmax2"])


@installed
def test_gradients_are_clipped_first() -> None:
    begun, ends = FlatParameters(Parts(), lambda _: 0.0).weights, []
    for size, clip_norm in ((1.0, 0.0), (50.0, 1.0)):
        model = Parts()
        flat = FlatParameters(model, lambda _: 0.0)
        update = open_adamw(flat, OptimSpec(states="8bit", clip_norm=clip_norm, eps=1e-2))
        for k in range(3):
            flat.zero_gradients()
            generator = torch.Generator().manual_seed(k)
            grads = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
            norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
            for name, parameter in model.named_parameters():
                (parameter * grads[name] * (size / norm)).sum().backward()
            gradients = flat.checked_gradients()
            update.step(gradients, norm_of(gradients), torch.zeros(()), 1e-2)
        ends.append(flat.weights.clone())
    # Both have a norm of 1 in the end, but for the 1e-6 in its divisor; a step of a code of 8 bits may follow from that.
    assert float((ends[0] - ends[1]).norm() / (ends[0] - begun).norm()) < 1e-2


@installed
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_it_learns_as_with_float32(adapter: bool, small: Any, prepared: Any, examples: list[Example]) -> None:
    losses = {}
    for states in ("float32", "8bit"):
        model = adapted(small) if adapter else small()
        engine = prepared(model, OptimSpec(states=states))
        steps = [engine.step(batch(examples), k, 1e-2 if adapter else 2e-3) for k in range(25)]
        losses[states] = [value.loss for value in engine.read(steps)]
    assert losses["float32"][-1] < 0.7 * losses["float32"][0]
    assert losses["8bit"][0] == losses["float32"][0]
    # 8 bits move a weight by a few percent more or less in each step.
    assert losses["8bit"][-1] == pytest.approx(losses["float32"][-1], rel=0.1)
    assert losses["8bit"] != losses["float32"]


@installed
def test_a_restored_run_goes_on_bit_by_bit(small: Any, prepared: Any, examples: list[Example], tmp_path: Any) -> None:
    def go(engine: TorchEngine, steps: range) -> list[float]:
        return [value.loss for value in engine.read([engine.step(batch(examples[k % 3 : k % 3 + 5]), k, 1e-2) for k in steps])]

    optim = OptimSpec(states="8bit", weight_decay=0.1)
    whole = prepared(adapted(small), optim)
    fresh = whole.state_dict()
    assert all(name.startswith("weight/") for name in fresh)
    go(whole, range(3))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", fingerprint="f", keep=1)
    checkpoints.save(3, whole.state_dict(), {}, best=None)
    wanted = go(whole, range(3, 6))

    again = prepared(adapted(small), optim)
    go(again, range(1))
    found = checkpoints.newest(print)
    assert found is not None
    again.load_state_dict(found.tensors)
    restored = again.state_dict()
    assert restored.keys() == found.tensors.keys() and all(torch.equal(restored[name], found.tensors[name]) for name in restored)
    assert go(again, range(3, 6)) == wanted
    ended, expected = again.state_dict(), whole.state_dict()
    assert all(torch.equal(ended[name], expected[name]) for name in expected)
    # A quarter of the bytes of float32, with the scales and the gaps behind parameters this small.
    moments = sum(tensor.nbytes for name, tensor in ended.items() if name.startswith("exp_avg"))
    values = sum(tensor.numel() for name, tensor in ended.items() if name.startswith("exp_avg/"))
    assert moments == values * 2 + values // 256 * 8

    plain = prepared(adapted(small), OptimSpec())
    with pytest.raises(ValueError, match="does not fit this model"):
        plain.load_state_dict(ended)
    again.load_state_dict(fresh)
    assert again.state_dict().keys() == fresh.keys()


@installed
def test_what_is_not_finite_updates_nothing_then_or_later(small: Any, prepared: Any, examples: list[Example]) -> None:
    model = small()
    engine = prepared(model)
    engine.step(batch(examples), 0, 1e-2)
    before = engine.state_dict()
    real = engine._loss
    engine._loss = lambda model, part: real(model, part) * float("nan")
    broken = engine.step(batch(examples), 1, 1e-2)
    engine._loss = real
    mended = engine.step(batch(examples), 2, 1e-2)
    assert [value.ok for value in engine.read([broken, mended])] == [False, True]
    after = engine.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@installed
def test_paging_is_refused_where_there_is_nothing_to_page_to(small: Any, prepared: Any) -> None:
    with pytest.raises(DeviceError, match=r"optim\.states=paged is not possible on cpu") as caught:
        prepared(small(), OptimSpec(states="paged"))
    assert caught.value.fix == "set optim.states to 8bit"


@installed
def test_a_device_without_such_an_update_is_told(small: Any, prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    def missing(self: Any) -> None:
        raise NotImplementedError("Could not run 'bitsandbytes::optimizer_update_8bit_blockwise' with arguments from the 'X' backend")

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", missing)
    with pytest.raises(DeviceError, match=r"optim\.states=8bit is not possible on cpu") as caught:
        prepared(small())
    assert "optimizer_update_8bit_blockwise" in caught.value.why and caught.value.fix == "set optim.states to float32"


def test_without_bitsandbytes_the_error_says_what_to_install(small: Any, prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "find_spec", lambda name: None)
    check_installed(OptimSpec())
    for use in (lambda: check_installed(EIGHT), lambda: prepared(small())):
        with pytest.raises(MissingExtra) as caught:
            use()
        assert "bitsandbytes" in caught.value.what and "optim.states=8bit" in caught.value.why
        assert caught.value.fix == "pip install bitsandbytes"
