"""How many bytes a training step needs, from the structure of a decoder layer. Needs no torch.

The coefficients are what our kernels keep for backward, and for layers that they do not compute, what autograd keeps for the
stock transformers modules under autocast (torch 2.13, transformers 5.23, peft 0.21); tests/planning/test_memory_calibration.py
counts both again.

Letters: D hidden, Q = heads * head_dim, K = kv_heads * head_dim, F intermediate, V vocabulary, T row length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pantheraml.planning.shape import ModelShape

Level = Literal["keep", "cheap", "all", "tiled", "offload"]
"""What a layer does between forward and backward. keep: everything that backward needs is kept. cheap: results of norms and
gates are computed again. all: only the layer's input is kept, the rest is computed again. tiled: the same, with the MLP taken
a piece of the tokens at a time. offload: like tiled, with the input in ordinary memory."""
TILED: frozenset[Level] = frozenset({"tiled", "offload"})
TILE_TOKENS = 1024
"""Tokens of a piece of the MLP at these levels."""
RECOMPUTED: frozenset[Level] = frozenset({"all", "tiled", "offload"})
"""Levels at which a layer's products are computed a second time."""
LOSS_CHUNK_BYTES = 80 << 20
LOSS_CHUNK_TOKENS = 1024
"""Labelled tokens whose logits the fused output head holds at once: so many, or as many as have LOSS_CHUNK_BYTES of logits, but 128."""
OPTIMIZER_BYTES: Mapping[str, float] = {"float32": 8, "8bit": 2 + 2 * 4 / 256, "paged": 2 + 2 * 4 / 256}
"""optim.states of a recipe -> bytes of both moments of a weight. In 8 bits each block of 256 has a float32 scale."""
RUNTIME_BYTES = 512 << 20
"""Head-room for what is loaded after the probe. On CPU transformers, peft and a first step took 150 MiB more
(torch 2.13); the rest is for workspaces of matrix libraries and for gaps between allocations."""

# Families whose attention normalises each head of q and k, and those with a norm after each block as well.
_HEAD_NORMS = frozenset({"qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2"})
_FOUR_NORMS = frozenset({"gemma2", "gemma3", "gemma3_text"})
_ONE_NORM = frozenset({"cohere", "cohere2"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes at the busiest moment of a step, by what holds them; casts of trained weights are with the activations."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    runtime_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.logits_bytes
            + self.runtime_bytes
        )


def format_bytes(size_bytes: int | None) -> str:
    """`3.2 GiB`, `410 MiB`, `12 KiB`; None is `unknown`."""
    if size_bytes is None:
        return "unknown"
    if size_bytes >= 1 << 30:
        return f"{size_bytes / (1 << 30):.1f} GiB"
    if size_bytes >= 1 << 20:
        return f"{size_bytes / (1 << 20):.0f} MiB"
    return f"{size_bytes / (1 << 10):.0f} KiB"


def loss_chunk(vocab: int, compute_bytes_each: int) -> int:
    """Labelled tokens whose logits are held at once; fewer where the vocabulary is large, down to what keeps products fast."""
    return min(LOSS_CHUNK_TOKENS, max(128, LOSS_CHUNK_BYTES // (vocab * compute_bytes_each) // 64 * 64))


def fused_layer_bytes_per_token(
    shape: ModelShape, level: Level, *, compute_bytes_each: int, lora_rank: int | None, exchanged: bool = False
) -> int:
    """Bytes that one decoder layer keeps for backward, for each token, where the kernels compute it.

    cheap: the inputs of both norms and their scales, q and k rotated, v, what attention gives and its sums, gate and up, and
    the skinny product of each adapter. keep: also the results of norms and of the gate. exchanged: see `estimate_memory`.
    """
    if level in RECOMPUTED:
        return 0 if level == "offload" else shape.hidden * compute_bytes_each
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    numbers = 2 * shape.hidden + (3 if exchanged else 2) * q + 2 * k + 2 * shape.intermediate + 7 * (lora_rank or 0)
    floats = 2 + shape.heads
    if level == "keep":
        numbers += 2 * shape.hidden + shape.intermediate
    if shape.family in _HEAD_NORMS:
        numbers, floats = numbers + q + k, floats + shape.heads + shape.kv_heads
    if shape.family in _FOUR_NORMS:
        numbers, floats = numbers + 2 * shape.hidden, floats + 2
    if shape.family in _ONE_NORM:  # transformers' own, which keeps float32, and its result; there is no second one
        numbers -= (3 if level == "keep" else 1) * shape.hidden
        floats += (3 if lora_rank is None else 2) * shape.hidden - 1
    return numbers * compute_bytes_each + 4 * floats


def layer_bytes_per_token(shape: ModelShape, *, compute_bytes_each: int, row_tokens: int, attention: str, lora_rank: int | None) -> int:
    """Bytes that one decoder layer of transformers keeps for backward, for each token.

    Args:
        compute_bytes_each: 2 under bfloat16 autocast, 4 in float32.
        row_tokens: T; attention that sees a mask keeps T values a token.
        attention: transformers' name. sdpa is counted with a mask, as packed rows need one.
        lora_rank: rank of an adapter on every linear layer with the rest frozen; None: all weights train.
    """
    c, full, low = compute_bytes_each, lora_rank is None, compute_bytes_each < 4
    hidden, inner, heads = shape.hidden, shape.intermediate, shape.heads
    q, k = heads * shape.head_dim, shape.kv_heads * shape.head_dim

    # RMSNorm computes in float32 and keeps its input so; the normed value only if its own weight trains.
    norms = (4 if shape.family in _FOUR_NORMS else 2) * (hidden * (8 if full else 4) + 4)
    if shape.family in _HEAD_NORMS:
        norms += (q + k) * (4 + (c if full else 0)) + 4 * (heads + shape.kv_heads)

    # q, k, v, gate and up: under autocast each linear keeps its own cast of the shared input.
    inputs = hidden * (5 * c if low else 2 * c)
    # gate, up, act(gate), and act(gate) * up.
    mlp = 4 * inner * c
    if attention == "eager":
        # q, k and v (repeated to all heads), then the softmax in float32 and, if lower, its cast.
        attend = 3 * q * c + heads * row_tokens * (4 + (c if low else 0))
        attend += q * c  # the output, as o's input
    elif attention == "flash_attention_2":
        attend = (2 * q + 2 * k) * c + heads * 4  # unrepeated k and v, no mask, log-sum-exp
    else:
        attend = 4 * q * c + row_tokens * c + heads * 4  # the boolean mask is cast anew in each layer
    lora = 0
    if lora_rank is not None:
        lora = 7 * lora_rank * c
        # peft casts an adapter's input to float32 and autocast casts it back: a copy beside the one kept above.
        if low and attention != "eager":
            lora += q * c
    return norms + inputs + mlp + attend + lora


def estimate_memory(
    shape: ModelShape,
    *,
    trainable_parameters: int,
    base_bytes_each: float,
    micro_tokens: int,
    row_tokens: int,
    levels: Sequence[Level],
    attention: str,
    compute_bytes_each: int,
    lora_rank: int | None,
    fused: bool = False,
    xla: bool = False,
    exchanged: bool = False,
    train_bytes_each: int = 4,
    optimizer_bytes_each: float = OPTIMIZER_BYTES["float32"],
    runtime_bytes: int = RUNTIME_BYTES,
) -> MemoryEstimate:
    """Bytes at the busiest moment of a step of AdamW.

    Args:
        trainable_parameters: with LoRA, those of the adapter; without, all.
        base_bytes_each: of a frozen weight: 4, 2, or about 0.6 in NF4.
        train_bytes_each: of a weight that trains, and of its gradient (float32: 4).
        optimizer_bytes_each: of both moments of such a weight; see OPTIMIZER_BYTES.
        micro_tokens: tokens taken at once. row_tokens: the longest row.
        levels: what each layer keeps. Stock layers in torch know two: everything, or their input.
        fused: the kernels compute the layers. xla: XLA does, from transformers' own.
        exchanged: heads are exchanged around attention (context parallel), so what it gives is kept as it was and as it came back.
        compute_bytes_each: of the arithmetic: 2 under autocast, 4 in float32.
        lora_rank: None for full fine-tuning.
        runtime_bytes: libraries and workspaces; see RUNTIME_BYTES.

    Not counted: experts of a mixture beyond `intermediate`, states of state-space layers, soft-capped attention scores.
    """
    full = lora_rank is None
    frozen = shape.parameters - trainable_parameters if full else shape.parameters
    weights = int(frozen * base_bytes_each) + trainable_parameters * train_bytes_each
    facts = (shape, tuple(levels), micro_tokens, row_tokens, attention, compute_bytes_each, lora_rank, trainable_parameters)
    activations, logits = _fused(*facts, exchanged) if fused else _traced(*facts) if xla else _stock(*facts)
    return MemoryEstimate(
        weights_bytes=weights,
        gradients_bytes=trainable_parameters * train_bytes_each,
        optimizer_bytes=int(trainable_parameters * optimizer_bytes_each),
        activations_bytes=activations,
        # The head's own gradient, in float32, waits for backward.
        logits_bytes=logits + (shape.vocab * shape.hidden * 4 if full else 0),
        runtime_bytes=runtime_bytes,
    )


def _fused(
    shape: ModelShape,
    levels: tuple[Level, ...],
    tokens: int,
    row: int,
    attention: str,
    each: int,
    rank: int | None,
    trainable: int,
    exchanged: bool,
) -> tuple[int, int]:
    """(activations, logits) where the kernels compute the layers, all tokens having a label."""

    def layer(level: Level) -> int:
        return fused_layer_bytes_per_token(shape, level, compute_bytes_each=each, lora_rank=rank, exchanged=exchanged)

    inner, hidden = shape.intermediate * each, shape.hidden * each
    kept = tokens * sum(map(layer, levels))
    # In a layer's backward: the gradient of what it gave and of the gate's product, then of gate and up, and the product again.
    working = tokens * (4 * inner + 2 * hidden)
    again = [tokens * (layer("cheap") - hidden) + working for level in levels if level in RECOMPUTED - TILED]
    if not TILED.isdisjoint(levels):
        again.append(tokens * (layer("cheap") - 2 * inner) + min(tokens, TILE_TOKENS) * (6 * inner + hidden))
    # Each weight that trains is cast for its product and the cast forgotten, and so is its gradient.
    cast = max((n_in * n_out for n_in, n_out in shape.linears), default=0) * 2 * each if rank is None and each < 4 else 0
    working = max(working if any(level not in RECOMPUTED for level in levels) else 0, *again, 0) + cast
    # The head: what it is given and its gradient, and the logits of one chunk. It is over before a layer's backward begins.
    logits = min(tokens, loss_chunk(shape.vocab, each)) * shape.vocab * each
    logits += shape.vocab * shape.hidden * each if rank is None and each < 4 else 0
    angles = tokens * 4 * shape.head_dim
    return kept + angles + max(tokens * 2 * hidden, working - logits), logits


def _stock(
    shape: ModelShape, levels: tuple[Level, ...], tokens: int, row: int, attention: str, each: int, rank: int | None, trainable: int
) -> tuple[int, int]:
    """(activations, logits) where transformers' modules compute the layers."""
    full, low = rank is None, each < 4
    # Autocast casts each trained matrix once and keeps the casts until the forward is over, or until backward where autograd needs them.
    matrices = sum(n_in * n_out for n_in, n_out in shape.linears) + shape.vocab * shape.hidden
    casts = each * (matrices if full else trainable) if low else 0
    layer = layer_bytes_per_token(shape, compute_bytes_each=each, row_tokens=row, attention=attention, lora_rank=rank)
    # Between layers flows float32 if the embedding trains (it is a float32 weight), else the compute dtype.
    between = shape.hidden * (4 if full else each)
    if any(level in RECOMPUTED for level in levels):
        # Busiest at the end of forward, with all casts, or in backward, with one layer computed again.
        kept = tokens * shape.layers * between + max(casts, tokens * layer + casts // shape.layers)
    else:
        kept = tokens * shape.layers * layer + casts
    # The last norm, the loss's input and gradient; the mask; and while a layer runs, two of its widest tensors
    # (in float32 with LoRA, because peft computes there).
    widest = max(shape.intermediate, shape.hidden)
    ends = 3 * 4 * shape.hidden + row + 2 * widest * (each if full else 4)
    return kept + tokens * ends, min(loss_chunk(shape.vocab, each), tokens) * shape.vocab * 4 * 3


_BY_XLA: dict[Level, float] = {"keep": 1.28, "cheap": 0.78}
"""Of what a layer of transformers keeps in torch, what XLA keeps: by libtpu 0.0.42 for Llama-3.1-8B and Qwen2.5-0.5B, within 3%."""


def _traced(
    shape: ModelShape, levels: tuple[Level, ...], tokens: int, row: int, attention: str, each: int, rank: int | None, trainable: int
) -> tuple[int, int]:
    """(activations, logits) where XLA computes the layers, each at its own level."""
    layer = layer_bytes_per_token(shape, compute_bytes_each=each, row_tokens=row, attention=attention, lora_rank=rank)
    each_layer = [int(layer * _BY_XLA[level]) if level in _BY_XLA else shape.hidden * each for level in levels]
    # In backward, one layer that is computed again; and what trains, cast once.
    busiest = int(layer * _BY_XLA["keep"]) if any(level in RECOMPUTED for level in levels) else 0
    casts = each * trainable if each < 4 else 0
    return tokens * (sum(each_layer) + busiest) + casts, min(loss_chunk(shape.vocab, each), tokens) * shape.vocab * 4 * 3
