"""Cross entropy in Triton against its definition in float64 and torch's own in the same dtype."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.interpreted import DEVICES, errs_no_more, run
from torch import Tensor
from torch.nn import functional as F

from pantheraml.kernels.cross_entropy_triton import cross_entropy

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def drawn(*shape: int, dtype: torch.dtype, size: float = 4.0) -> tuple[Tensor, Tensor]:
    """Logits, and labels of which about a third are -100."""
    draw = torch.Generator().manual_seed(0)
    logits = (size * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, shape[1], (shape[0],), generator=draw)
    labels[1::3] = -100
    return logits, labels


def capped(logits: Tensor, scale: float, softcap: float) -> Tensor:
    return softcap * torch.tanh(scale * logits / softcap) if softcap else scale * logits


def definition(logits: Tensor, labels: Tensor, scale: float, softcap: float) -> Tensor:
    """-log(exp(z[label]) / sum of exp(z)), token by token."""
    z = capped(logits, scale, softcap)
    losses = [
        -torch.log(torch.exp(row[label]) / torch.exp(row).sum()) if label != -100 else 0 * row.sum()
        for row, label in zip(z, labels, strict=True)
    ]
    return torch.stack(losses)


def check(device: str, logits: Tensor, labels: Tensor, scale: float = 1.0, softcap: float = 0.0) -> None:
    leaf, other = logits.double().requires_grad_(), logits.clone().requires_grad_()
    wanted = definition(leaf, labels, scale, softcap)
    found = F.cross_entropy(capped(other, scale, softcap), labels, reduction="none")
    (exact,), (theirs,) = torch.autograd.grad(wanted.sum(), leaf), torch.autograd.grad(found.sum(), other)
    given = logits.clone()
    only_value = run(device, cross_entropy, given, labels, scale, softcap, False)
    assert torch.equal(given, logits)  # untouched
    loss = run(device, cross_entropy, given, labels, scale, softcap, True)
    assert loss.dtype == F32 and torch.equal(only_value, loss)
    errs_no_more(loss, found, wanted, "loss")
    errs_no_more(given, theirs, exact, "gradient")
    assert not loss[labels == -100].any() and not given[labels == -100].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 263), (5, 100), (3, 4096), (4, 9001)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 30.0), (3.0, 2.0)])
def test_values_and_gradients(device: str, shape: tuple[int, int], dtype: torch.dtype, scale: float, softcap: float) -> None:
    check(device, *drawn(*shape, dtype=dtype), scale, softcap)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("label", [0, 262])
def test_the_first_and_the_last_word_are_labels_like_others(device: str, label: int) -> None:
    logits, _ = drawn(2, 263, dtype=F32)
    check(device, logits, torch.full((2,), label))


@pytest.mark.parametrize("device", DEVICES)
def test_no_label_is_no_loss_and_no_gradient_whatever_the_logits(device: str) -> None:
    logits = torch.full((3, 5000), float("nan"))
    loss = run(device, cross_entropy, logits, torch.full((3,), -100), 1.0, 0.0, True)
    assert not loss.any() and not logits.any()


@pytest.mark.parametrize("device", DEVICES)
def test_large_and_forbidden_words(device: str) -> None:
    logits, labels = drawn(3, 9001, dtype=F32, size=3e3)
    logits[:, :4200] = -float("inf")  # more than a block
    labels[:] = torch.tensor([4300, 9000, 5000])
    wanted = F.cross_entropy(logits.double(), labels, reduction="none")
    loss = run(device, cross_entropy, logits, labels, 1.0, 0.0, True)
    assert torch.allclose(loss.double(), wanted, rtol=1e-6)
    assert torch.isfinite(logits).all() and not logits[:, :4200].any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_label_that_is_no_word_is_loud(device: str) -> None:
    logits, _ = drawn(3, 263, dtype=F32)
    loss = run(device, cross_entropy, logits, torch.tensor([263, -1, 1 << 40]), 1.0, 0.0, False)
    assert loss.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_are_no_error(device: str) -> None:
    assert run(device, cross_entropy, torch.zeros(0, 263), torch.zeros(0, dtype=torch.int64), 1.0, 0.0, True).shape == (0,)


def test_logits_that_lie_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        cross_entropy(torch.zeros(4, 6)[:, :3], torch.zeros(4, dtype=torch.int64), 1.0, 0.0, True)
