"""Several LoRA adapters in one batch: each row takes its own, or none.

The matrices of all adapters of a layer stand one under the other, so that one skinny product serves every row; what a row's own adapter
did not give is set to zero before the product with B. It costs rank * adapters more columns, in shapes that never change.

Letters: B rows, T tokens, I inputs, O outputs, K adapters, R the largest rank, C = K * R columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantheraml.errors import RecipeError
from pantheraml.models.swap import swapped


class AdapterChoice:
    """Which adapter each row of the next forward takes. names: those that can be named; number 0 is none of them."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self.rank = 0
        self.columns_BC: Tensor | None = None
        """1 where a column belongs to the adapter of the row."""

    def number(self, name: str | None) -> int:
        """The number of an adapter. Raises: ValueError for one that cannot be named."""
        if name is None:
            return 0
        if name not in self.names:
            raise ValueError(f"there is no adapter {name!r}; there are {', '.join(self.names) or 'none'}")
        return self.names.index(name) + 1

    def choose(self, numbers: Sequence[int], device: torch.device) -> None:
        """The number of each row of the next forward."""
        if self.names:
            own = torch.tensor(numbers, device=device)[:, None] == torch.arange(1, len(self.names) + 1, device=device)
            self.columns_BC = own.repeat_interleave(self.rank, dim=1)


@contextmanager
def row_adapters(model: Any, choice: AdapterChoice) -> Iterator[tuple[str, ...]]:
    """Within the block the adapted layers of a PEFT model take the adapters that are chosen; yields the names of these layers.

    Raises: RecipeError if one of the adapters is more than two matrices beside a layer.
    """
    from peft.tuners.lora.layer import LoraLayer

    _check(model, choice.names)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    choice.rank = max((layer.r[name] for layer in layers.values() for name in choice.names if name in layer.lora_A), default=0)
    with swapped(model, lambda name, layer: RowLinear(layer, choice) if name in layers else None) as names:
        yield names


class RowLinear(nn.Module):
    """An adapted linear layer of PEFT with the same parts under the same names; the weights of its adapters are read once."""

    def __init__(self, layer: Any, choice: AdapterChoice) -> None:
        super().__init__()
        for name, part in layer.named_children():
            self.add_module(name, part)
        self._choice = choice
        a, b = [], []
        for name in choice.names:
            if name in layer.lora_A:
                down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach() * layer.scaling[name]
            else:  # this adapter leaves the layer alone
                like = layer.lora_A[next(iter(layer.lora_A))].weight
                down, up = like.new_zeros(0, layer.in_features), like.new_zeros(layer.out_features, 0)
            a.append(F.pad(down, (0, 0, 0, choice.rank - down.shape[0])))
            b.append(F.pad(up, (0, choice.rank - up.shape[1])))
        self._a_CI, self._b_OC = torch.cat(a), torch.cat(b, 1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer and the low-rank addition of each row, [B, T, O], in the dtype of the layer."""
        y = self.get_submodule("base_layer")(x, *args, **kwargs)
        own = self._choice.columns_BC
        assert own is not None and x.ndim == 3 and len(x) == len(own), "the rows of a layer's input are the rows of the batch"
        low = F.linear(x.to(self._a_CI.dtype), self._a_CI) * own[:, None].to(x.device)
        return (y + F.linear(low, self._b_OC)).to(y.dtype)


def _check(model: Any, names: Sequence[str]) -> None:
    """Raises: RecipeError for what cannot be chosen by row."""
    from peft.tuners.lora.layer import Embedding, LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    known = getattr(model, "peft_config", {})
    absent = [name for name in names if name not in known]
    if absent:
        raise RecipeError(
            f"the model has no adapter {absent[0]!r}",
            why=f"it has {', '.join(map(repr, known)) or 'none'}",
            fix='load it with model.load_adapter(FOLDER, adapter_name="NAME")',
        )
    for place, layer in model.named_modules():
        more = None
        if isinstance(layer, AuxiliaryTrainingWrapper):
            more = "is trained as a whole"
        elif isinstance(layer, LoraLayer):
            own = [name for name in names if name in layer.lora_A or name in layer.lora_embedding_A]
            if isinstance(layer, Embedding) or any(name in layer.lora_embedding_A for name in own):
                more = "is an embedding"
            elif any(name in getattr(layer, "lora_variant", {}) for name in own):
                more = "has an adapter of another kind than LoRA"
            elif any(layer.lora_B[name].bias is not None for name in own):
                more = "has an adapter with a bias"
            elif layer.merged:
                more = "has its adapter added to its weight"
        if more is not None:
            raise RecipeError(
                f"adapters cannot be chosen answer by answer: {place} {more}",
                why="here each row of a batch adds two matrices of its own to the same layer, and nothing else",
                fix="answer with one adapter at a time, or train a plain LoRA adapter",
            )
