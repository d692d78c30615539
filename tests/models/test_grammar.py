"""Answers to a JSON schema: each one is read and checked, from models that know nothing."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import pytest

from pantheraml.errors import MissingExtra, RecipeError
from pantheraml.models.batch import Batcher
from pantheraml.models.grammar import Grammars
from pantheraml.models.request import Request

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

SCHEMAS: dict[str, dict[str, Any]] = {
    "verdict": {
        "type": "object",
        "properties": {
            "verdict": {"enum": ["yes", "no", "unclear"]},
            "confidence": {"type": "number", "minimum": 0, "maximum": 1},
            "reasons": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        },
        "required": ["verdict", "confidence", "reasons"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "n": {"type": "integer"}},
        "required": ["next", "n"],
        "additionalProperties": False,
    },
    "pattern": {"type": "string", "pattern": "^[a-z]{3,8}-[0-9]{2}$"},
    "anything": {"type": "object"},
    "number": {"type": "number"},
    "digits": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "array", "minItems": 3}}, "required": ["a", "b"]},
    "list": {"type": "array", "items": {"type": ["boolean", "null", "string"]}, "maxItems": 5},
    "address": {"type": "object", "properties": {"to": {"type": "string", "format": "email"}}, "required": ["to"]},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 50},
    "last": {"type": "string", "pattern": "^(foo|ba[rz])+qux.*Z$"},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_of_a_random_model_satisfies_its_schema(name: str, small: Any, tokenizer: Any) -> None:
    model, schema = small("llama", num_hidden_layers=1), SCHEMAS[name]
    asked = [
        Request(prompt=(1, 40 + i), max_new_tokens=limit, temperature=temperature, seed=i, schema=schema)
        for i in range(6)
        for limit in (70, 150)
        for temperature in (0.0, 1.0)
    ]
    for answer in Batcher(model, tokenizer, rows=8, tokens=160).run(asked):
        jsonschema.validate(json.loads(answer.text), schema)
        assert answer.finished in ("stop", "length")


def test_the_end_is_reached_in_any_number_of_tokens_that_is_enough(tokenizer: Any) -> None:
    """Whatever a model would rather write; it may open lists and objects until the last moment."""
    grammars = Grammars(tokenizer, 263, [2])
    drawn = random.Random(0)
    for _ in range(40):
        schema = SCHEMAS[drawn.choice(list(SCHEMAS))]
        needed = grammars.start(schema, 500).needed
        assert needed is not None
        limit = needed + drawn.randrange(0, 120)
        grammar, tokens = grammars.start(schema, limit), []
        while len(tokens) < limit and not grammar.ended:
            able = grammar.allowed().nonzero().flatten().tolist()
            token = grammar.take(drawn.choice([token for token in able if token != 2] or able))
            if token == 2:
                break
            tokens.append(token)
        jsonschema.validate(json.loads(tokenizer.decode(tokens)), schema)


def test_a_schema_beside_free_answers_changes_them_in_nothing(small: Any, tokenizer: Any) -> None:
    model = small("llama", num_hidden_layers=1)
    free = [Request(prompt=(1, 40 + i), max_new_tokens=9, logprobs=True) for i in range(3)]
    bound = [Request(prompt=(1, 50 + i), max_new_tokens=60, schema=SCHEMAS["pattern"]) for i in range(3)]
    batcher = Batcher(model, tokenizer, rows=8, tokens=80)
    alone = batcher.run(free)
    mixed = batcher.run([each for pair in zip(free, bound, strict=True) for each in pair])
    assert [answer.logprobs for answer in mixed[::2]] == [answer.logprobs for answer in alone]


def test_what_cannot_be_kept_to_is_refused_before_anything_is_computed(small: Any, tokenizer: Any) -> None:
    batcher = Batcher(small("llama", num_hidden_layers=1), tokenizer, rows=1, tokens=80)
    with pytest.raises(RecipeError, match="the JSON schema cannot be used: Invalid type: text"):
        batcher.run([Request(prompt=(1,), max_new_tokens=9, schema={"type": "text"})])
    with pytest.raises(RecipeError, match="no answer to the JSON schema was found in 9 tokens"):
        batcher.run([Request(prompt=(1,), max_new_tokens=9, schema=SCHEMAS["verdict"])])
    with pytest.raises(RecipeError, match="no answer"):
        endless = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
        batcher.run([Request(prompt=(1,), max_new_tokens=60, schema=endless)])


def test_a_tokenizer_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(RecipeError, match="not possible with this model's tokenizer"):

        class Slow:
            eos_token_id = 2

            def __len__(self) -> int:
                return 5

        Grammars(Slow(), 5, [2])


def test_without_llguidance_it_says_what_to_install(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(MissingExtra, match="llguidance is not installed") as said:
        Grammars(tokenizer, 263, [2])
    assert said.value.fix == "pip install pantheraml[serve]"


def test_what_takes_more_tokens_than_are_left_is_not_begun(small: Any, tokenizer: Any) -> None:
    """One token opens an object whose key alone has more tokens than the answer may have."""
    inner = {"type": "object", "properties": {"x" * 300: {"type": "integer"}}, "required": ["x" * 300], "additionalProperties": False}
    schema = {"type": "array", "items": inner}
    asked = [Request(prompt=(5, 6, 7), max_new_tokens=200, temperature=1.0, seed=i, schema=schema) for i in range(12)]
    for answer in Batcher(small("llama", num_hidden_layers=1), tokenizer, rows=4, tokens=256).run(asked):
        jsonschema.validate(json.loads(answer.text), schema)
