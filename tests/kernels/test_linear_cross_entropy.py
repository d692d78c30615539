"""The fused head against the definition in float64, and every claim of its docstring."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pantheraml.kernels.linear_cross_entropy import linear_cross_entropy as of_labelled

V, D = 37, 12


def inputs(*shape: int, seed: int = 0, spread: float = 1.0, ignored: float = 0.4) -> tuple[torch.Tensor, ...]:
    """hidden, weight, bias, labels; about `ignored` of the labels are -100."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64) * spread

    labels = torch.randint(0, V, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = -100
    return draw(*shape, D), draw(V, D), draw(V), labels


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    """The kernel as a method uses it: it gets the hidden states of the labelled tokens alone."""
    labelled = torch.tensor([i for i, label in enumerate(labels.flatten().tolist()) if label != -100], dtype=torch.int64)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, labelled)
    return of_labelled(rows, weight, labels.flatten().index_select(0, labelled), **options)


def definition(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """-sum log p(label), token by token, from the formula of the docstring."""
    total = hidden.new_zeros(())
    for row, label in zip(hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).tolist(), strict=True):
        if label == -100:
            continue
        logits = weight @ row if bias is None else weight @ row + bias
        logits = logits * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        total = total - torch.log(torch.exp(logits[label]) / torch.exp(logits).sum())
    return total


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def gradients(of: Any, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(of, leaves))


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.25}, {"softcap": 1.5}, {"scale": 3.0, "softcap": 2.0}],
    ids=["plain", "scale", "softcap", "scale and softcap"],
)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("shape", "chunk"), [((3, 7), 1024), ((3, 7), 5), ((1, 1), 1), ((2, 16), 1), ((11,), 4)])
def test_value_and_gradients_are_the_definitions(shape: tuple[int, ...], chunk: int, with_bias: bool, options: dict[str, Any]) -> None:
    exact = [
        tensor.requires_grad_() if tensor.is_floating_point() else tensor
        for tensor in inputs(*shape, ignored=0.3 if shape != (1, 1) else 0)
    ]
    single = [tensor.detach().float().requires_grad_() for tensor in exact[:3]]
    leaves = 3 if with_bias else 2
    labels = exact[3]
    wanted = definition(exact[0], exact[1], labels, exact[2] if with_bias else None, **options)
    found = linear_cross_entropy(single[0], single[1], labels, bias_V=single[2] if with_bias else None, chunk=chunk, **options)
    assert found.dtype == torch.float32 and found.shape == ()
    # float32: 2^-24 a rounding, some hundred of them.
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    # An upstream gradient that is not 1: the mean, and a factor.
    for ours, theirs in zip(gradients(found * 0.125, *single[:leaves]), gradients(wanted * 0.125, *exact[:leaves]), strict=True):
        assert ours.shape == theirs.shape and relative(ours, theirs) < 1e-5


def test_no_label_costs_nothing() -> None:
    hidden, weight, bias, labels = (tensor.float().requires_grad_() if tensor.is_floating_point() else tensor for tensor in inputs(2, 5))
    found = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), bias_V=bias, scale=0.5, softcap=3.0)
    assert found.item() == 0
    for gradient in gradients(found, hidden, weight, bias):
        assert not gradient.any()  # neither nan


def test_what_is_ignored_gets_no_gradient_even_where_it_overflows() -> None:
    hidden, weight, _, labels = inputs(1, 6, ignored=0)
    hidden = hidden.float()
    labels[0, 3:] = -100
    hidden[0, 3:] = float("nan")
    hidden.requires_grad_()
    found = linear_cross_entropy(hidden, weight.float(), labels)
    (gradient,) = gradients(found, hidden)
    assert torch.isfinite(found)
    assert gradient[0, :3].abs().min() > 0
    assert not gradient[0, 3:].any()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, _, labels = inputs(2, 4, spread=30.0, ignored=0)
    found = linear_cross_entropy(hidden.float(), weight.float(), labels)
    # exp(10000) is inf even in float64; torch's own is stable.
    wanted = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
def test_bfloat16_differs_by_its_rounding_only(autocast: bool) -> None:
    exact = inputs(4, 16)
    rounded = [tensor.bfloat16() for tensor in exact[:3]]
    labels = exact[3]
    reference = [tensor.double().requires_grad_() for tensor in rounded]
    wanted = definition(reference[0], reference[1], labels, reference[2])
    single = [(tensor.float() if autocast else tensor).requires_grad_() for tensor in rounded]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = linear_cross_entropy(single[0], single[1], labels, bias_V=single[2], chunk=7)
    # A logit of about 10 is rounded to 2^-9 of itself, and 40 errors add up like a random walk.
    assert found.dtype == torch.float32 and found.item() == pytest.approx(wanted.item(), rel=5e-3)
    for leaf, ours, theirs in zip(single, gradients(found, *single), gradients(wanted, *reference), strict=True):
        assert ours.dtype == leaf.dtype
        assert relative(ours, theirs) < 2e-2  # softmax of logits with an error of about 0.02


def test_autocast_computes_the_products_in_its_dtype() -> None:
    hidden, weight, _, labels = inputs(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_cross_entropy(hidden.float(), weight.float(), labels)
    assert cast.equal(linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels))
    assert not cast.equal(linear_cross_entropy(hidden.float(), weight.float(), labels))


def test_the_mean_over_labels_does_not_round_the_factor() -> None:
    # 1/37 in bfloat16 is off by 0.2 %: every gradient of the backbone would be too.
    hidden, weight, _, labels = inputs(1, 64, ignored=0)
    hidden = hidden.bfloat16().requires_grad_()
    (whole,) = gradients(linear_cross_entropy(hidden, weight.bfloat16(), labels), hidden)
    (mean,) = gradients(linear_cross_entropy(hidden, weight.bfloat16(), labels) / 37, hidden)
    assert mean.equal((whole.float() / 37).bfloat16())


def test_a_long_sum_counts_every_token() -> None:
    # 2000 tokens of log(37): in bfloat16 the sum would stand still from 256 * log(37) on.
    labels = torch.zeros(1, 2000, dtype=torch.int64)
    found = linear_cross_entropy(torch.zeros(1, 2000, D).bfloat16(), torch.zeros(V, D).bfloat16(), labels, chunk=3)
    assert found.item() == pytest.approx(2000 * torch.tensor(37.0).log().item(), rel=1e-5)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2)], ids=["hidden", "weight", "bias", "hidden and bias"])
def test_gradients_go_where_they_are_asked_for(trained: tuple[int, ...]) -> None:
    exact = [tensor.float() for tensor in inputs(2, 9)[:3]]
    labels = inputs(2, 9)[3]
    for index in trained:
        exact[index].requires_grad_()
    found = linear_cross_entropy(exact[0], exact[1], labels, bias_V=exact[2], chunk=4)
    found.backward()
    for index, leaf in enumerate(exact):
        assert (leaf.grad is not None) == (index in trained)
    reference = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in exact]
    definition(reference[0], reference[1], labels, reference[2]).backward()
    for index in trained:
        assert relative(exact[index].grad, reference[index].grad) < 1e-5


class Memory(TorchDispatchMode):
    """What tensors made inside hold: the largest one, and the most at one time."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self._live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self._now = self.peak_bytes = self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._live:
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self._now)
                self.largest_bytes = max(self.largest_bytes, storage.nbytes())
                weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, key: int) -> None:
        self._now -= self._live.pop(key, 0)


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logits_of_one_chunk_are_held_at_a_time(dtype: torch.dtype, softcap: float | None) -> None:
    vocab, chunk, tokens = 4096, 64, 256
    hidden = torch.randn(1, tokens, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 4, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocab, (1, tokens))
    memory = Memory([hidden, weight, labels])
    kept: list[int] = []
    with memory, torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk, scale=0.5, softcap=softcap)
        loss.backward()
    assert memory.largest_bytes <= chunk * vocab * 4
    # The gradient of the weight in float32 waits for backward and is scaled there; hidden states and labels are small here.
    weights_bytes, small_bytes = 2 * vocab * 4 * 4, tokens * 200
    assert memory.peak_bytes <= chunk * vocab * 12 + weights_bytes + small_bytes
    # Nothing of the size of the logits is kept from forward to backward.
    assert max(kept) <= vocab * 4 < chunk * vocab


def test_without_gradients_none_are_computed() -> None:
    vocab, hidden = 4096, torch.randn(1, 3, 64)
    weight = torch.randn(vocab, 64, requires_grad=True)
    labels = torch.tensor([[5, -100, 7]])
    memory = Memory([hidden, weight, labels])
    with torch.no_grad(), memory:
        found = linear_cross_entropy(hidden, weight, labels)
    assert not found.requires_grad
    # The logits of two tokens and their copies; a gradient of the weight would be 32 times as much.
    assert memory.peak_bytes <= 2 * vocab * 12
