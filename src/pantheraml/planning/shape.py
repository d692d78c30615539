"""The size of a model, in the numbers that planning needs."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Dimensions of a causal language model, read from its configuration before any weight is loaded.

    Attributes:
        family: transformers' `model_type`.
        parameters: all weights, tied ones once (exact: counted on the meta device).
        embedding_parameters: of these, in the input embedding and, if it is not tied, the output head.
        linears: (in, out) of every linear layer that a LoRA may target, the output head left out.
        layers, hidden, vocab, heads, kv_heads, head_dim, intermediate: as in the configuration.
        max_tokens: longest position the model was made for.
        packs: False where layers carry state across tokens in a way that cannot be isolated (state space models).
        weight_bytes_each: bytes per weight as stored by its authors (2 for bfloat16).
        fused: the kernels compute its layers (models/decoder.py).
        attention: implementations that the model class has (attn_implementation names of transformers).
    """

    name: str
    family: str
    parameters: int
    embedding_parameters: int
    linears: tuple[tuple[int, int], ...]
    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    max_tokens: int
    packs: bool
    weight_bytes_each: int
    attention: tuple[str, ...] = ("sdpa", "eager")
    fused: bool = False

    def lora_parameters(self, rank: int) -> int:
        """Parameters that a LoRA of this rank on all linear layers adds."""
        return sum(rank * (n_in + n_out) for n_in, n_out in self.linears)


# Layers, hidden, intermediate, heads, key heads, vocabulary, whether the head is the input embedding: of SmolLM2-135M, Qwen2.5-0.5B,
# Llama-3.2-1B and 3B, Llama-3.1-8B, Qwen2.5-14B and 32B, Llama-3.1-70B and 405B, as their config.json has them.
_PUBLISHED = (
    (30, 576, 1536, 9, 3, 49_152, True),
    (24, 896, 4864, 14, 2, 151_936, True),
    (16, 2048, 8192, 32, 8, 128_256, True),
    (28, 3072, 8192, 24, 8, 128_256, True),
    (32, 4096, 14_336, 32, 8, 128_256, False),
    (48, 5120, 13_824, 40, 8, 152_064, False),
    (64, 5120, 27_648, 40, 8, 152_064, False),
    (80, 8192, 28_672, 64, 8, 128_256, False),
    (126, 16_384, 53_248, 128, 8, 128_256, False),
)


def typical_shape(parameters: float) -> ModelShape:
    """A model of about so many parameters: the published one that is nearest, with as many layers as that makes."""

    def made(row: tuple[int, int, int, int, int, int, bool], layers: int) -> ModelShape:
        _, hidden, intermediate, heads, kv_heads, vocab, tied = row
        width = hidden // heads
        linears = (
            (hidden, heads * width),
            *[(hidden, kv_heads * width)] * 2,
            (heads * width, hidden),
            *[(hidden, intermediate)] * 2,
            (intermediate, hidden),
        )
        embedding = vocab * hidden * (1 if tied else 2)
        return ModelShape(
            name=f"a model of {parameters / 1e9:.3g} billion parameters",
            family="llama",
            parameters=embedding + layers * sum(n_in * n_out for n_in, n_out in linears),
            embedding_parameters=embedding,
            linears=linears * layers,
            layers=layers,
            hidden=hidden,
            vocab=vocab,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=width,
            intermediate=intermediate,
            max_tokens=131_072,
            packs=True,
            weight_bytes_each=2,
        )

    row = min(_PUBLISHED, key=lambda each: abs(math.log(made(each, each[0]).parameters / parameters)))
    whole = made(row, row[0])
    each_layer = (whole.parameters - whole.embedding_parameters) / row[0]
    return made(row, max(1, round((parameters - whole.embedding_parameters) / each_layer)))
