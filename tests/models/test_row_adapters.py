"""Adapters chosen row by row against PEFT with one of them at a time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

from pantheraml.errors import RecipeError
from pantheraml.models.batch import Batcher
from pantheraml.models.request import Request
from pantheraml.models.row_adapters import AdapterChoice, row_adapters

# Other ranks, other layers, and another scale.
ADAPTERS: dict[str, dict[str, Any]] = {
    "wide": {"r": 6, "lora_alpha": 12, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "narrow": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
    "rooted": {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": ["v_proj", "lm_head"]},
}


def config(**parts: Any) -> LoraConfig:
    return LoraConfig(task_type=TaskType.CAUSAL_LM, **parts)


def adapted(model: Any, adapters: dict[str, dict[str, Any]] = ADAPTERS) -> Any:
    tuned: Any = None
    for name, parts in adapters.items():
        if tuned is None:
            tuned = get_peft_model(model, config(**parts), adapter_name=name)
        else:
            tuned.add_adapter(name, config(**parts))
    with torch.no_grad():
        for place, weight in tuned.named_parameters():
            if ".lora_B." in place:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(len(place)))
    return tuned.eval()


def asked() -> list[Request]:
    names = [None, *ADAPTERS]
    return [Request(prompt=(1, 40, 50, 60 + i % 3), max_new_tokens=8, adapter=names[i % 4], logprobs=True) for i in range(12)]


def alone(model: Any, request: Request) -> tuple[int, ...]:
    """PEFT's answer with one adapter, or with none."""
    if request.adapter is not None:
        model.set_adapter(request.adapter)
    ids = torch.tensor([request.prompt])
    with nullcontext() if request.adapter is not None else model.disable_adapter(), torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=0)
    tokens = out[0, ids.shape[1] :].tolist()
    return tuple(tokens[: tokens.index(2)] if 2 in tokens else tokens)


def test_each_row_of_a_layer_gets_its_own_addition(small: Any) -> None:
    model = adapted(small("llama"))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(4, 5, 128, generator=torch.Generator().manual_seed(0))
    wanted = []
    for i, name in enumerate([None, *ADAPTERS]):
        if name is not None:
            model.set_adapter(name)
        with nullcontext() if name is not None else model.disable_adapter():
            wanted.append(layer(x[i]))
    choice = AdapterChoice([*ADAPTERS])
    with row_adapters(model, choice) as names, torch.no_grad():
        assert len(names) == 7 * 2 + 1
        choice.choose([0, 1, 2, 3], x.device)
        found = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")(x)
    # Sums in another order, in float32; a row without an adapter has not changed by a bit.
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-5)
    assert found[0].equal(wanted[0])
    assert (found[1] - layer.base_layer(x[1])).norm() > 0.1
    assert model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj") is layer


def test_answers_with_several_adapters_are_those_of_each_alone(small: Any, tokenizer: Any) -> None:
    model = adapted(small("llama"))
    requests = asked()
    wanted = [alone(model, request) for request in requests]
    assert len({wanted[i] for i in range(4)}) == 4  # the adapters matter
    for how in ({}, {"steady": False}):
        batcher = Batcher(model, tokenizer, rows=9, tokens=32, adapters=[*ADAPTERS], **how)
        assert [answer.tokens for answer in batcher.run(requests)] == wanted


def test_the_adapter_of_a_neighbour_changes_nothing(small: Any, tokenizer: Any) -> None:
    batcher = Batcher(adapted(small("llama")), tokenizer, rows=9, tokens=32, adapters=[*ADAPTERS])
    together = [answer.logprobs for answer in batcher.run(asked())]
    assert together == [batcher.run([request])[0].logprobs for request in asked()]


def test_prompts_are_shared_by_answers_of_the_same_adapter_alone(small: Any, tokenizer: Any) -> None:
    model = adapted(small("llama"))
    prompt = tuple(range(20, 60))
    requests = [Request(prompt=prompt, max_new_tokens=4, adapter=name) for name in ("wide", "narrow", "wide", None)]
    batcher = Batcher(model, tokenizer, rows=4, tokens=64, chunk=16, adapters=["wide", "narrow"])
    answers = batcher.run(requests)
    assert [answer.shared_tokens for answer in answers] == [0, 0, 32, 0]
    assert answers[0].tokens == answers[2].tokens != answers[1].tokens


def test_without_names_the_model_answers_as_it_is(small: Any, tokenizer: Any) -> None:
    model = adapted(small("llama"))
    model.set_adapter("wide")
    request = Request(prompt=(1, 40, 50), max_new_tokens=8)
    (answer,) = Batcher(model, tokenizer, rows=1, tokens=32).run([request])
    assert answer.tokens == alone(model, Request(prompt=(1, 40, 50), max_new_tokens=8, adapter="wide"))


def test_one_by_one_each_answer_has_its_adapter_too(small: Any, tokenizer: Any) -> None:
    targets = ["q_proj", "down_proj"]
    adapters = {name: {"r": 4, "lora_alpha": 8, "target_modules": targets} for name in ADAPTERS}
    model = adapted(small("falcon_h1"), adapters)
    requests = asked()[:5]
    batcher = Batcher(model, tokenizer, rows=2, tokens=32, adapters=[*ADAPTERS])
    assert batcher.fallback is not None
    assert [answer.tokens for answer in batcher.run(requests)] == [alone(model, request) for request in requests]


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "q_proj has an adapter of another kind than LoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head is trained as a whole"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "q_proj has an adapter with a bias"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is an embedding"),
    ],
    ids=["dora", "whole", "bias", "embedding"],
)
def test_what_is_more_than_two_matrices_is_refused(parts: dict[str, Any], what: str, small: Any, tokenizer: Any) -> None:
    model = get_peft_model(small("llama"), config(r=2, **parts), adapter_name="own")
    with pytest.raises(RecipeError, match=what):
        Batcher(model, tokenizer, rows=1, tokens=32, adapters=["own"]).run([Request(prompt=(1,), max_new_tokens=1)])


def test_an_adapter_that_is_not_there_or_already_added_is_refused(small: Any, tokenizer: Any) -> None:
    model = adapted(small("llama"))
    with pytest.raises(RecipeError, match="the model has no adapter 'deep'") as said:
        Batcher(model, tokenizer, rows=1, tokens=32, adapters=["wide", "deep"]).run([Request(prompt=(1,), max_new_tokens=1)])
    assert said.value.why == "it has 'wide', 'narrow', 'rooted'"
    with pytest.raises(ValueError, match="there is no adapter 'rooted'; there are wide, narrow"):
        Batcher(model, tokenizer, rows=1, tokens=32, adapters=["wide", "narrow"]).run(
            [Request(prompt=(1,), max_new_tokens=1, adapter="rooted")]
        )
    model.merge_adapter(["wide"])
    with pytest.raises(RecipeError, match="has its adapter added to its weight"):
        Batcher(model, tokenizer, rows=1, tokens=32, adapters=["wide"]).run([Request(prompt=(1,), max_new_tokens=1)])
