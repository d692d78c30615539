"""Attention inside segments against its definition in float64 and Hugging Face's eager attention in the same dtype."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.kernels.interpreted import DEVICES, errs_no_more, run
from torch import Tensor

from pantheraml.kernels.attention_triton import attention, attention_backward

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cut(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def sees(starts: Tensor, window: int) -> Tensor:
    """[N, N]: may row i look at column j? Asked pair by pair, in the docstring's words."""
    edges = starts.tolist()
    segment = [number for number, (start, end) in enumerate(itertools.pairwise(edges)) for _ in range(start, end)]
    tokens = range(len(segment))
    return torch.tensor([[segment[i] == segment[j] and j <= i and (window == 0 or i - j < window) for j in tokens] for i in tokens])


def eager(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """In float64 the definition; in another dtype what Hugging Face computes: a softmax in float32, the rest in the dtype."""
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(0, 1) for each in (k, v))
    z = q.transpose(0, 1) @ k.transpose(1, 2) * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~seen, -float("inf"))
    wide = z if z.dtype == torch.float64 else z.float()
    return (wide.softmax(-1).to(q.dtype) @ v).transpose(0, 1), wide.logsumexp(-1)


def check(
    device: str, qkv: list[Tensor], starts: Tensor, window: int = 0, softcap: float = 0.0, functions: Any = (attention, attention_backward)
) -> None:
    q, k, v = qkv
    forward, backward = functions
    scale = q.shape[-1] ** -0.5
    longest = int(starts.diff().max())
    dout = drawn(*q.shape, dtype=q.dtype, seed=7)
    out, lse = run(device, forward, q, k, v, starts, longest, scale, window, softcap)
    grads = run(device, backward, dout, q, k, v, out, lse, starts, longest, scale, window, softcap)
    assert [each.dtype for each in (out, lse, *grads)] == [q.dtype, F32, q.dtype, q.dtype, q.dtype]
    leaves, others = [each.double().requires_grad_() for each in qkv], [each.clone().requires_grad_() for each in qkv]
    seen = sees(starts, window)
    (wanted, wanted_lse), (found, found_lse) = (eager(*each, seen, scale, softcap) for each in (leaves, others))
    errs_no_more(out, found, wanted, "out")
    errs_no_more(lse, found_lse, wanted_lse, "lse")
    exact, theirs = torch.autograd.grad(wanted, leaves, dout.double()), torch.autograd.grad(found, others, dout)
    for name, mine, other, true in zip(("dq", "dk", "dv"), grads, theirs, exact, strict=True):
        errs_no_more(mine, other, true, name)


def inputs(tokens: int, heads: int, key_heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    return [drawn(tokens, count, width, dtype=dtype, seed=seed) for seed, count in enumerate((heads, key_heads, key_heads))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("lengths", "heads", "key_heads", "width"),
    [
        ((1,), 1, 1, 96),
        ((150,), 2, 2, 24),
        ((1, 1, 70, 0, 1, 40, 33, 0), 3, 1, 100),
        ((20, 130), 8, 8, 16),
        ((17,) * 9, 6, 2, 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_values_and_gradients(device: str, lengths: tuple[int, ...], heads: int, key_heads: int, width: int, dtype: torch.dtype) -> None:
    check(device, inputs(sum(lengths), heads, key_heads, width, dtype), cut(*lengths))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [1, 5, 64, 1000])
@pytest.mark.parametrize(("dtype", "softcap"), [(F32, 0.0), (BF16, 0.0), (BF16, 3.0)], ids=str)
def test_windows_shorter_and_longer_than_segments(device: str, window: int, dtype: torch.dtype, softcap: float) -> None:
    check(device, inputs(155, 2, 1, 24, dtype), cut(3, 110, 1, 41), window, softcap)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [0.5, 50.0])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_a_bound_of_the_scores(device: str, dtype: torch.dtype, softcap: float) -> None:
    check(device, inputs(90, 8, 2, 32, dtype), cut(60, 30), 0, softcap)


@pytest.mark.parametrize("device", DEVICES)
def test_a_head_as_wide_as_they_come(device: str) -> None:
    check(device, inputs(40, 2, 1, 256, F32), cut(25, 15))
    check(device, inputs(40, 2, 1, 256, BF16), cut(25, 15), 0, 50.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [0.0, 50.0])
def test_tokens_and_heads_may_lie_apart(device: str, softcap: float) -> None:
    fused = drawn(70, 4 + 2 + 2, 32, dtype=BF16, seed=0)
    heads_first = drawn(4, 70, 32, dtype=BF16, seed=1).transpose(0, 1)
    starts = cut(50, 20)
    check(device, [fused[:, :4], fused[:, 4:6], fused[:, 6:]], starts, 0, softcap)
    check(device, [heads_first, fused[:, 4:6], fused[:, 6:]], starts, 0, softcap)
    q, k, v = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    out, lse = run(device, attention, q, k, v, starts, 50, 0.2, 0, softcap)
    dout = drawn(32, 4, 70, dtype=BF16, seed=2).permute(2, 1, 0)
    apart = run(device, attention_backward, dout, q, k, v, out, lse, starts, 50, 0.2, 0, softcap)
    together = run(device, attention_backward, dout.contiguous(), q, k, v, out, lse, starts, 50, 0.2, 0, softcap)
    for one, other in zip(apart, together, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_segment_does_not_feel_its_neighbours(device: str) -> None:
    """Not in the last bit where blocks are cut alike; elsewhere the sums have another order."""
    q, k, v = inputs(120, 2, 1, 32, F32)
    starts = cut(64, 56)
    out, lse = run(device, attention, q, k, v, starts, 64, 0.2, 0, 2.0)
    for each in (q, k, v):
        each[64:] = drawn(56, each.shape[1], 32, dtype=F32, seed=11) * 100
    other_out, other_lse = run(device, attention, q, k, v, starts, 64, 0.2, 0, 2.0)
    assert torch.equal(out[:64], other_out[:64]) and torch.equal(lse[:, :64], other_lse[:, :64])
    assert not torch.equal(out[64:], other_out[64:])


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_of_the_triton_kernels_are_equal(device: str) -> None:
    q, k, v = inputs(100, 6, 2, 32, BF16)
    arguments = (cut(60, 40), 60, 0.2, 0, 10.0)
    results = []
    for _ in range(2):
        out, lse = run(device, attention, q, k, v, *arguments)
        results.append([out, lse, *run(device, attention_backward, out, q, k, v, out, lse, *arguments)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_are_no_error(device: str) -> None:
    q, k = torch.zeros(0, 4, 16), torch.zeros(0, 2, 16)
    starts = torch.zeros(2, dtype=torch.int32)
    out, lse = run(device, attention, q, k, k, starts, 0, 1.0, 0, 0.0)
    assert (out.shape, lse.shape) == ((0, 4, 16), (4, 0))
    grads = run(device, attention_backward, out, q, k, k, out, lse, starts, 0, 1.0, 0, 0.0)
    assert [each.shape for each in grads] == [(0, 4, 16), (0, 2, 16), (0, 2, 16)]
