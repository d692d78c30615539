"""Answers in batches on XLA's devices: transformers' own, from two functions that are compiled once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.models.test_batch import alone, requests
from tests.xla.test_engine import OPTIM, xla
from tests.xla.test_engine import model_of as model_of

from pantheraml.engines.xla_engine import XlaEngine
from pantheraml.errors import DeviceError
from pantheraml.models.batch import Batcher
from pantheraml.models.request import Request
from pantheraml.models.tiny import tiny_tokenizer
from pantheraml.planning.plan import Plan
from pantheraml.trainer.sft import sft_loss


def prepared(model: Any, plan: Plan, **axes: int) -> XlaEngine:
    engine = xla(**axes)
    engine.prepare(model, sft_loss(model), OPTIM, plan, seed=1)
    return engine


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "opt"])
def test_greedy_answers_are_transformers_own(model_of: Callable[..., Any], plan_of: Callable[..., Plan], family: str) -> None:
    model = model_of(family)
    asked = requests(9, most=40)
    wanted = [alone(model, request) for request in asked]
    engine = prepared(model, plan_of(model))
    rows = engine.rows(count=4, tokens=60, chunk=16)
    batcher = Batcher(model, tiny_tokenizer(), using=rows)
    assert [answer.tokens for answer in batcher.run(asked)] == wanted
    assert [answer.tokens for answer in batcher.run(asked[::-1])] == wanted[::-1]
    assert rows.compilations["piece"] == rows.compilations["token"] == 1


def test_a_common_beginning_is_read_once_and_neighbours_change_nothing(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    model = model_of("llama")
    asked = [Request(prompt=(*range(20, 60), 90 + i), max_new_tokens=6, logprobs=True) for i in range(5)]
    batcher = Batcher(model, tiny_tokenizer(), using=prepared(model, plan_of(model)).rows(count=3, tokens=60, chunk=16))
    answers = batcher.run(asked)
    assert [answer.tokens for answer in answers] == [alone(model, request) for request in asked]
    assert [answer.shared_tokens for answer in answers] == [0, 32, 32, 32, 32]
    for request, answer in zip(asked, answers, strict=True):
        batcher.forget()
        assert batcher.run([request])[0].logprobs == answer.logprobs


def test_rows_are_divided_over_devices(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    model = model_of("llama")
    asked = requests(7, most=40)
    rows = prepared(model, plan_of(model), fsdp=2, tp=2).rows(count=3, tokens=60, chunk=16)
    assert rows.count == 4 and rows.most(16) == 2
    batcher = Batcher(model, tiny_tokenizer(), using=rows)
    assert [answer.tokens for answer in batcher.run(asked)] == [alone(model, request) for request in asked]
    assert rows.compilations["piece"] == rows.compilations["token"] == 1


def test_layers_with_a_state_have_no_rows(model_of: Callable[..., Any], plan_of: Callable[..., Plan]) -> None:
    model = model_of("falcon_h1")
    with pytest.raises(DeviceError, match="rows of a cache cannot be kept"):
        prepared(model, plan_of(model)).rows(count=2, tokens=32)
