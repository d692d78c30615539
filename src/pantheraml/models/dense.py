"""Float32 products in the host's memory by oneDNN, for a model that answers.

torch takes these products from MKL, which packs the matrix anew for each few rows, and on processors of other makers does not use all of
their instructions: on an EPYC with AVX-512 (Zen 5, torch 2.13) oneDNN takes half the time, from one row to hundreds. In lower precision
torch asks oneDNN by itself. It has no backward there, so nothing is trained through these layers.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantheraml.models.swap import swapped
from pantheraml.recipe.kinds import in_host_memory, kind_of


def dense_products(model: Any) -> AbstractContextManager[tuple[str, ...]]:
    """Within the block, without gradients, plain linear layers in float32 are computed by oneDNN; yields their names."""
    return swapped(model, lambda _, layer: DenseLinear(layer) if isinstance(layer, nn.Linear) and _suits(layer) else None)


class DenseLinear(nn.Module):
    """A linear layer with the same parameters."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias, [..., outputs]."""
        if x.dtype != self.weight.dtype or torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        return _product(x, self.weight, self.bias)


def _suits(layer: Any) -> bool:
    """Whether nothing of a layer is lost: hooks, a forward of its own, a weight of another kind."""
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or "forward" in vars(layer):
        return False
    kind = kind_of(layer.weight.device.type)
    plain = layer.weight.dtype == torch.float32 and layer.weight.is_contiguous()
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return plain and not hooked and kind is not None and in_host_memory(kind) and _available()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def _available() -> bool:
    """Whether this torch has the operator, for matrices as they lie."""
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    try:
        with torch.no_grad():
            return bool(_product(x, weight, None).equal(F.linear(x, weight)))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
