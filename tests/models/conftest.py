from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.fakes import laptop

from pantheraml.data.chat import Example
from pantheraml.models.load import shape_of
from pantheraml.models.tiny import tiny_config, tiny_tokenizer
from pantheraml.planning.plan import Plan, make_plan
from pantheraml.recipe.types import Recipe

LAYER_TYPES = ["sliding_attention", "full_attention"]
# What would not show at the usual sizes: windows shorter than the examples, logits that reach their bound.
TELLING: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "layer_types": LAYER_TYPES, "final_logit_softcapping": 1.0, "attn_logit_softcapping": 1.0},
    "gemma3_text": {"sliding_window": 8, "layer_types": LAYER_TYPES, "final_logit_softcapping": 1.0},
    "cohere2": {"sliding_window": 8, "layer_types": LAYER_TYPES},
}


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Products this small gain nothing from threads, which only wait for each other where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def small() -> Callable[..., Any]:
    """A model of two layers of a family; large random weights, so that its logits differ from each other."""
    from transformers import AutoModelForCausalLM

    def made(family: str, *, seed: int = 0, **sizes: Any) -> Any:
        config = tiny_config(family, **{"num_hidden_layers": 2, "initializer_range": 0.1, **TELLING.get(family, {}), **sizes})
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config).eval()

    return made


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Five of different lengths; the second half of each is learned, with a gap."""
    drawn = np.random.default_rng(0)

    def example(length: int, line: int) -> Example:
        loss = np.arange(length) >= length // 2
        loss[3 * length // 4] = False
        return Example(drawn.integers(7, 263, length).astype(np.int32), loss, f"rows:{line}")

    return [example(length, line) for line, length in enumerate((5, 19, 12, 3, 30))]


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., Plan]:
    """The plan for a model that is here, on a laptop; rows of 32 tokens, two at once."""

    def made(model: Any, **parts: Any) -> Plan:
        asked = {"model": {"name": "here", "max_tokens": 32}, "data": "rows", "batch": {"size": 5, "micro_tokens": 64}, **parts}
        return make_plan(Recipe.model_validate(asked), laptop(), shape_of(model, "here"), longest_example=32)

    return made
