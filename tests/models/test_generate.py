"""Where answers end, how they are drawn, and how they come piece by piece. Against transformers: see test_families.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pantheraml.models.adapters import attach
from pantheraml.models.generate import BATCH_ROWS, generate, stop_tokens
from pantheraml.models.tiny import tiny_tokenizer
from pantheraml.recipe.types import LoRA

PROMPT = [1, 40, 50]


def spelled(**facts: Any) -> Any:
    """A tokenizer that writes tokens as numbers."""
    ends = {"pad_token_id": 0, "eos_token_id": 2, "get_vocab": dict, **facts}
    return SimpleNamespace(decode=lambda tokens, skip_special_tokens: " ".join(map(str, tokens)), **ends)


def told(configured: Any) -> Any:
    return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))


def test_stop_tokens_come_from_model_tokenizer_and_known_ends_of_a_turn() -> None:
    assert stop_tokens(told(None), spelled(eos_token_id=None)) == []
    assert stop_tokens(told(7), spelled()) == [7, 2]
    assert stop_tokens(told([7, 2, 8]), spelled()) == [7, 2, 8]
    # A chat model whose tokenizer ends texts with one token and turns with another.
    vocab = {"<|im_end|>": 11, "<|eot_id|>": 12, "word": 13}
    assert stop_tokens(told(None), spelled(get_vocab=lambda: vocab)) == [2, 11, 12]


def test_stop_tokens_of_an_adapted_model_are_its_bases(small: Any, tokenizer: Any) -> None:
    model = small("llama")
    model.generation_config.eos_token_id = [9, 10]
    assert stop_tokens(attach(model, LoRA(rank=2), seed=0), tokenizer) == [9, 10, 2]


def test_an_answer_ends_before_the_first_stop_token(small: Any) -> None:
    model = small("llama")
    (whole,) = generate(model, spelled(eos_token_id=None), [PROMPT], max_new_tokens=8)
    tokens = [int(token) for token in whole.split()]
    assert len(tokens) == 8
    stop = tokens[3]
    model.generation_config.eos_token_id = stop
    answers = generate(model, spelled(), [PROMPT, PROMPT[:2]], max_new_tokens=8)
    assert answers[0].split() == whole.split()[: tokens.index(stop)]
    assert str(stop) not in answers[1].split()


def test_a_tokenizer_without_any_end_or_padding_answers_to_the_limit(small: Any) -> None:
    model = small("llama")
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    nothing = spelled(eos_token_id=None, pad_token_id=None)
    together = generate(model, nothing, [PROMPT, [3]], max_new_tokens=5)
    assert [len(answer.split()) for answer in together] == [5, 5]
    assert together == [generate(model, nothing, [prompt], max_new_tokens=5)[0] for prompt in (PROMPT, [3])]


@pytest.mark.parametrize("stops_early", [False, True])
def test_pieces_are_the_answer(stops_early: bool, small: Any) -> None:
    model, tokenizer = small("llama"), tiny_tokenizer()
    (whole,) = generate(model, spelled(), [PROMPT], max_new_tokens=12)
    if stops_early:  # at a token that is text, not a special one
        model.generation_config.eos_token_id = int(whole.split()[5])
    pieces: list[str] = []
    (answer,) = generate(model, tokenizer, [PROMPT], max_new_tokens=12, on_text=pieces.append)
    assert "".join(pieces) == answer != ""


def test_many_prompts_come_back_in_their_order(small: Any) -> None:
    model = small("llama", num_hidden_layers=1)
    prompts = [[1, 7 + i] * (1 + i % 3) for i in range(BATCH_ROWS + 3)]
    together = generate(model, spelled(), prompts, max_new_tokens=3)
    assert together == [generate(model, spelled(), [prompt], max_new_tokens=3)[0] for prompt in prompts]
    assert generate(model, spelled(), [], max_new_tokens=3) == []


def test_drawing_uses_torchs_generator_and_every_token(small: Any) -> None:
    model = small("llama", num_hidden_layers=1)

    def drawn(count: int, **how: Any) -> list[str]:
        torch.manual_seed(3)
        return generate(model, spelled(eos_token_id=None), [PROMPT] * count, max_new_tokens=1, **how)

    assert drawn(8, temperature=1.0) == drawn(8, temperature=1.0)
    # 400 draws from 263 nearly equal tokens meet about 205 of them; with only the 50 likeliest it would be 50.
    assert len(set(drawn(400, temperature=1e4))) > 150
    # A tiny share of the probability is the likeliest token alone, however hot.
    assert set(drawn(8, temperature=1.0, top_p=1e-6)) == set(drawn(1))


def test_the_models_mode_is_left_as_it_was(small: Any) -> None:
    model = small("llama").train()
    generate(model, spelled(), [PROMPT], max_new_tokens=1)
    assert model.training
    with pytest.raises(ValueError, match="every prompt needs a token"):
        generate(model, spelled(), [PROMPT, []], max_new_tokens=1)
    with pytest.raises(ValueError, match="on_text takes one prompt"):
        generate(model, spelled(), [PROMPT, PROMPT], max_new_tokens=1, on_text=print)


def test_training_goes_on_after_an_answer(small: Any) -> None:
    """Tensors made in inference mode must not stay in the model."""
    model = small("llama")
    generate(model, spelled(), [PROMPT], max_new_tokens=2)
    model(input_ids=torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
