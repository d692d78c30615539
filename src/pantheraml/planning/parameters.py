"""The parameters of a model by name and shape, from its size alone: what FSDP cuts and tensor parallel divides. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pantheraml.planning.shape import ModelShape

KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "phi3"})
"""Families whose parameters are named here: those of models/families.py."""
AS_ONE = frozenset({"phi3"})
"""Those that store q, k and v as one matrix, and gate and up as another: tensor parallel cannot divide them."""
SIDE_BY_SIDE = frozenset({"cohere", "cohere2"})
"""Those whose attention and MLP stand behind one norm."""
NORMS_BEHIND = frozenset({"gemma2", "gemma3_text"})
"""Those with a norm behind attention and MLP as well."""
HEAD_NORMS = frozenset({"qwen3", "gemma3_text"})
BIASES = frozenset({"qwen2"})
"""Those with a bias in q, k and v by their configuration class; where others have one, `layer_parameters` counts it with the rest."""

Size = tuple[int, ...]
Parameters = list[tuple[str, Size]]
"""(name, shape) of each."""


def layer_parameters(shape: ModelShape) -> Parameters:
    """Those of one decoder layer without adapters: (name within the layer, shape), as transformers has them.

    What a model has beyond its family's (a bias here and there), and norms of families that are not known, are `others`, one vector.
    """
    found = _named(shape) if shape.family in KNOWN else _linears(shape)
    left = shape.parameters - _count(outer_parameters(shape)) - shape.layers * _count(found)
    return [*found, ("others", (left // shape.layers,))] if left >= shape.layers else found


def outer_parameters(shape: ModelShape) -> Parameters:
    """Those outside the layers: embedding, last norm, and the head where it is a matrix of its own."""
    own_head = shape.embedding_parameters > shape.vocab * shape.hidden
    matrix = (shape.vocab, shape.hidden)
    return [("embed_tokens.weight", matrix), ("norm.weight", (shape.hidden,)), *([("lm_head.weight", matrix)] if own_head else [])]


def divided(shape: ModelShape, tp: int) -> ModelShape:
    """What one of the processes of tensor parallel has: q, k, v, gate and up by outputs, o and down by inputs; the rest is whole.

    Raises: ValueError for a family that is not known, or where tp does not divide.
    """
    if tp == 1:
        return shape
    if shape.family not in KNOWN - AS_ONE or shape.heads % tp or shape.kv_heads % tp or shape.intermediate % tp:
        raise ValueError(f"the products of {shape.name} ({shape.family}) do not divide into {tp}")
    part = replace(shape, heads=shape.heads // tp, kv_heads=shape.kv_heads // tp, intermediate=shape.intermediate // tp)
    layer = _named(part)
    return replace(
        part,
        parameters=shape.parameters - shape.layers * (_count(_named(shape)) - _count(layer)),
        linears=tuple((size[1], size[0]) for name, size in layer if is_linear(name, size)) * shape.layers,
    )


def is_linear(name: str, size: Size) -> bool:
    """Whether a parameter of a layer is the matrix of a linear layer."""
    return len(size) == 2 and name.endswith(("proj.weight", "linear.weight"))


def _named(shape: ModelShape) -> Parameters:
    hidden, inner = shape.hidden, shape.intermediate
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes: dict[str, Size] = {"input_layernorm.weight": (hidden,)}
    if shape.family in AS_ONE:
        sizes |= {"self_attn.qkv_proj.weight": (q + 2 * k, hidden), "mlp.gate_up_proj.weight": (2 * inner, hidden)}
    else:
        outputs = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": k}
        sizes |= {f"{name}.weight": (n, hidden) for name, n in outputs.items()}
        sizes |= {f"{name}.bias": (n,) for name, n in outputs.items() if shape.family in BIASES}
        sizes |= {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden)}
    sizes |= {"self_attn.o_proj.weight": (hidden, q), "mlp.down_proj.weight": (hidden, inner)}
    if shape.family in HEAD_NORMS:
        sizes |= {"self_attn.q_norm.weight": (shape.head_dim,), "self_attn.k_norm.weight": (shape.head_dim,)}
    if shape.family not in SIDE_BY_SIDE:
        sizes["post_attention_layernorm.weight"] = (hidden,)
    if shape.family in NORMS_BEHIND:
        sizes |= {"pre_feedforward_layernorm.weight": (hidden,), "post_feedforward_layernorm.weight": (hidden,)}
    return list(sizes.items())


def _linears(shape: ModelShape) -> Parameters:
    """Linear layers of a family that is not known: those of one layer, if all have as many."""
    each, left = divmod(len(shape.linears), shape.layers)
    return [] if left else [(f"{i}.linear.weight", (n_out, n_in)) for i, (n_in, n_out) in enumerate(shape.linears[:each])]


def _count(parameters: Parameters) -> int:
    return sum(math.prod(size) for _, size in parameters)


# How FSDP2 holds them.


def stored(parameters: Parameters, each: int, quantizer: str | None = None) -> list[tuple[Size, int]]:
    """(shape, bytes of an entry) as FSDP sees them: a matrix in four bits is one row of bytes, and its scales stay whole."""
    return [((-(-math.prod(size) // 2),), 1) if quantizer == "nf4" and is_linear(name, size) else (size, each) for name, size in parameters]


def part_bytes(tensors: Sequence[tuple[Size, int]], fsdp: int) -> int:
    """What a process keeps of them: each is cut along its first dimension, which is filled up to a multiple of fsdp."""
    return sum(part(size, fsdp) * each for size, each in tensors)


def part(size: Size, fsdp: int) -> int:
    """Numbers in the first process's part."""
    return -(-size[0] // fsdp) * math.prod(size[1:])


# What tensor parallel divides.

_BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_INPUTS = ("o_proj.weight", "down_proj.weight")


def is_divided(name: str) -> bool:
    """Whether tensor parallel keeps a part of a layer's parameter."""
    return name.endswith(_BY_INPUTS) or name.rpartition(".")[0].endswith(_BY_OUTPUTS)


def is_partial(name: str, shape: ModelShape) -> bool:
    """Whether a norm stands between the beginning and the end of a divided product, so that each process has a part of its gradient."""
    before_mlp = "pre_feedforward_layernorm" if shape.family in NORMS_BEHIND else "post_attention_layernorm"
    return name.startswith(("input_layernorm", before_mlp, "self_attn.q_norm", "self_attn.k_norm"))
