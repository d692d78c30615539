"""How the decoder layers of each family that the kernels compute are put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """How the layers of a family are put together; names are those of its modules in transformers.

    Attributes:
        before_mlp: the norm before the MLP; None: attention and MLP stand side by side behind one norm.
        after_attention, after_mlp: norms of what a block adds (Gemma 2 and 3).
        offset: what is added to the weights of norms. plain_norm: the norm is no root mean square norm.
        qkv, gate_up: of the linear layers; one name where they are stored as one.
        interleaved: which values of a head are rotated together.
        embedding, residual: names of factors in the configuration.
        softcap: attention's scores are bounded.
        windowed: every layer has the configuration's window; otherwise its attention says which it has.
        rotates: whether a layer with this attention rotates at all.
    """

    before_mlp: str | None = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None
    offset: float = 0.0
    plain_norm: bool = False
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    interleaved: bool = False
    embedding: str | None = None
    residual: str | None = None
    softcap: bool = False
    windowed: bool = False
    rotates: Callable[[Any], bool] = lambda _: True


_FOUR_NORMS: dict[str, Any] = {
    "before_mlp": "pre_feedforward_layernorm",
    "after_attention": "post_attention_layernorm",
    "after_mlp": "post_feedforward_layernorm",
    "offset": 1.0,
}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(windowed=True),
    "qwen2": Family(),
    "qwen3": Family(),
    "granite": Family(embedding="embedding_multiplier", residual="residual_multiplier"),
    "gemma": Family(offset=1.0),
    "gemma2": Family(**_FOUR_NORMS, softcap=True),
    "gemma3_text": Family(**_FOUR_NORMS),
    "cohere": Family(before_mlp=None, plain_norm=True, interleaved=True),
    "cohere2": Family(before_mlp=None, plain_norm=True, interleaved=True, rotates=lambda attend: attend.sliding_window is not None),
    "phi3": Family(qkv=("qkv_proj",), gate_up=("gate_up_proj",), windowed=True),
}
