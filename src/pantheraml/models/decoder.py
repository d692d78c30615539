"""The layers of a known causal language model, computed by the kernels over tokens that stand one after the other.

Nothing of the model is changed: the same modules and parameters are read, in another order of arithmetic. There are no
rows and no mask here, since attention knows where each example begins; and behind the last attention only tokens that
have a label go on. A family that is not known, or a part that is not plain, keeps its own forward.

Letters: N tokens, D hidden, H heads, K key heads, W width of a head, R pairs that are rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pantheraml.kernels.attention import attention
from pantheraml.kernels.gated import Activation, gated
from pantheraml.kernels.gated import reference as gate
from pantheraml.kernels.linear import Norm, Projection, gated_linear, linear, linears
from pantheraml.kernels.rms_norm import rms_norm
from pantheraml.kernels.rope import rope
from pantheraml.kernels.tensor_parallel import Side, TensorParallel
from pantheraml.models.compiled import compiled
from pantheraml.models.families import FAMILIES
from pantheraml.models.head import causal_model, output_head
from pantheraml.models.lora import projection
from pantheraml.models.swap import called
from pantheraml.planning.levels import Levels, format_levels, lower
from pantheraml.planning.memory import TILE_TOKENS, TILED, Level

if TYPE_CHECKING:
    from pantheraml.engines.engine import MicroTensors


@dataclass(frozen=True, slots=True)
class _Facts:
    """What of a layer is no tensor. Layers with the same facts are computed alike, whichever they are.

    Attributes:
        angles: its type, where types rotate by other angles. rotates: it does so at all.
    """

    activation: Activation
    angles: str | None
    rotates: bool
    window: int | None
    softcap: float | None


class Decoder:
    """The last hidden states of a model, for the tokens that have a label.

    Args:
        levels: what each layer keeps for backward; see planning/memory.py. None: everything that is not cheap.
        allowed: levels that `lower` may go to, the fastest first.
        in_host_memory: a context in which what is saved for backward goes to ordinary memory.
        compile: torch compiles a layer, but for those whose MLP is taken in pieces.
        tp: the processes over which products are divided; see models/tensor_parallel.py.
        hooked: each layer is called as a module, for hooks that bring its weights.
    """

    def __init__(
        self,
        model: Any,
        levels: Levels | None = None,
        *,
        allowed: Sequence[Level] = (),
        in_host_memory: Callable[[], AbstractContextManager[Any]] | None = None,
        compile: bool = False,
        tp: TensorParallel | None = None,
        hooked: bool = False,
    ) -> None:
        causal = causal_model(model)
        self._config = causal.config
        self._family = FAMILIES[causal.config.model_type]
        self._backbone: Any = getattr(causal, causal.base_model_prefix)
        self._layers: list[Any] = list(self._backbone.layers)
        self.levels: Levels = tuple(levels or ("cheap",) * len(self._layers))
        self._allowed = tuple(allowed)
        self._in_host_memory, self._tp, self._hooked = in_host_memory, tp, hooked
        self._compiled = compiled(self._layer, whole=True) if compile else None
        self._facts = [self._facts_of(i, layer) for i, layer in enumerate(self._layers)]
        # What is drawn at random in a layer is drawn again where the layer is computed again.
        self._random = any(isinstance(part, nn.Dropout) and part.p > 0 for part in causal.modules())

    def hidden(self, batch: MicroTensors) -> Tensor:
        """[labelled tokens, D], after the last norm, in the dtype of the products."""
        family, config = self._family, self._config
        kind = batch.input_ids.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        x_ND = self._backbone.embed_tokens(batch.input_ids.flatten())
        x_ND = x_ND if dtype is None else x_ND.to(dtype)
        if family.embedding:
            x_ND = x_ND * getattr(config, family.embedding)
        angles = self._angles(batch)
        last = len(self._layers) - 1
        for i, (layer, level) in enumerate(zip(self._layers, self.levels, strict=True)):
            rows = batch.labelled if i == last else None
            arguments = (level, i, layer, x_ND, batch, angles, rows)
            x_ND = called(layer, self._at, *arguments) if self._hooked else self._at(*arguments)
        norm = self._norm(self._backbone.norm)
        return self._backbone.norm(x_ND) if norm is None else rms_norm(x_ND, norm.weight_I, eps=norm.eps, offset=norm.offset)

    def lower(self) -> str | None:
        """Keep less from here on: one level down, and what that is; None: there is none below.

        The results are the same bits, but for `tiled` and `offload`, whose products are of fewer rows and may be rounded otherwise.
        """
        found = lower(self.levels, self._allowed)
        if found is None:
            return None
        self.levels = found
        return f"with layers at {format_levels(found)}"

    def _at(self, level: Level, i: int, layer: Any, x: Tensor, batch: MicroTensors, angles: Any, rows: Tensor | None) -> Tensor:
        """One layer at its level."""

        def run(x: Tensor, again: bool) -> Tensor:
            tile = TILE_TOKENS if level in TILED else None
            if self._compiled is None or tile is not None:
                return self._layer(self._facts[i], layer, x, batch, angles, rows, keep=level == "keep", tile=tile, again=again)
            # The same graph both times: another one would keep other tensors.
            return self._compiled(self._facts[i], layer, x, batch, angles, rows, keep=level == "keep", tile=None, again=False)

        if level in ("keep", "cheap") or not torch.is_grad_enabled():
            return run(x, False)
        with self._in_host_memory() if level == "offload" and self._in_host_memory is not None else nullcontext():
            return self._twice(run, x)

    def _twice(self, compute: Callable[[Tensor, bool], Tensor], x: Tensor) -> Tensor:
        """compute(x, False), of which backward keeps x alone; it calls compute(x, True) for what else it needs, and does not read the result."""
        calls = 0

        def run(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return compute(x, calls > 1)

        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=self._random)

    def _layer(
        self,
        facts: _Facts,
        layer: Any,
        x_ND: Tensor,
        batch: MicroTensors,
        angles: Any,
        rows: Tensor | None,
        *,
        keep: bool,
        tile: int | None,
        again: bool,
    ) -> Tensor:
        """A layer. again: it is computed a second time, for what it keeps, and its result is not read."""
        family, attend, mlp = self._family, layer.self_attn, layer.mlp
        factor = float(getattr(self._config, family.residual)) if family.residual else 1.0
        inputs = [getattr(attend, name) for name in family.qkv]
        if family.before_mlp is None:
            inputs += [getattr(mlp, name) for name in family.gate_up]
        *results, x_ND = self._group(inputs, x_ND, layer.input_layernorm, keep)
        gate_up = results[len(family.qkv) :]
        attended = self._attend(attend, results[: len(family.qkv)], batch, angles, facts)
        if rows is not None:
            attended, x_ND = attended.index_select(0, rows), x_ND.index_select(0, rows)
            gate_up = [each.index_select(0, rows) for each in gate_up]
        after = None if family.after_attention is None else getattr(layer, family.after_attention)
        x_ND = self._back(attend.o_proj, attended, x_ND, after, factor)

        def rest(x_ND: Tensor, again: bool) -> Tensor:
            widened = gate_up
            if family.before_mlp is not None:
                modules = [getattr(mlp, name) for name in family.gate_up]
                *widened, x_ND = self._group(modules, x_ND, getattr(layer, family.before_mlp), keep)
            gate, up = widened if len(widened) == 2 else widened[0].chunk(2, -1)
            after = None if family.after_mlp is None else getattr(layer, family.after_mlp)
            return self._down(mlp.down_proj, gate, up, facts.activation, x_ND, after, factor, keep, again)

        if tile is None or family.before_mlp is None or not torch.is_grad_enabled():
            return rest(x_ND, again)
        # One piece of the tokens at a time, so that gate and up of all of them are never in memory at once.
        # When the layer is computed again, a piece is only kept: it is computed when its own turn comes.
        return torch.cat([self._twice(lambda x, second: x if again else rest(x, second), piece) for piece in x_ND.split(tile)])

    def _attend(self, attend: Any, results: Sequence[Tensor], batch: MicroTensors, angles: Any, facts: _Facts) -> Tensor:
        """[N, H * W] from q, k and v as they come out of their layers."""
        config, family, width = self._config, self._family, attend.head_dim
        if len(results) == 1:
            keys = config.num_key_value_heads * width
            *rotated, v = results[0].split([results[0].shape[1] - 2 * keys, keys, keys], -1)
            results = (*rotated, v.contiguous())  # a view would keep all three until backward
        q, k, v = (each.unflatten(-1, (-1, width)) for each in results)
        if hasattr(attend, "q_norm"):
            q, k = self._normed(attend.q_norm, q), self._normed(attend.k_norm, k)
        if facts.rotates:
            cos, sin = angles[facts.angles]
            q, k = (rope(each, cos, sin, interleaved=family.interleaved) for each in (q, k))
        if batch.cp is not None:
            q, k, v = batch.cp.to_heads(q, k, v)
        out = attention(q, k, v, batch.starts, batch.longest, scale=attend.scaling, window=facts.window, softcap=facts.softcap)
        return (out if batch.cp is None else batch.cp.to_tokens(out)).flatten(1)

    def _group(self, modules: Sequence[nn.Module], x: Tensor, norm: Any, keep: bool) -> tuple[Tensor, ...]:
        """The results of linear layers on norm(x), and x."""
        projections = [self._projection(module, "outputs") for module in modules]
        fused, plain = self._norm(norm), all(each is not None for each in projections)
        if fused is not None and plain and self._tp is None:
            return linears(x, _present(projections), norm=fused, keep=keep, through=True)
        begun = x if self._tp is None else self._tp.begun(x)
        if fused is not None and plain:
            return *linears(begun, _present(projections), norm=fused, keep=keep), x
        h = norm(begun) if fused is None else rms_norm(begun, fused.weight_I, eps=fused.eps, offset=fused.offset)
        h = h.to(x.dtype)
        if plain:
            return *linears(h, _present(projections)), x
        return *(module(h).to(x.dtype) for module in modules), x

    def _projection(self, module: nn.Module, side: Side) -> Projection | None:
        """A layer for the kernels; None: it keeps its own forward, which a divided one has not."""
        found = projection(module)
        if self._tp is None or found is None:
            return found
        return self._tp.projection(found, side)

    def _behind(self, partial: Tensor, module: Any) -> Tensor:
        """What a layer divided by inputs gives, from what this process has of it."""
        assert self._tp is not None
        y = self._tp.summed(partial)
        return y if module.bias is None else y + module.bias.to(y.dtype)

    def _back(self, module: nn.Module, y: Tensor, x: Tensor, after: Any, factor: float) -> Tensor:
        """x + factor * after(module(y))."""
        plain = self._projection(module, "inputs")
        if self._tp is not None and plain is not None:
            return self._added(x, self._behind(linear(y, plain), module), after, factor)
        if plain is not None and after is None:
            return linear(y, plain, residual_NO=x, factor=factor)
        return self._added(x, module(y).to(x.dtype) if plain is None else linear(y, plain), after, factor)

    def _down(
        self,
        module: nn.Module,
        gate_NF: Tensor,
        up_NF: Tensor,
        activation: Activation,
        x: Tensor,
        after: Any,
        factor: float,
        keep: bool,
        again: bool,
    ) -> Tensor:
        """x + factor * after(module(act(gate) * up))."""
        plain = self._projection(module, "inputs")
        if self._tp is not None and plain is not None:
            y = gated_linear(gate_NF, up_NF, activation, plain, keep=keep)
            return x if again and after is None else self._added(x, self._behind(y, module), after, factor)
        if plain is not None and after is None:
            return gated_linear(gate_NF, up_NF, activation, plain, residual_NO=x, factor=factor, keep=keep, unread=again)
        if plain is not None:
            return self._added(x, gated_linear(gate_NF, up_NF, activation, plain, keep=keep), after, factor)
        return self._added(x, module(gated(gate_NF, up_NF, activation)).to(x.dtype), after, factor)

    def _added(self, x: Tensor, y: Tensor, after: Any, factor: float) -> Tensor:
        y = y if after is None else self._normed(after, y)
        return x + (y if factor == 1.0 else y * factor)

    def _normed(self, module: Any, x: Tensor) -> Tensor:
        """The norm of a module over the last dimension."""
        norm = self._norm(module)
        if norm is None:
            return module(x).to(x.dtype)
        return rms_norm(x.flatten(0, -2), norm.weight_I, eps=norm.eps, offset=norm.offset).view(x.shape)

    def _norm(self, module: Any) -> Norm | None:
        """The facts of a root mean square norm; None: it is another one."""
        if self._family.plain_norm:
            return None
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        return Norm(module.weight, float(eps), self._family.offset)

    def _facts_of(self, i: int, layer: Any) -> _Facts:
        family, attend = self._family, layer.self_attn
        own_angles = any(hasattr(self._backbone.rotary_emb, f"{kind}_inv_freq") for kind in self._types())
        return _Facts(
            activation=_activation_of(layer.mlp),
            angles=self._config.layer_types[i] if own_angles else None,
            rotates=family.rotates(attend),
            window=self._config.sliding_window if family.windowed else getattr(attend, "sliding_window", None),
            softcap=attend.attn_logit_softcapping if family.softcap else None,
        )

    def _types(self) -> list[str]:
        return sorted(set(getattr(self._config, "layer_types", None) or ()))

    @torch.no_grad()
    def _angles(self, batch: MicroTensors) -> dict[str | None, tuple[Tensor, Tensor]]:
        """(cos, sin), float32 [N, R] each, by the model's own rule: for each type of layers that has its own, or for None."""
        rotary, own = self._backbone.rotary_emb, {facts.angles for facts in self._facts}
        wide = torch.empty(0, device=batch.input_ids.device)  # only its dtype and device are looked at
        positions = batch.position_ids
        if batch.cp is not None:  # some rules go by the last position of all tokens, which may be in another process's part
            positions = nn.functional.pad(positions, (0, 1), value=batch.longest - 1)
        found = {kind: self._once(rotary(wide, positions, *([] if kind is None else [kind]))) for kind in own}
        return {kind: (cos[: batch.input_ids.numel()], sin[: batch.input_ids.numel()]) for kind, (cos, sin) in found.items()}

    def _once(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """transformers gives each angle twice."""
        cos, sin = (each.flatten(0, 1).float() for each in both)
        pairs = cos.shape[1] // 2
        if self._family.interleaved:
            return cos[:, ::2].contiguous(), sin[:, ::2].contiguous()
        return cos[:, :pairs].contiguous(), sin[:, :pairs].contiguous()


def decodes(model: Any) -> str | None:
    """Why the kernels do not compute the layers of a model; None: they do."""
    causal = causal_model(model)
    config = causal.config
    if config.model_type not in FAMILIES:
        return f"the layers of {config.model_type} are not known to them"
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return "learned prompts stand before the tokens"
    dropped = [name for name in ("attention_dropout", "resid_pdrop", "embd_pdrop") if getattr(config, name, 0.0)]
    if dropped:
        return f"the model's {dropped[0]} is not zero"
    backbone = getattr(causal, causal.base_model_prefix)
    if any(_activation_of(layer.mlp) is None for layer in backbone.layers):
        return "the gate of its MLP is not known to them"
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        return "its attention looks ahead"
    parts = [backbone, backbone.rotary_emb, *(part for layer in backbone.layers for part in (layer, *layer.children()))]
    own = next((part for part in parts if _is_other(part)), None)
    if own is not None:
        return f"its {type(own).__name__} is not the one of transformers"
    if output_head(model) is None:
        return "its output head is more than a matrix"
    return None


def unexchangeable(model: Any, size: int) -> str | None:
    """Why its heads cannot be exchanged between so many processes (kernels/context_parallel.py); None: they can."""
    why = decodes(model)
    if why is not None:
        return f"its layers are not computed by the kernels: {why}"
    config = causal_model(model).config
    counts = ((config.num_key_value_heads, "key heads"), (config.num_attention_heads, "heads"))
    return next((f"{size} does not divide its {count} {what}" for count, what in counts if count % size), None)


def _is_other(part: nn.Module) -> bool:
    """Whether a part of a layer may compute something else than its family does: code of the model's authors, or put there by hand."""
    # A part that trains as a whole is a copy inside of PEFT's wrapper, which shows the copy's weights.
    original = getattr(part, "original_module", part)
    return not type(original).__module__.startswith(("transformers.models.", "torch.nn.")) or "forward" in vars(original)


def _present(projections: Sequence[Projection | None]) -> list[Projection]:
    return [each for each in projections if each is not None]


def _activation_of(mlp: Any) -> Any:
    """The gate of an MLP, recognised by its values; None: none that the kernels have."""
    function = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    points = torch.linspace(-4, 4, 17)
    values = function(points) if function is not None else None
    names: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu")
    close = (name for name in names if values is not None and torch.allclose(gate(points, torch.ones(17), name), values, atol=1e-6))
    return next(close, None)
