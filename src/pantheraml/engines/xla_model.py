"""A torch model and its loss as a function of arrays, which JAX can differentiate, compile and spread over devices.

The model's own forward is traced, unchanged but for three places. Layers that are
alike become one loop over their stacked weights, so that compiling takes as long for 80 layers as for 2; attention is computed
here, since it must keep packed examples apart without a mask tensor; and the loss holds the logits of one chunk at a time.

Letters: B rows, T tokens of a row, D hidden, V vocabulary, H heads, K key heads, W width of a head, G loops over a period of P layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.sharding import Mesh
from torch import Tensor, nn

from pantheraml.engines.engine import LossFn, RowTensors
from pantheraml.engines.xla_arrays import Arrays, Slot, Spread, whole
from pantheraml.engines.xla_attention import attend, flash, flash_fits, seen_in_cache, seen_in_rows, segments_of
from pantheraml.engines.xla_bridge import Bridge
from pantheraml.engines.xla_layers import Cache, Caches, Member, Period, places_of, star
from pantheraml.errors import DeviceError
from pantheraml.kernels.linear_cross_entropy import linear_cross_entropy
from pantheraml.models.head import causal_model, output_head
from pantheraml.models.load import carries_state
from pantheraml.planning.levels import Levels
from pantheraml.planning.memory import Level

ATTENTION = "pantheraml_xla"
"""The name under which transformers finds `_attention`; a name that it has no mask for, so that none is made."""
EXPERTS = "batched_mm"
"""Transformers' name for the experts of a mixture as one product; their grouped product has no counterpart in XLA."""


class TracedModel(Bridge):
    """What a model and a loss compute, for weights and a batch that are arrays.

    Args:
        model: any causal language model of transformers, adapted or not; it is left as it is.
        loss: of a training method.
        levels: what each layer keeps for backward: keep, cheap (results of products), all (the input alone).
        spread: over which devices, and how.
    """

    def __init__(self, model: Any, loss: LossFn, spread: Spread, levels: Levels | None = None) -> None:
        _register_attention()
        super().__init__()
        self.define(linear_cross_entropy, self._cross_entropy)
        self._model, self._spread = model, spread
        self._call, self._read = _Call(model, loss), _Call(model, self._last_logits)
        self._causal = causal_model(model)
        self._places = places_of(model, self._causal)
        self.caches = not carries_state(model) and len(self._places.layers) > 0
        """Whether keys and values can be kept from token to token."""
        head = self._causal.get_output_embeddings()
        self._head_trains = head is not None and any(parameter.requires_grad for parameter in head.parameters())
        self.levels: Levels = tuple(levels or ("keep",) * len(self._places.layers))
        self.slots: tuple[Slot, ...] = tuple(self._slots())

    def loss(self, arrays: Arrays, ids_BT: Any, positions_BT: Any, labels_BT: Any, key: Any, *, train: bool) -> Any:
        """The sum of the losses of a micro-batch, a float32 scalar of JAX. key: for dropout."""
        with self._passing(_Pass(positions_BT), key, train), self._looped(arrays) as plain:
            ids, positions, labels = self.tensor((ids_BT, positions_BT, labels_BT))
            return self.array(torch.func.functional_call(self._call, self.tensor(whole(plain)), (RowTensors(ids, positions, labels),)))

    def logits(self, arrays: Arrays, ids_BT: Any, positions_BT: Any, at_B: Any, caches: Caches | None) -> tuple[Any, Caches]:
        """The logits [B, V] behind token `at` of each row, float32, and the keys and values of all that was read so far.

        Args:
            ids_BT: with `caches` the next tokens of each row, the first one at its position. caches: what the call before gave, with
                room for more tokens than were read; None: the tokens are the first ones.
        """
        step = _Pass(positions_BT, caching=True, given=caches)
        with self._passing(step, jax.random.key(0), False), self._looped(arrays) as plain:
            ids, positions = self.tensor((ids_BT, positions_BT))
            out = self.array(torch.func.functional_call(self._read, self.tensor(whole(plain)), (ids, positions, self.tensor(at_B))))
        return out.astype(jnp.float32), step.left

    def _last_logits(self, model: Any, ids: Tensor, positions: Tensor, at: Tensor) -> Tensor:
        head = output_head(model)
        given: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        if head is None:
            return self._at(model(**given).logits, at)
        logits = head.linear(self._at(head.backbone(**given).last_hidden_state, at)) * head.scale
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

    def _at(self, x_BTD: Tensor, at_B: Tensor) -> Tensor:
        array, at = self.array((x_BTD, at_B))
        return self.tensor(jnp.take_along_axis(array, at[:, None, None], 1)[:, 0])

    @contextmanager
    def _passing(self, step: _Pass, key: Any, train: bool) -> Iterator[None]:
        """Within the block, the model can be called with traced tensors: its attention is ours, and experts are one batched product."""
        config = self._causal.config
        before, config._attn_implementation = config._attn_implementation, ATTENTION
        experts, config._experts_implementation = config._experts_implementation, EXPERTS
        self.now = step
        _tracing.append(self)
        try:
            with (
                self.computing(key, lambda said: self._refused(f"its forward does what cannot be traced: {said}")),
                _mode(self._model, train),
            ):
                yield
        finally:
            _tracing.pop()
            config._attn_implementation, config._experts_implementation = before, experts
        if not step.attended:  # and transformers made no mask, so every token has seen those behind it
            raise self._refused("its attention does not go through the interface that transformers has for it")

    def _refused(self, why: str) -> DeviceError:
        return DeviceError(
            f"{type(self._causal).__name__} cannot be computed by XLA",
            why=why,
            fix="choose another device, another model, or a plain LoRA adapter",
        )

    def pin(self, x: Any) -> Any:
        """What layers hand on [B, T, D] stays spread by its rows."""
        return self._spread.pinned(x, self._spread.rows)

    def pin_heads(self, x: Any) -> Any:
        """Queries, keys and values [B, H, T, W] stay spread by rows and heads."""
        return self._spread.pinned(x, self._spread.heads)

    @property
    def flash_mesh(self) -> Mesh | None:
        """The devices, where they have a kernel that never holds the scores of a row."""
        return self._spread.mesh if self._spread.has_flash else None

    # ---- Which tensors are one array --------------------------------------------------------------------------------

    def _slots(self) -> Iterator[Slot]:
        """Every parameter and buffer of the model, in its order."""
        places = self._places
        tensors = {name: (parameter, parameter.requires_grad) for name, parameter in self._model.named_parameters()}
        tensors |= {name: (buffer, False) for name, buffer in self._model.named_buffers()}
        for name, (tensor, trains) in tensors.items():
            number, rest = places.inside(name)
            about = (tuple(tensor.shape), tensor.dtype, trains)
            if number is None or number >= places.looped:
                yield Slot(name, (name,), False, *about)
            elif number < places.period:
                members = tuple(f"{places.prefix}{i}.{rest}" for i in range(number, places.looped, places.period))
                yield Slot(f"{places.prefix}{star(number, places.period)}.{rest}", members, True, *about)

    # ---- Layers as one loop -----------------------------------------------------------------------------------------

    @contextmanager
    def _looped(self, arrays: Arrays) -> Iterator[Arrays]:
        """Within the block the model's layers are loops; what is left are the arrays of its other tensors, by their own names."""
        places = self._places
        of_layers: list[Arrays] = [{} for _ in places.layers]  # of the first of each loop, or of a layer by itself
        plain: Arrays = {}
        for slot in self.slots:
            number, rest = places.inside(slot.members[0])
            if number is None:
                plain[f"model.{slot.name}"] = arrays[slot.name]
            else:
                of_layers[number][rest] = arrays[slot.name]
        if not places.layers:
            yield plain
            return
        modules: list[nn.Module] = []
        if places.looped:
            period = Period(self, places.layers[: places.period], of_layers[: places.period], self._loop_levels())
            modules += [Member(period, i) for i in range(places.period)]
        for i in range(places.looped, len(places.layers)):
            modules += [Member(Period(self, places.layers[i : i + 1], [of_layers[i]], (self.levels[i],), stacked=False), 0)]
        config, count = self._causal.config, self._causal.config.num_hidden_layers
        setattr(places.owner, places.attribute, nn.ModuleList(modules))
        config.num_hidden_layers = len(modules)
        try:
            yield plain
        finally:
            config.num_hidden_layers = count
            setattr(places.owner, places.attribute, places.layers)

    def _loop_levels(self) -> tuple[Level, ...]:
        """The level of each turn of the loop: the lowest of its layers."""
        order = ("keep", "cheap", "all")
        period, looped = self._places.period, self._places.looped
        return tuple(max(self.levels[i : i + period], key=order.index) for i in range(0, looped, period))

    # ---- Loss -------------------------------------------------------------------------------------------------------

    def _cross_entropy(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias_V: Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        chunk: int = 1024,
    ) -> Tensor:
        """See `linear_cross_entropy`, for hidden [B, T, D] and labels [B, T]: a chunk is some tokens of every row, on each device."""
        given: Any = self.array((hidden, weight, labels, bias_V))
        hidden_BTD, weight_VD, labels_BT, bias = given
        rows, tokens = labels_BT.shape
        own_rows = -(-rows // self._spread.shares)  # of each device
        parts = next(n for n in range(1, tokens + 1) if tokens % n == 0 and tokens // n * own_rows <= max(chunk, own_rows))

        # The gradient of a head that trains is a sum over chunks: in float32.
        whole_VD = weight_VD.astype(jnp.float32) if self._head_trains else weight_VD

        @functools.partial(jax.checkpoint, policy=None)
        def of_chunk(total: Any, chunk: Any) -> tuple[Any, None]:
            hidden_BCD, labels_BC = chunk
            logits = jnp.einsum("bcd,vd->bcv", hidden_BCD, whole_VD.astype(weight_VD.dtype), preferred_element_type=jnp.float32)
            logits = (logits if bias is None else logits + bias) * scale
            logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
            at_label = jnp.take_along_axis(logits, jnp.maximum(labels_BC, 0)[..., None], -1)[..., 0]
            losses = jax.nn.logsumexp(logits, -1) - at_label
            return total + jnp.where(labels_BC >= 0, losses, 0.0).sum(), None

        chunks = (
            jnp.moveaxis(self.pin(hidden_BTD).reshape(rows, parts, tokens // parts, -1), 1, 0),
            jnp.moveaxis(labels_BT.reshape(rows, parts, tokens // parts), 1, 0),
        )
        return self.tensor(jax.lax.scan(of_chunk, jnp.zeros((), jnp.float32), chunks)[0])


@dataclass(slots=True)
class _Pass:
    """One pass of tokens through the model: what its attention must know, and what it leaves behind.

    Attributes:
        positions_BT: of the tokens in their examples.
        caching: keys and values are kept, in `left`. given: those of the tokens before, in the order of the layers; None: there are none.
        before, after: of the layer that is being computed. attended: attention was called.
    """

    positions_BT: Any
    caching: bool = False
    given: Caches | None = None
    left: Caches = field(default_factory=list)
    before: Cache | None = None
    after: Cache | None = None
    attended: bool = False


class _Call(nn.Module):
    """A function of a model as a module, whose parameters are the model's under `model.`."""

    def __init__(self, model: nn.Module, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self._compute = model, compute

    def forward(self, *args: Any) -> Tensor:
        return self._compute(self.model, *args)


@contextmanager
def _mode(model: nn.Module, train: bool) -> Iterator[None]:
    was = model.training
    model.train(train)
    try:
        yield
    finally:
        model.train(was)


# ---- Attention, as transformers calls it ----------------------------------------------------------------------------

_tracing: list[TracedModel] = []
"""The models that are being traced; the last one calls."""


def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each example. query [B, H, T, W], key and value [B, K, T, W] -> [B, T, H, W]."""
    if attention_mask is not None or dropout:
        what = "a mask of its own" if attention_mask is not None else f"dropout of {dropout:g} in attention"
        raise DeviceError(
            f"{type(module).__name__} cannot be computed by XLA",
            why=f"it asks for {what}, which attention there does not have",
            fix="set it to 0 in the model's config.json (attention_dropout, attn_pdrop)" if dropout else "choose another device or model",
        )
    traced = _tracing[-1]
    step = traced.now
    q, k, v = (traced.pin_heads(each) for each in traced.array((query, key, value)))
    scale = scaling if scaling is not None else 1 / math.sqrt(q.shape[-1])
    step.attended = True
    if traced.flash_mesh is not None and step.before is None and s_aux is None and flash_fits(q):
        step.after = (k, v)
        segments = segments_of(step.positions_BT)
        return traced.tensor(flash(q, k, v, segments, traced.flash_mesh, scale=scale, window=sliding_window, softcap=softcap)), None
    if step.before is None:
        seen = seen_in_rows(step.positions_BT, sliding_window)
    else:
        k, v = (_with_tokens(cache, new, step.positions_BT) for cache, new in zip(step.before, (k, v), strict=True))
        seen = seen_in_cache(step.positions_BT, k.shape[2], sliding_window)
    step.after = (k, v)
    return traced.tensor(attend(q, k, v, seen, scale=scale, softcap=softcap, sinks_H=traced.array(s_aux))), None


def _with_tokens(cache_BKSW: Any, new_BKTW: Any, positions_BT: Any) -> Any:
    """The cache with the tokens of each row, one behind the other from the place of the first."""
    return jax.vmap(lambda cache, new, at: jax.lax.dynamic_update_slice(cache, new, (0, at, 0)))(
        cache_BKSW, new_BKTW.astype(cache_BKSW.dtype), positions_BT[:, 0]
    )
