"""The size of a model, in the numbers that planning needs."""

from __future__ import annotations

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
