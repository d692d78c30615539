from __future__ import annotations

from typing import Any

import pytest
import torch

from pantheraml.models.isolation import keeps_apart
from pantheraml.models.load import shape_of
from pantheraml.models.tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_tried_is_what_the_shape_says(family: str, dtype: torch.dtype, small: Any) -> None:
    model = small(family).to(dtype).train()
    state = torch.get_rng_state()
    assert keeps_apart(model) == shape_of(model, family).packs == (family != "falcon_h1")
    assert model.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_leak_is_found_too(dtype: torch.dtype, small: Any) -> None:
    """A state space at the weights it starts with leaks less than bfloat16 rounds."""
    assert not keeps_apart(small("falcon_h1", num_hidden_layers=4, initializer_range=0.02).to(dtype))


def test_a_model_that_looks_along_the_whole_row_is_found_out(small: Any) -> None:
    model = small("llama")

    def mixed(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.3 * output.cumsum(dim=1)

    with torch.no_grad():
        model.model.layers[0].mlp.register_forward_hook(mixed)
    assert shape_of(model, "llama").packs  # nothing in its modules says so
    assert not keeps_apart(model)


def test_a_model_on_the_host_is_tried_without_the_attention_that_needs_a_gpu(small: Any) -> None:
    for family in ("qwen2", "falcon_h1"):
        model = small(family)
        model.config._attn_implementation = "flash_attention_2"  # as it is loaded where a GPU is, to be divided
        assert keeps_apart(model) == (family == "qwen2")
        assert model.config._attn_implementation == "flash_attention_2"
