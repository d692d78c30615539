"""A Llama-like model of floats made into one of whole numbers, with steps chosen so that some sample text loses little.

Letters: N tokens, O outputs, I inputs, D hidden; the others as in integer_model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log2, pi
from typing import TYPE_CHECKING, Any

import numpy as np

from pantheraml.errors import RecipeError
from pantheraml.memory.integer_model import (
    GAIN_BITS,
    LARGEST_ACTIVATION,
    LARGEST_HEAD,
    LARGEST_OUTPUT,
    LOGIT_OCTAVE,
    LONGEST_CONTEXT,
    SCORE_OCTAVE,
    SILU_STEPS,
    SINE_STEPS,
    VALUE_SHIFT,
    IntegerModel,
    Layer,
    Linear,
    Norm,
    Shape,
)
from pantheraml.memory.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("llama", "mistral", "qwen2")
LARGEST_WEIGHT = 15
"""Five bits, which zstd makes four of: the file is half as large as with eight bits, and texts take 0.3% more."""
_SAMPLES = 4096
"""Tokens whose activations decide about steps."""


@dataclass
class Seen:
    """What the float model computed for every n-th token of a sample, float32 [N, ..]: by name ("0.queries", "gates", ...)."""

    every: int = 1
    by_name: dict[str, list[Tensor]] = field(default_factory=dict[str, "list[Tensor]"])

    def note(self, name: str, values: Tensor) -> None:
        """Adds values [B, T, ..] of a batch."""
        self.by_name.setdefault(name, []).append(values.reshape(-1, *values.shape[2:])[:: self.every].clone())

    def __getitem__(self, name: str) -> np.ndarray:
        import torch

        return torch.cat(self.by_name[name]).double().numpy()


def shape_of(model: Any, context: int | None = None) -> Shape:
    """Sizes of a model that can be converted. Raises: RecipeError with the reason for others."""
    config = model.config
    heads, hidden = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // heads
    window = getattr(config, "sliding_window", None) or LONGEST_CONTEXT
    why = None
    if config.model_type not in FAMILIES:
        why = f"its family is {config.model_type}, and those are {', '.join(FAMILIES)}"
    elif config.hidden_act != "silu":
        why = f"its gates are {config.hidden_act}, and silu has a table"
    elif model.model.rotary_emb.rope_type in ("dynamic", "longrope") or model.model.rotary_emb.attention_scaling != 1:
        why = f"its positions are {model.model.rotary_emb.rope_type}, and turn by more than a fixed angle a token"
    elif head > LARGEST_HEAD:
        why = f"its heads have {head} values, and sums over more than {LARGEST_HEAD} could leave 24 bits"
    if why:
        raise RecipeError(
            f"a model of the family {config.model_type} cannot be made into whole numbers",
            why=why,
            fix="use a model of such a family, or FloatPredictor, whose records can be decoded on this kind of device alone",
        )
    return Shape(
        vocabulary=model.get_input_embeddings().weight.shape[0],
        hidden=hidden,
        layers=config.num_hidden_layers,
        heads=heads,
        groups=config.num_key_value_heads,
        head=head,
        inner=config.intermediate_size,
        context=min(context or LONGEST_CONTEXT, LONGEST_CONTEXT, config.max_position_embeddings, window),
    )


def calibrate(model: Any, tokens: Tokens, samples: Sequence[np.ndarray], *, context: int | None = None) -> IntegerModel:
    """The model in whole numbers.

    Args:
        model: of Hugging Face, of one of `FAMILIES`.
        samples: tokens of some records, int [T] each, as `Tokens.encode` gives them; a few thousand tokens are enough.
        context: tokens that it sees at most; None: 512, or what the model can do if that is less.
    Raises: RecipeError if it is of another family.
    """
    import torch

    shape = shape_of(model, context)
    weights = {name: value.detach().cpu().float() for name, value in model.state_dict().items()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    inputs = [[tokens.begin, *each.tolist()][: shape.context] for each in samples]
    seen = Seen(every=-(-sum(map(len, inputs)) // _SAMPLES))
    with torch.no_grad():
        for each in inputs:
            float_logits(model, weights, torch.tensor([each]), seen)
    turns = model.model.rotary_emb.inv_freq.double().cpu().numpy() / (2 * pi)
    return _Converter(shape, {name: value.numpy() for name, value in weights.items()}, seen).made(turns, tokens)


def float_logits(model: Any, weights: dict[str, Tensor], ids_BT: Tensor, seen: Seen | None = None) -> Tensor:
    """What the model of Hugging Face computes, float32 [B, T, V], with a note of everything that is to be rounded."""
    import torch
    from torch.nn.functional import linear, scaled_dot_product_attention, silu

    config = model.config
    shape = shape_of(model)
    seen = Seen() if seen is None else seen
    rows, length = ids_BT.shape

    def normed(x: Tensor, name: str, noted: str) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps)
        seen.note(noted, x)
        return x * weights[f"{name}.weight"]

    def layer(x: Tensor, name: str) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def heads(x: Tensor) -> Tensor:
        return x.view(rows, length, -1, shape.head).transpose(1, 2)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cosines + torch.cat([-second, first], -1) * sines

    x = weights["model.embed_tokens.weight"][ids_BT]
    seen.note("embedded", x)
    cosines, sines = (each[:, None].float() for each in model.model.rotary_emb(x, torch.arange(length)[None]))
    for i in range(shape.layers):
        at = f"model.layers.{i}"
        h = normed(x, f"{at}.input_layernorm", f"{i}.attention")
        q, k, v = (heads(layer(h, f"{at}.self_attn.{which}_proj")) for which in "qkv")
        q, k = turned(q), turned(k)
        for name, value in (("queries", q), ("keys", k), ("values", v)):
            seen.note(f"{i}.{name}", value.transpose(1, 2))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        seen.note(f"{i}.mixed", mixed)
        added = layer(mixed.reshape(rows, length, -1), f"{at}.self_attn.o_proj")
        seen.note("added", added)
        x = x + added
        h = normed(x, f"{at}.post_attention_layernorm", f"{i}.mlp")
        gate, up = layer(h, f"{at}.mlp.gate_proj"), layer(h, f"{at}.mlp.up_proj")
        seen.note("gates", gate)
        seen.note(f"{i}.gated", silu(gate) * up)
        added = layer(silu(gate) * up, f"{at}.mlp.down_proj")
        seen.note("added", added)
        x = x + added
    return linear(normed(x, "model.norm", "last"), weights["lm_head.weight"])


class _Converter:
    """Chooses steps, and writes weights in them. A step is what one stands for in a whole number."""

    def __init__(self, shape: Shape, weights: dict[str, np.ndarray], seen: Seen) -> None:
        self._shape, self._weights, self._seen = shape, weights, seen
        self._residual = max(np.abs(seen["embedded"]).max(), np.abs(seen["added"]).max()) / 2**19
        self._gate = max(np.abs(seen["gates"]).max() * 1.25, 4.0) / (SILU_STEPS // 2)
        self._silu_bits = int(log2(LARGEST_OUTPUT / (self._gate * SILU_STEPS / 2)))

    def made(self, turns: np.ndarray, tokens: Tokens) -> IntegerModel:
        """All of it. turns: of each pair of a head from one place to the next, in full turns, float64 [E / 2]."""
        weights, last = self._weights, self._weights["model.norm.weight"]
        norm, step = self._norm("last", weights["lm_head.weight"] * last)
        head = _linear(weights["lm_head.weight"] * last * step, np.full(self._shape.vocabulary, np.log(2) / LOGIT_OCTAVE))
        gates = (np.arange(SILU_STEPS) - SILU_STEPS // 2) * self._gate
        sine = np.sin(np.arange(SINE_STEPS) * (2 * pi / SINE_STEPS))
        return IntegerModel(
            shape=self._shape,
            layers=tuple(self._layer(i) for i in range(self._shape.layers)),
            norm=norm,
            head=head,
            phases=np.round(turns * 2**32).astype(np.uint32),
            sine=np.round(sine * 2**14).astype(np.int16),
            silu=np.round(gates / (1 + np.exp(-gates)) * 2**self._silu_bits).astype(np.int16),
            tokens=tokens,
            **self._embedding(head, last * step),
        )

    def _layer(self, i: int) -> Layer:
        shape, weights, seen = self._shape, self._weights, self._seen
        at = f"model.layers.{i}"

        def stacked(names: Sequence[str], part: str) -> np.ndarray | None:
            found = [weights.get(f"{at}.{name}.{part}") for name in names]
            return None if found[0] is None else np.concatenate([each for each in found if each is not None])

        projections = [f"self_attn.{which}_proj" for which in "qkv"]
        qkv, bias = stacked(projections, "weight"), stacked(projections, "bias")
        assert qkv is not None
        qkv = qkv * weights[f"{at}.input_layernorm.weight"]
        attention_norm, attention_step = self._norm(f"{i}.attention", qkv)
        score, score_shift, q_step, k_step = _scores(seen[f"{i}.queries"], seen[f"{i}.keys"])
        values = seen[f"{i}.values"]
        v_step = _best_step(values.reshape(len(values), -1), each=True).reshape(shape.groups, shape.head)
        each_head = np.repeat(v_step, shape.heads // shape.groups, 0)
        mixed = seen[f"{i}.mixed"] / each_head
        gain = min(int(2**GAIN_BITS / _best_step(mixed.reshape(-1, 1))[0]), (16 << GAIN_BITS) - 1)
        out_step = (each_head * 2**GAIN_BITS / gain).reshape(-1)
        turned = 2.0**-6
        steps = np.concatenate(
            [np.repeat(q_step, shape.head) * turned, np.repeat(k_step, shape.head) * turned, v_step.reshape(-1) / 2**VALUE_SHIFT]
        )
        gate_up = stacked(["mlp.gate_proj", "mlp.up_proj"], "weight")
        assert gate_up is not None
        gate_up = gate_up * weights[f"{at}.post_attention_layernorm.weight"]
        mlp_norm, mlp_step = self._norm(f"{i}.mlp", gate_up)
        gated_step = _best_step(seen[f"{i}.gated"], each=True)
        gated_shift = self._silu_bits + 2
        residual = np.full(shape.hidden, self._residual)
        return Layer(
            attention_norm=attention_norm,
            qkv=_linear(qkv * attention_step, steps, bias),
            score=score,
            score_shift=score_shift,
            gain=gain,
            out=_linear(weights[f"{at}.self_attn.o_proj.weight"] * out_step, residual, weights.get(f"{at}.self_attn.o_proj.bias")),
            mlp_norm=mlp_norm,
            gate_up=_linear(
                gate_up * mlp_step,
                np.concatenate([np.full(shape.inner, self._gate), gated_step * 2.0 ** (self._silu_bits - gated_shift)]),
                stacked(["mlp.gate_proj", "mlp.up_proj"], "bias"),
            ),
            gated_shift=gated_shift,
            down=_linear(weights[f"{at}.mlp.down_proj.weight"] * gated_step, residual, weights.get(f"{at}.mlp.down_proj.bias")),
        )

    def _norm(self, name: str, follows_OD: np.ndarray) -> tuple[Norm, float]:
        """The norm whose values the weights take, and the step in which it gives them."""
        step = float(_best_step(self._seen[name], np.square(follows_OD).sum(0))[0])
        hidden = self._shape.hidden
        shift = next(bits for bits in range(20, 0, -1) if hidden * 4.0 ** (bits - self._shape.square_shift) / step**2 < 2**42)
        return Norm(square=round(hidden * 4.0 ** (shift - self._shape.square_shift) / step**2), shift=shift), step

    def _embedding(self, head: Linear, head_step_D: np.ndarray) -> dict[str, Any]:
        """That of the head, if it is the same and its values in the norm's steps are alike enough; else its own."""
        own = self._weights["model.embed_tokens.weight"]
        alike = np.abs(head_step_D).max() < 4 * np.abs(head_step_D).min()
        if alike and np.array_equal(own, self._weights["lm_head.weight"]):
            embedding, scale = None, None
            gain = np.log(2) / LOGIT_OCTAVE * 2.0**-head.shift / (head_step_D * self._residual)
        else:
            step = float(np.abs(own).max()) / 2**13
            linear = _linear(own, np.full(len(own), step))
            embedding, scale = linear.weight, linear.scale
            gain = np.full(self._shape.hidden, step * 2.0**-linear.shift / self._residual)
        shift = min(30, int(log2(LARGEST_OUTPUT / np.abs(gain).max())))
        return {
            "embedding": embedding,
            "embedding_scale": scale,
            "embedding_gain": np.round(gain * 2.0**shift).astype(np.int16),
            "embedding_shift": shift,
        }


def _linear(weight_OI: np.ndarray, step_O: np.ndarray, bias_O: np.ndarray | None = None) -> Linear:
    """Weights that give outputs in these steps, with the largest scales whose sums stay within 32 bits."""
    weight_OI = weight_OI.astype(np.float64)
    ratio = _best_step(weight_OI.T, each=True, largest=LARGEST_WEIGHT) / step_O
    for shift in range(30, 0, -1):
        scale = np.maximum(1, np.round(ratio * 2.0**shift))
        bias = np.round((0 if bias_O is None else bias_O) / step_O * 2.0**shift) + 2 ** (shift - 1)
        if scale.max() >= 2**16 or np.abs(bias).max() >= 2**31:
            continue
        weight = np.round(weight_OI / (step_O * scale * 2.0**-shift)[:, None]).clip(-LARGEST_WEIGHT, LARGEST_WEIGHT)
        made = Linear(weight=weight.astype(np.int8), scale=scale.astype(np.uint16), bias=bias.astype(np.int32), shift=shift)
        if made.fault() is None:
            return made
    raise RecipeError(
        f"the weights of this model cannot be written in whole numbers up to {LARGEST_WEIGHT}",
        why=f"what one of them gives is {ratio.max() * LARGEST_WEIGHT * LARGEST_ACTIVATION:.3g} times the step of its output",
        fix="train it longer, or use FloatPredictor",
    )


def _scores(q_NHE: np.ndarray, k_NGE: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(multiplier [H], shift [H]) of scores, and the steps of queries [H] and keys [G] that fit them exactly."""
    heads, head = q_NHE.shape[1:]
    k_step = np.array([_best_step(k_NGE[:, g].reshape(-1, 1))[0] for g in range(k_NGE.shape[1])])
    score, shifts, q_step = [], [], []
    for h in range(heads):
        to_steps = k_step[h * len(k_step) // heads] * SCORE_OCTAVE / np.log(2) / head**0.5
        wanted = _best_step(q_NHE[:, h].reshape(-1, 1))[0] * to_steps
        # A coarser step than wanted where scores hardly differ: what must not be seen stays far below them.
        shift = int(np.clip(8 - ceil(log2(wanted)), 1, 20))
        score.append(int(np.clip(ceil(wanted * 2.0**shift), 128, 255)))
        shifts.append(shift)
        q_step.append(score[-1] * 2.0**-shift / to_steps)
    return np.array(score, np.uint8), np.array(shifts, np.uint8), np.array(q_step), k_step


def _best_step(
    values_NC: np.ndarray, weight_C: np.ndarray | None = None, *, each: bool = False, largest: int = LARGEST_ACTIVATION
) -> np.ndarray:
    """The step that rounds and cuts values with the least mean square error: one [1], or one for each column [C]."""
    weight = np.ones(values_NC.shape[1]) if weight_C is None else weight_C
    most = np.maximum(np.abs(values_NC).max(0 if each else None, keepdims=True).reshape(-1), 1e-9)
    best, least = most / largest, np.full(most.shape, np.inf)
    for share in np.geomspace(1, 0.1, 16):
        step = most * share / largest
        rounded = np.clip(np.round(values_NC / step), -largest, largest) * step
        error = (np.square(values_NC - rounded) * weight).sum(0)
        error = error if each else error.sum(keepdims=True)
        best, least = np.where(error < least, step, best), np.minimum(error, least)
    return best
