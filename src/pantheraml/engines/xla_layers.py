"""Layers that are alike as one loop over their stacked weights: compiling takes as long for 80 of them as for 2.

Letters: B rows, S places of a cache, K key heads, W width of a head, G turns of a loop over a period of P layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import torch
from torch import Tensor, nn

from pantheraml.engines.xla_arrays import Arrays, whole
from pantheraml.planning.levels import Levels
from pantheraml.planning.memory import Level

if TYPE_CHECKING:
    from pantheraml.engines.xla_model import TracedModel

Cache = tuple[Any, Any]
"""Keys and values of a layer, [B, K, S, W] each, of which token p of a row is at place p; of G layers, [G, B, K, S, W]."""
Caches = list[tuple[Cache, ...]]
"""For each loop, and for each layer that is in none: the cache of each of its P layers."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the layers of a model are.

    Attributes:
        owner, attribute: the module that holds them, and under which name; prefix: of the names of their tensors.
        layers: all of them.
        period: so many layers of different kinds follow each other again and again. looped: layers of whole periods, from the first.
    """

    owner: nn.Module
    attribute: str
    prefix: str
    layers: nn.ModuleList
    period: int
    looped: int

    def inside(self, name: str) -> tuple[int | None, str]:
        """(number of the layer, name in it) of a tensor; None: it is in none."""
        if not self.prefix or not name.startswith(self.prefix):
            return None, name
        number, _, rest = name.removeprefix(self.prefix).partition(".")
        return int(number), rest


def places_of(model: nn.Module, causal: Any) -> Places:
    """Where the layers of a model are, and which of them are alike. causal: the model of transformers in it."""
    backbone = getattr(causal, causal.base_model_prefix)
    lists = [(name, part) for name, part in backbone.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists or not hasattr(causal.config, "num_hidden_layers"):
        return Places(backbone, "", "", nn.ModuleList(), 1, 0)
    within, layers = max(lists, key=lambda pair: sum(parameter.numel() for parameter in pair[1].parameters()))
    above = next(name for name, part in model.named_modules() if part is backbone)
    owner, _, attribute = within.rpartition(".")
    kinds = [_kind(layer) for layer in layers]
    alike = not any(_takes_its_own(layer) for layer in layers)
    period = next(p for p in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[p:], strict=False)))
    turns = len(kinds) // period
    prefix = ".".join(part for part in (above, within) if part) + "."
    return Places(backbone.get_submodule(owner), attribute, prefix, layers, period, turns * period if turns > 1 and alike else 0)


def _takes_its_own(layer: nn.Module) -> bool:
    """Whether a layer is called with more than its number decides: a part of the embedding, or what another layer left (Gemma 3n and 4)."""
    return any(name.startswith(("per_layer", "ple_", "shared_", "prev_")) for name in inspect.signature(layer.forward).parameters)


def _kind(layer: nn.Module) -> object:
    """What two layers have in common that compute the same with other weights."""
    tensors = [(name, tuple(each.shape), each.dtype, each.requires_grad) for name, each in layer.named_parameters()]
    tensors += [(name, tuple(each.shape), each.dtype, False) for name, each in layer.named_buffers()]
    facts = [
        (name, type(part).__name__, fact, value)
        for name, part in layer.named_modules()
        for fact, value in sorted(vars(part).items())
        if fact not in ("layer_idx", "training") and isinstance(value, (int, float, str, bool, type(None)))
    ]
    return tensors, facts


def star(number: int, period: int) -> str:
    """What stands for the numbers number, number + period, ..."""
    return "*" if period == 1 else f"*{number}"


class Period:
    """P layers that follow each other, computed as often as their weights are stacked: by a loop that is compiled once.

    Args:
        arrays: of each of the P layers, by the names of its tensors.
        levels: of each turn.
        stacked: the arrays' first axis counts turns; otherwise there is one turn.
    """

    def __init__(
        self,
        traced: TracedModel,
        layers: Sequence[nn.Module] | nn.ModuleList,
        arrays: list[Arrays],
        levels: Levels,
        *,
        stacked: bool = True,
    ) -> None:
        self._traced, self._layers, self._arrays, self._levels, self._stacked = traced, list(layers), arrays, levels, stacked
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._in_tuple: bool | None = None

    def member(self, i: int, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Layer i of the period was called with these: the last one computes all of them, the others hand on what they got."""
        self._calls.append((args, kwargs))
        last = len(self._calls) == len(self._layers)
        if not last and self._in_tuple is None:  # how layers of this family give their result is known when one has been computed
            with self._traced.drawing(jax.random.key(0)):
                jax.eval_shape(lambda arrays, x: self._layer(i, arrays, x, None)[0], self._of_one_turn(i), self._traced.array(x))
        out = self._all(x) if last else x
        return (out,) if self._in_tuple else out

    def _all(self, x: Tensor) -> Tensor:
        """Every turn."""
        traced, step = self._traced, self._traced.now
        keys = traced.split_key(len(self._levels))
        caches = step.given[len(step.left)] if step.given is not None else (None,) * len(self._layers)

        def turn(x: Any, given: Any) -> tuple[Any, tuple[Cache, ...] | None]:
            arrays, key, caches = given
            left = []
            with traced.drawing(key):
                for i, (own, cache) in enumerate(zip(arrays, caches, strict=True)):
                    x, after = self._layer(i, own, x, cache)
                    x = traced.pin(x)
                    left.append(after)
            return x, tuple(left) if step.caching else None

        hidden, given = traced.pin(traced.array(x)), (self._arrays, keys, caches)
        if not self._stacked:
            hidden, left = _remembering(turn, self._levels[0])(hidden, (self._arrays, keys[0], caches))
        elif step.caching:  # nobody asks for gradients
            hidden, left = jax.lax.scan(turn, hidden, given)
        else:
            left, start = None, 0
            for level, count in _runs(self._levels):
                some = jax.tree.map(lambda array, start=start, end=start + count: array[start:end], given)
                hidden, _ = jax.lax.scan(_remembering(turn, level), hidden, some)
                start += count
        if left is not None:
            step.left.append(left)
        self._calls = []
        return traced.tensor(hidden)

    def _layer(self, i: int, arrays: Arrays, x: Any, cache: Cache | None) -> tuple[Any, Cache | None]:
        """Layer i with these weights, called as the model called it; and its keys and values."""
        args, kwargs = self._calls[i]
        step = self._traced.now
        step.before, step.after = cache, None
        out = torch.func.functional_call(self._layers[i], self._traced.tensor(whole(arrays)), (self._traced.tensor(x), *args), kwargs)
        self._in_tuple = isinstance(out, tuple)
        return self._traced.array(out[0] if self._in_tuple else out), step.after

    def _of_one_turn(self, i: int) -> Arrays:
        return jax.tree.map(lambda array: array[0], self._arrays[i]) if self._stacked else self._arrays[i]


class Member(nn.Module):
    """Stands in the place of a layer; takes its calls to the period it belongs to."""

    def __init__(self, period: Period, number: int) -> None:
        super().__init__()
        self._period, self._number = period, number

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._period._layers[self._number], name)  # what the model asks of a layer, such as its kind of attention

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives; a layer of a period hands on what it got, until the last one has been called."""
        return self._period.member(self._number, x, args, kwargs)


def _remembering(turn: Callable[..., Any], level: Level) -> Callable[..., Any]:
    """The same, keeping for backward what its level says."""
    if level == "keep":
        return turn
    return jax.checkpoint(turn, policy=jax.checkpoint_policies.dots_saveable if level == "cheap" else None)


def _runs(levels: Levels) -> Iterator[tuple[Level, int]]:
    """(level, how many times it follows itself)."""
    start = 0
    for i in range(1, len(levels) + 1):
        if i == len(levels) or levels[i] != levels[start]:
            yield levels[start], i - start
            start = i
