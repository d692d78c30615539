"""What autograd keeps, in ordinary memory: in which order it leaves and comes back, and that nothing stays behind. On the CPU."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pantheraml.hardware.host_memory import HostMemory

CPU = torch.device("cpu")


class Watched(HostMemory):
    """Writes down the first value of what leaves, of what is asked for, and of what begins its way back."""

    def __init__(self) -> None:
        super().__init__(CPU, pinned=False)
        self.left: list[float] = []
        self.asked: list[float] = []
        self.began: list[float] = []

    def _put_away(self, tensor: torch.Tensor) -> Any:
        kept = super()._put_away(tensor)
        self.left.extend([float(tensor.flatten()[0])] if kept is not tensor else [])
        return kept

    def _bring_back(self, kept: Any) -> torch.Tensor:
        self.asked.extend([float(kept.host.flatten()[0])] if not isinstance(kept, torch.Tensor) else [])
        return super()._bring_back(kept)

    def _start(self, away: Any) -> None:
        self.began.extend([float(away.host.flatten()[0])] if away.back is None else [])
        super()._start(away)


def chain(host: HostMemory, x: torch.Tensor, links: int) -> torch.Tensor:
    """x + links, a checkpoint a link; the input of link i begins with i."""
    one = torch.ones(3, requires_grad=True)  # its gradient needs x
    for _ in range(links):
        with host():
            x = checkpoint(lambda x: x * one + 1, x, use_reentrant=False)
    return x


def test_the_last_comes_back_first_and_the_one_before_it_is_on_its_way() -> None:
    host, x = Watched(), torch.zeros(3, requires_grad=True)
    y = chain(host, x, 4)
    assert host.left == [0, 1, 2, 3] and host.waiting() == 4 and host.asked == []
    y.sum().backward()
    assert host.asked == [3, 2, 1, 0]
    assert host.began == [3, 2, 1, 0]  # each once
    assert host.waiting() == 0
    assert x.grad is not None and torch.equal(x.grad, torch.ones(3))


def test_gradients_are_the_same_bits() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x @ weight) * x).exp().sum()

    plain, away = torch.linspace(-1, 1, 8, requires_grad=True), torch.linspace(-1, 1, 8, requires_grad=True)
    loss(plain).backward()
    host = HostMemory(CPU, pinned=False)
    with host():
        y = loss(away)
    assert host.waiting() > 0
    y.backward()
    assert plain.grad is not None and away.grad is not None and torch.equal(plain.grad, away.grad) and host.waiting() == 0


def test_a_second_backward_through_the_same_graph() -> None:
    host, x = Watched(), torch.zeros(3, requires_grad=True)
    y = chain(host, x, 3).sum()
    first, second = torch.autograd.grad(y, x, retain_graph=True), torch.autograd.grad(y, x)
    assert torch.equal(first[0], second[0])
    assert host.asked == [2, 1, 0, 2, 1, 0] and host.waiting() == 0


def test_two_graphs_in_any_order() -> None:
    host, x = Watched(), torch.zeros(3, requires_grad=True)
    one, two = chain(host, x, 2).sum(), chain(host, x, 3).sum()
    assert host.waiting() == 5
    one.backward()  # the later one is still to come
    two.backward()
    assert host.asked == [1, 0, 2, 1, 0]
    assert x.grad is not None and torch.equal(x.grad, torch.full((3,), 2.0)) and host.waiting() == 0


def test_a_graph_that_is_dropped_leaves_nothing_behind() -> None:
    host, x = Watched(), torch.zeros(3, requires_grad=True)
    for _ in range(3):  # as when memory runs out in the middle of a forward, and the step is taken again
        y = chain(host, x, 4)
        del y
        gc.collect()
        assert host.waiting() == 0
    y = chain(host, x, 2)
    y.sum().backward()
    assert host.asked == [1, 0] and host.began == [1, 0]  # nothing of the dropped ones is brought back
    assert host.waiting() == 0


def test_a_backward_that_fails_leaves_nothing_behind() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError("out of memory")

    host, x = Watched(), torch.zeros(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        chain(host, Fails.apply(chain(host, x, 2)), 2).sum().backward()
    gc.collect()
    assert host.asked == [3, 2] and host.waiting() == 0


def test_weights_and_whole_numbers_stay() -> None:
    host = HostMemory(CPU, pinned=False)
    weight, index = torch.nn.Parameter(torch.ones(4)), torch.tensor([0, 2])
    with host():
        y = (weight.exp()[index] * weight[index]).sum()
    assert host.waiting() == 3  # exp's result, and both factors
    y.backward()
    assert host.waiting() == 0
