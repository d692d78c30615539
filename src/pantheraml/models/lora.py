"""Linear layers as the kernels take them: plain ones, adapted by PEFT, and on a base that is held in fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from pantheraml.kernels.linear import Base, Projection, linear
from pantheraml.kernels.nf4 import Nf4
from pantheraml.models.swap import swapped


def projection(layer: Any) -> Projection | None:
    """A linear layer for the kernels; None: it keeps its own forward.

    Not for them: several adapters, dropout, DoRA and other variants, a bias of the adapter, a merged base, and a base
    that is neither a matrix nor held by one of ours.
    """
    if not hasattr(layer, "base_layer"):
        held = _held(layer)
        return None if held is None else Projection(*held[:2], base=held[2])
    name = plain_adapter(layer)
    if name is None:
        return None
    weight, bias, base = _held(layer.base_layer) or (None, None, None)
    return Projection(weight, bias, layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]), base)


def _held(layer: Any) -> tuple[Tensor | None, Tensor | None, Base | None] | None:
    """(weight, bias, base) of a layer without an adapter; None: it is no linear layer of a known form."""
    if type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, Tensor):  # some quantizers put another kind of tensor there
        return layer.weight, layer.bias, None
    base = getattr(layer, "kernel_base", None)
    if base is not None:
        return None, layer.bias, base
    state = getattr(getattr(layer, "weight", None), "quant_state", None)  # of bitsandbytes, in four bits
    return None if state is None else (None, layer.bias, Nf4(layer.weight))


def plain_adapter(layer: Any) -> str | None:
    """The name of the one adapter of a layer that the kernels can compute; None: it keeps its own forward."""
    from peft.tuners.lora.layer import Linear, LoraLayer

    if not isinstance(layer, LoraLayer) or _held(layer.base_layer) is None or layer.merged or layer.disable_adapters:
        return None
    names = list(layer.active_adapters)
    if len(names) != 1 or list(layer.lora_A) != names:
        return None
    (name,) = names
    variants = getattr(layer, "lora_variant", {})
    plain = (
        (type(layer) is Linear or type(layer.base_layer) is not nn.Linear)
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and name not in variants
        and layer.lora_B[name].bias is None
        and not getattr(layer, "fan_in_fan_out", False)
    )
    return name if plain else None


class LoraLinear(nn.Module):
    """An adapted linear layer of PEFT with the same parts under the same names, and another forward."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for name, part in layer.named_children():
            self.add_module(name, part)
        self._of: Callable[[], Projection | None] = lambda: projection(layer)

    def forward(self, x: Tensor) -> Tensor:
        """The layer and its low-rank addition, [..., outputs]."""
        plain = self._of()
        assert plain is not None
        rows = x.reshape(-1, x.shape[-1]).to(product_dtype(x))
        y = linear(rows, plain)
        return y.view(*x.shape[:-1], y.shape[-1])


def product_dtype(x: Tensor) -> Any:
    """The dtype of products of x: that of autocast, where it is on."""
    import torch

    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def fused_lora(model: Any) -> AbstractContextManager[tuple[str, ...]]:
    """Within the block, the plain adapted layers of a model are computed by the kernels, whatever else it does; yields their names."""
    return swapped(model, lambda _, layer: LoraLinear(layer) if plain_adapter(layer) is not None else None)


def stock_layers(model: Any) -> int:
    """How many adapted layers of a model keep PEFT's own forward."""
    from peft.tuners.lora.layer import LoraLayer

    return sum(isinstance(layer, LoraLayer) and plain_adapter(layer) is None for layer in model.modules())
