"""Small models in whole numbers, made here from random weights."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pantheraml.hardware.device import Device
from pantheraml.memory.calibrate import calibrate
from pantheraml.memory.tokens import Tokens
from pantheraml.models.tiny import tiny_config, tiny_tokenizer

CPU = Device(kind="cpu", index=0, name="test", memory_bytes=None, free_bytes=None, dtypes=("float32",))
SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 24,
}


@lru_cache
def tokens() -> Tokens:
    """A token a byte, and a few more."""
    return Tokens.of(tiny_tokenizer().backend_tokenizer, begin=1)


def float_model(family: str = "llama", *, seed: int = 0, spread: float = 0.3, **sizes: Any) -> Any:
    """Random weights, wide enough that tokens are far from equally likely."""
    config = tiny_config(family, **{**SMALL, "initializer_range": spread, **sizes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, spread)
    return model


@lru_cache
def model_file(family: str = "llama", tied: bool = True, seed: int = 0) -> bytes:
    """A model's file."""
    model = float_model(family, seed=seed, tie_word_embeddings=tied)
    return calibrate(model, tokens(), contents(20, 24, seed=1)).to_bytes()


def contents(count: int, longest: int, *, seed: int = 0, fewest: int = 1) -> list[np.ndarray]:
    """Random tokens that stand for bytes, int32 [T] each."""
    draw = np.random.default_rng(seed)
    return [draw.integers(7, 263, draw.integers(fewest, longest + 1)).astype(np.int32) for _ in range(count)]
