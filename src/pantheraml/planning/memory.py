"""How many bytes a training step needs, from the structure of a decoder layer. Needs no torch.

The coefficients are read off what autograd keeps for the stock transformers modules under autocast
(torch 2.13, transformers 5.23, peft 0.21); tests/planning/test_memory_calibration.py counts them again.

Letters: D hidden, Q = heads * head_dim, K = kv_heads * head_dim, F intermediate, V vocabulary, T row length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pantheraml.planning.shape import ModelShape

Level = Literal["keep", "cheap", "all", "tiled", "offload"]
"""What a layer does between forward and backward. keep: everything that backward needs is kept. cheap: results of norms and
gates are computed again. all: only the layer's input is kept, the rest is computed again. tiled: the same, with the MLP taken
a piece of the tokens at a time. offload: like all, with the input in ordinary memory."""
TILE_TOKENS = 1024
"""Tokens of a piece of the MLP at the level `tiled`."""
LOSS_CHUNK_TOKENS = 1024
"""Labelled tokens whose logits the fused output head holds at once."""
OPTIMIZER_BYTES: Mapping[str, float] = {"float32": 8, "8bit": 2 + 2 * 4 / 256, "paged": 2 + 2 * 4 / 256}
"""optim.states of a recipe -> bytes of both moments of a weight. In 8 bits each block of 256 has a float32 scale."""
RUNTIME_BYTES = 512 << 20
"""Head-room for what is loaded after the probe. On CPU transformers, peft and a first step took 150 MiB more
(torch 2.13); the rest is for workspaces of matrix libraries and for gaps between allocations."""

# Families whose attention normalises each head of q and k, and those with a norm after each block as well.
_HEAD_NORMS = frozenset({"qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2"})
_FOUR_NORMS = frozenset({"gemma2", "gemma3", "gemma3_text"})


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


def layer_bytes_per_token(shape: ModelShape, *, compute_bytes_each: int, row_tokens: int, attention: str, lora_rank: int | None) -> int:
    """Bytes that one decoder layer keeps for backward, for each token.

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
    checkpointing: bool,
    attention: str,
    compute_bytes_each: int,
    lora_rank: int | None,
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
        checkpointing: keep each layer's input and compute the rest again, a layer at a time.
        compute_bytes_each: of the arithmetic: 2 under autocast, 4 in float32.
        lora_rank: None for full fine-tuning.
        runtime_bytes: libraries and workspaces; see RUNTIME_BYTES.

    Not counted: experts of a mixture beyond `intermediate`, states of state-space layers, soft-capped attention scores.
    """
    full, low = lora_rank is None, compute_bytes_each < 4
    frozen = shape.parameters - trainable_parameters if full else shape.parameters
    weights = int(frozen * base_bytes_each) + trainable_parameters * train_bytes_each
    # Autocast casts each trained matrix once and keeps the casts until the forward is over, or until backward where autograd needs them.
    matrices = sum(n_in * n_out for n_in, n_out in shape.linears) + shape.vocab * shape.hidden
    casts = compute_bytes_each * (matrices if full else trainable_parameters) if low else 0

    layer = layer_bytes_per_token(
        shape, compute_bytes_each=compute_bytes_each, row_tokens=row_tokens, attention=attention, lora_rank=lora_rank
    )
    # Between layers flows float32 if the embedding trains (it is a float32 weight), else the compute dtype.
    between = shape.hidden * (4 if full else compute_bytes_each)
    if checkpointing:
        # Busiest at the end of forward, with all casts, or in backward, with one layer computed again.
        kept = micro_tokens * shape.layers * between + max(casts, micro_tokens * layer + casts // shape.layers)
    else:
        kept = micro_tokens * shape.layers * layer + casts
    # The last norm, the loss's input and gradient; the mask; and while a layer runs, two of its widest tensors
    # (in float32 with LoRA, because peft computes there).
    widest = max(shape.intermediate, shape.hidden)
    ends = 3 * 4 * shape.hidden + row_tokens + 2 * widest * (compute_bytes_each if full else 4)
    return MemoryEstimate(
        weights_bytes=weights,
        gradients_bytes=trainable_parameters * train_bytes_each,
        optimizer_bytes=int(trainable_parameters * optimizer_bytes_each),
        activations_bytes=kept + micro_tokens * ends,
        # Logits, their softmax and their gradient in float32, one chunk at a time; the head's own gradient waits for backward.
        logits_bytes=min(LOSS_CHUNK_TOKENS, micro_tokens) * shape.vocab * 4 * 3 + (shape.vocab * shape.hidden * 4 if full else 0),
        runtime_bytes=runtime_bytes,
    )
