"""A model whose products are divided over processes: each keeps its part of the matrices in the layers, and the heads that belong to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pantheraml.errors import RecipeError
from pantheraml.kernels.linear import linear
from pantheraml.kernels.tensor_parallel import Side, TensorParallel
from pantheraml.models.decoder import decodes
from pantheraml.models.families import FAMILIES
from pantheraml.models.head import causal_model
from pantheraml.models.lora import product_dtype, projection
from pantheraml.models.swap import swapped

_BY_INPUTS = ("o_proj", "down_proj")


def indivisible(model: Any, size: int) -> str | None:
    """Why the products of a model cannot be divided over so many processes; None: they can."""
    why = decodes(model)
    if why is not None:
        return f"its layers are not computed by the kernels: {why}"
    causal = causal_model(model)
    config, family = causal.config, FAMILIES[causal.config.model_type]
    if len(family.qkv) == 1 or len(family.gate_up) == 1:
        return f"{config.model_type} stores several matrices as one"
    for count, what in (
        (config.num_attention_heads, "heads"),
        (config.num_key_value_heads, "key heads"),
        (config.intermediate_size, "gates"),
    ):
        if count % size:
            return f"{size} does not divide its {count} {what}"
    if getattr(config, "use_qk_norm", False) and family.plain_norm:
        return "each of its heads has a norm of its own"
    for name, layer, _ in _layers(model):
        if projection(layer) is None or type(getattr(layer, "base_layer", layer)) is not nn.Linear:
            return f"{name} is not a plain matrix with at most one plain adapter"
    return None


def divide(model: Any, tp: TensorParallel) -> dict[str, int]:
    """Keep this process's part of each matrix and bias in the layers; adapters stay whole. Raises: RecipeError if that cannot be.

    Returns: the names of parameters that are parts from now on, and the dimension along which they were divided.
    """
    why = indivisible(model, tp.size)
    if why is not None:
        raise RecipeError(
            f"hardware.tp={tp.size} does not go with this model", why=why, fix="leave hardware.tp out; hardware.fsdp divides any model"
        )
    parts: dict[str, int] = {}
    for name, layer, side in _layers(model):
        base = getattr(layer, "base_layer", layer)
        prefix = f"{name}.base_layer" if base is not layer else name
        dim = 0 if side == "outputs" else 1
        _keep(base, "weight", tp, dim)
        parts[f"{prefix}.weight"] = dim
        if base.bias is not None and side == "outputs":
            _keep(base, "bias", tp, 0)
            parts[f"{prefix}.bias"] = 0
    return parts


def summed_over(model: Any) -> set[str]:
    """Trainable parameters of which each process has a part of the gradient: those between the beginning and the end of a divided product."""
    causal = causal_model(model)
    inner = {id(parameter) for _, layer, _ in _layers(model) for parameter in _adapters(layer)}
    family = FAMILIES[causal.config.model_type]
    before = ["input_layernorm", *([family.before_mlp] if family.before_mlp else [])]
    for layer in _backbone(model).layers:
        norms = [getattr(layer, name) for name in before]
        norms += [getattr(layer.self_attn, name) for name in ("q_norm", "k_norm") if hasattr(layer.self_attn, name)]
        inner |= {id(parameter) for norm in norms for parameter in norm.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inner}


def divided_layers(model: Any, tp: TensorParallel) -> AbstractContextManager[tuple[str, ...]]:
    """Within the block, the model's own forward computes with the parts, as for answers."""
    sides: dict[int, Side] = {id(layer): side for _, layer, side in _layers(model)}
    return swapped(model, lambda _, layer: _Divided(layer, sides[id(layer)], tp) if id(layer) in sides else None)


class _Divided(nn.Module):
    """A linear layer with the same parts under the same names, whose matrix is this process's part."""

    def __init__(self, layer: Any, side: Side, tp: TensorParallel) -> None:
        super().__init__()
        for name, part in (*layer.named_children(), *layer.named_parameters(recurse=False)):
            setattr(self, name, part)
        self._of = lambda: layer
        self._side: Side = side
        self._tp = tp

    def forward(self, x: Tensor) -> Tensor:
        """[..., outputs]: this process's outputs, or all of them behind a layer divided by inputs."""
        layer = self._of()
        plain = projection(layer)
        assert plain is not None
        rows = x.reshape(-1, x.shape[-1]).to(product_dtype(x))
        y = linear(rows, self._tp.projection(plain, self._side))
        if self._side == "inputs":
            y = self._tp.summed(y)
            y = y if layer.bias is None else y + layer.bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


def _backbone(model: Any) -> Any:
    causal = causal_model(model)
    return getattr(causal, causal.base_model_prefix)


def _layers(model: Any) -> Iterator[tuple[str, Any, Side]]:
    """(name in the model, layer, side) of all linear layers that are divided."""
    family = FAMILIES[causal_model(model).config.model_type]
    wanted = {*family.qkv, *family.gate_up, *_BY_INPUTS}
    inside = {id(part) for layer in _backbone(model).layers for part in layer.modules()}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in wanted and id(module) in inside:
            yield name, module, "inputs" if last in _BY_INPUTS else "outputs"


def _adapters(layer: Any) -> Iterator[nn.Parameter]:
    for part in ("lora_A", "lora_B"):
        if hasattr(layer, part):
            yield from getattr(layer, part).parameters()


@torch.no_grad()
def _keep(layer: nn.Linear, name: str, tp: TensorParallel, dim: int) -> None:
    """A copy: the rest of the tensor is let go of."""
    whole = getattr(layer, name)
    part = tp.part(whole.detach(), dim).clone(memory_format=torch.contiguous_format)
    setattr(layer, name, nn.Parameter(part, requires_grad=whole.requires_grad))
    if name == "weight":
        layer.out_features, layer.in_features = part.shape
