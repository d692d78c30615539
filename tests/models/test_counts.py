"""How many matrix products a step takes, layer by layer and level by level, and over how many rows.

A product is counted by its multiplications, rows * inputs * outputs, told apart by what it multiplies with.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pantheraml.engines.engine import MicroTensors
from pantheraml.engines.torch_engine import micro_tensors
from pantheraml.hardware.host_memory import HostMemory
from pantheraml.models import decoder as module
from pantheraml.models.adapters import attach
from pantheraml.models.decoder import Decoder
from pantheraml.planning.memory import Level
from pantheraml.recipe.types import LoRA
from pantheraml.trainer.sft import sft_loss

RANK, LAYERS, ROWS, TOKENS = 3, 3, 2, 40  # 80 tokens; the rank is unlike any width
N, LABELLED = ROWS * TOKENS, 10
GROUPS = (3 * RANK, RANK, 2 * RANK, RANK)
"""Of the adapters that share an input: q k v, o, gate up, down."""


class Products(TorchDispatchMode):
    """The (rows, inputs, outputs) of each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in ("mm", "linear", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "einsum"):
            left, right = args[1:3] if name.startswith("addmm") else args[:2]
            right = right.T if name == "linear" else right
            assert left.ndim == 2, name  # attention's own are inside of its kernel
            self.seen.append((left.shape[0], left.shape[1], right.shape[1]))
        if name.startswith("pantheraml::low_rank"):  # rows, the skinny result and b
            rows, (outputs, rank) = len(args[0]), args[2].shape
            self.seen += [(rows, rank, outputs)] if name.endswith("add") else [(rows, outputs, rank), (outputs, rows, rank)]
        return func(*args, **(kwargs or {}))

    def skinny(self) -> int:
        """With an adapter: some side is a rank, or the ranks of a group."""
        return sum(any(side in {RANK, *GROUPS} for side in sides) for sides in self.seen)

    def base(self) -> list[tuple[int, int, int]]:
        return [sides for sides in self.seen if not any(side in {RANK, *GROUPS} for side in sides)]


@pytest.fixture
def batch() -> MicroTensors:
    """Two examples a row, ten tokens with a label."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(7, 263, (ROWS, TOKENS))
    labels = np.full_like(tokens, -100)
    labels[:, 5 : 5 + LABELLED // ROWS] = tokens[:, 6 : 6 + LABELLED // ROWS]
    return micro_tensors(tokens, np.tile(np.arange(TOKENS // 2), (ROWS, 2)), labels, torch.device("cpu"))


def counted(model: Any, batch: MicroTensors, level: Level) -> tuple[Products, Products]:
    """Those of the layers, in forward and in backward; the head's own are left out: it is frozen, a product each way of one chunk."""
    decoder = Decoder(model, (level,) * LAYERS, in_host_memory=HostMemory(torch.device("cpu"), pinned=False))
    forward, backward = Products(), Products()
    with forward:
        loss = sft_loss(model, decoder)(model, batch)
    with backward:
        loss.backward()
    vocab = model.config.vocab_size
    heads = [sides for sides in forward.seen if vocab in sides]
    assert heads == [(LABELLED, 128, vocab), (LABELLED, vocab, 128)]
    forward.seen = [sides for sides in forward.seen if vocab not in sides]
    return forward, backward


def lora_llama(small: Any) -> Any:
    model = attach(small("llama", num_hidden_layers=LAYERS, intermediate_size=200), LoRA(rank=RANK), seed=0)
    return model.train()


# A layer has 7 base products in forward, 4 skinny ones down (one for each group of layers with one input) and 7 up.
FORWARD_BASE, FORWARD_SKINNY = 7, 4 + 7
# In backward each base matrix gives its input's gradient, 7, but none its own: they are frozen. Each adapter: 7 gradients of b
# and 7 of the skinny results; each group: 4 gradients of a, and 4 back to the input.
BACKWARD_BASE, BACKWARD_SKINNY = 7, 7 + 7 + 4 + 4
# Nobody needs the gradient of the first layer's input: no products of q, k and v with it, nor of their adapters.
FIRST_BASE, FIRST_SKINNY = 3, 1


@pytest.mark.parametrize("level", ["keep", "cheap", "all", "offload", "tiled"])
def test_products_of_a_layer(level: Level, small: Any, batch: MicroTensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_TOKENS", N)  # one piece: another number of pieces is counted below
    forward, backward = counted(lora_llama(small), batch, level)
    assert len(forward.base()) == LAYERS * FORWARD_BASE
    assert forward.skinny() == LAYERS * FORWARD_SKINNY
    base, skinny = LAYERS * BACKWARD_BASE - FIRST_BASE, LAYERS * BACKWARD_SKINNY - FIRST_SKINNY
    if level == "all":
        # Everything once more, but for the layer's result, which backward does not need.
        base, skinny = base + LAYERS * (FORWARD_BASE - 1), skinny + LAYERS * (FORWARD_SKINNY - 1)
    if level in ("tiled", "offload"):
        # Attention once more; then the piece, but for its result.
        base, skinny = base + LAYERS * (4 + 2), skinny + LAYERS * (2 + 4 + 1 + 2 + 1)
    assert len(backward.base()) == base
    assert backward.skinny() == skinny


def test_each_piece_of_an_mlp_has_products_of_its_own(small: Any, batch: MicroTensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_TOKENS", 32)
    pieces = (3, 3, 1)  # 32 + 32 + 16 tokens, and in the last layer the 10 that have a label
    forward, backward = counted(lora_llama(small), batch, "tiled")
    assert len(forward.base()) == LAYERS * 4 + 3 * sum(pieces)
    again = LAYERS * 4 + 2 * sum(pieces)  # attention once more, then each piece, but for its result
    assert len(backward.base()) == LAYERS * 4 + 3 * sum(pieces) - FIRST_BASE + again


def test_frozen_weights_get_no_gradient_product(small: Any, batch: MicroTensors) -> None:
    model = lora_llama(small)
    _, backward = counted(model, batch, "cheap")
    # A weight's gradient sums over tokens: these are inside, the sides are the weight's.
    inside = [sides for sides in backward.seen if sides[1] in (N, LABELLED)]
    assert len(inside) == LAYERS * (7 + 4) and all(any(side in {RANK, *GROUPS} for side in sides) for sides in inside)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora_" not in name)


def test_trained_weights_get_one_each(small: Any, batch: MicroTensors) -> None:
    model = small("llama", num_hidden_layers=LAYERS, intermediate_size=200, tie_word_embeddings=False).train()
    decoder, backward = Decoder(model), Products()
    loss = sft_loss(model, decoder)(model, batch)
    with backward:
        loss.backward()
    # The embedding trains as well, so the first layer gives its input's gradient.
    assert len(backward.seen) == LAYERS * (7 + 7)
    assert sum(sides[1] in (N, LABELLED) for sides in backward.seen) == LAYERS * 7


def test_the_last_layer_goes_on_with_labelled_tokens_only(small: Any, batch: MicroTensors) -> None:
    forward, backward = counted(lora_llama(small), batch, "cheap")
    assert Counter(rows for rows, _, _ in forward.base()) == {N: (LAYERS - 1) * 7 + 3, LABELLED: 4}
    assert [rows for rows, _, _ in forward.base()[-7:]] == [N] * 3 + [LABELLED] * 4  # q k v; o gate up down
    assert [rows for rows, _, _ in backward.base()[:7]] == [LABELLED] * 4 + [N] * 3
    assert {rows for rows, _, _ in forward.base()[:-7]} == {N}


def test_one_norm_for_both_blocks_is_one_group(small: Any, batch: MicroTensors) -> None:
    """Cohere's attention and MLP share an input, so five adapters share a skinny product."""
    model = attach(small("cohere", num_hidden_layers=LAYERS, intermediate_size=200), LoRA(rank=RANK), seed=0).train()
    with Products() as forward:
        sft_loss(model, Decoder(model))(model, batch)
    downs = [sides for sides in forward.seen if sides[2] in {RANK, 5 * RANK}]
    assert sorted(Counter(outputs for _, _, outputs in downs).items()) == [(RANK, 2 * LAYERS), (5 * RANK, LAYERS)]
