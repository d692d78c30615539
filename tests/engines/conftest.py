from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.fakes import laptop

from pantheraml.data.chat import Example
from pantheraml.models.load import shape_of
from pantheraml.models.tiny import tiny_config
from pantheraml.planning.plan import Plan, make_plan
from pantheraml.recipe.types import Recipe


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Products this small gain nothing from threads, which only wait for each other where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small() -> Callable[..., Any]:
    """A model of two layers; large random weights, so that its gradients are large too."""
    from transformers import AutoModelForCausalLM

    def made(family: str = "llama", *, seed: int = 0, **sizes: Any) -> Any:
        config = tiny_config(
            family, **{"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1, **sizes}
        )
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config).eval()

    return made


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Eight of different lengths; the second half of each is learned."""
    drawn = np.random.default_rng(0)
    lengths = (5, 19, 12, 3, 30, 8, 16, 9)
    return [
        Example(drawn.integers(7, 263, length).astype(np.int32), np.arange(length) >= length // 2, f"rows:{line}")
        for line, length in enumerate(lengths)
    ]


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., Plan]:
    """The plan for a model that is here, on a laptop; rows of 32 tokens, two at once."""

    def made(model: Any, **parts: Any) -> Plan:
        asked = {
            "model": {"name": "here", "max_tokens": 32, "dtype": "float32"},
            "data": "rows",
            "batch": {"size": 8, "micro_tokens": 64},
            "hardware": {"checkpointing": "off"},
            "adapter": "full",
            **parts,
        }
        return make_plan(Recipe.model_validate(asked), laptop(), shape_of(model, "here"), longest_example=32)

    return made
