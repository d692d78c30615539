"""PEFT's adapted linear layers, computed by the kernel for it where they are plain enough."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from pantheraml.kernels.table import kernel
from pantheraml.models.swap import swapped


class LoraLinear(nn.Module):
    """An adapted linear layer of PEFT with the same parts under the same names, and another forward."""

    def __init__(self, layer: Any, adapter: str, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        for name, part in layer.named_children():
            self.add_module(name, part)
        self._of = {"adapter": adapter, "scale": float(layer.scaling[adapter])}
        self._compute = compute

    def forward(self, x: Tensor) -> Tensor:
        """The layer and its low-rank addition, [..., outputs]."""
        parts: Any = self
        base, adapter = parts.base_layer, self._of["adapter"]
        a, b = parts.lora_A[adapter].weight, parts.lora_B[adapter].weight
        return self._compute(x, base.weight, base.bias, a, b, self._of["scale"])


def plain_adapter(layer: Any) -> str | None:
    """The name of the one adapter of a layer that the kernel can compute; None: it keeps its own forward.

    Not plain: several adapters, dropout, DoRA and other variants, a bias of the adapter, a merged or quantised base, or a
    base that trains.
    """
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear or layer.merged or layer.disable_adapters:
        return None
    names = list(layer.active_adapters)
    if len(names) != 1 or list(layer.lora_A) != names:
        return None
    (name,) = names
    base, variants = layer.base_layer, getattr(layer, "lora_variant", {})
    plain = (
        isinstance(layer.lora_dropout[name], nn.Identity)
        and name not in variants
        and layer.lora_B[name].bias is None
        and not layer.fan_in_fan_out
        and not any(parameter.requires_grad for parameter in base.parameters())
    )
    return name if plain else None


def fused_lora(model: Any, kind: str) -> AbstractContextManager[tuple[str, ...]]:
    """Within the block, the plain adapted layers of a model are computed by the kernel for this kind of device; yields their names."""
    compute = kernel("lora_linear", kind)

    def replace(_: str, layer: nn.Module) -> nn.Module | None:
        name = plain_adapter(layer)
        return None if name is None else LoraLinear(layer, name, compute)

    return swapped(model, replace)


def stock_layers(model: Any) -> int:
    """How many adapted layers of a model keep PEFT's own forward."""
    from peft.tuners.lora.layer import LoraLayer

    return sum(isinstance(layer, LoraLayer) and plain_adapter(layer) is None for layer in model.modules())
