"""What the real `openai` client gets: the answers that the model gives without a service in between."""

from __future__ import annotations

import base64
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest
import torch
from peft import PeftModel
from tests.serve.conftest import ADAPTERS, Running, running
from tests.tiny import tiny_recipe
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from pantheraml.models.adapters import attach
from pantheraml.models.generate import generate
from pantheraml.recipe.load import dump_recipe
from pantheraml.recipe.types import LoRA, ModelSpec
from pantheraml.serve import Limits
from pantheraml.trainer.runs import Loaded, Run, load_target

QUESTIONS = ("what is 3 times 4?", "who are you?", "ein Satz über Äpfel \u2764", "a", "tell me of the sea, " * 6)


@pytest.fixture(scope="module")
def alone(folders: Path) -> Loaded:
    """The same model, without a service."""
    return load_target(ModelSpec(name=str(folders / "model"), dtype="float32"))


def ask(here: Running, question: str, *, model: str = "model", **how: Any) -> Any:
    how = {"temperature": 0, "max_tokens": 24, **how}
    return here.client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], **how)


def test_greedy_chats_are_what_generate_says(served: Running, alone: Loaded) -> None:
    wanted = [alone.answer([{"role": "user", "content": question}], max_new_tokens=24) for question in QUESTIONS]
    assert len(set(wanted)) == len(QUESTIONS)
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda question: ask(served, question), QUESTIONS))
    assert [each.choices[0].message.content for each in found] == wanted
    first = found[0]
    assert first.object == "chat.completion" and first.model == "model" and first.choices[0].message.role == "assistant"
    tokens = len(alone.encoder.ask([{"role": "user", "content": QUESTIONS[0]}]))
    assert first.usage.prompt_tokens == tokens and first.usage.total_tokens == tokens + first.usage.completion_tokens
    assert first.usage.completion_tokens == 24 and first.choices[0].finish_reason == "length"


def test_a_conversation_and_parts_of_text_reach_the_model(served: Running, alone: Loaded) -> None:
    talk = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four?"},
    ]
    plain = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one, two"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four?"},
    ]
    found: Any = served.client.chat.completions.create(model="model", messages=talk, temperature=0, max_completion_tokens=12)  # pyright: ignore
    assert found.choices[0].message.content == alone.answer(plain, max_new_tokens=12)


def test_a_stream_is_the_same_answer_in_pieces(served: Running, alone: Loaded) -> None:
    events = list(ask(served, QUESTIONS[2], stream=True, stream_options={"include_usage": True}))
    said = [event.choices[0] for event in events[:-1]]
    pieces = [choice.delta.content for choice in said if choice.delta.content]
    assert "".join(pieces) == alone.answer([{"role": "user", "content": QUESTIONS[2]}], max_new_tokens=24)
    assert len(pieces) > 3
    assert said[0].delta.role == "assistant" and [choice.finish_reason for choice in said[:-1]] == [None] * (len(said) - 1)
    assert said[-1].finish_reason == "length"
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == 24
    assert len({event.id for event in events}) == 1 and all(event.usage is None for event in events[:-1])
    sent = served.post(
        "/v1/chat/completions", model="model", messages=[{"role": "user", "content": "a"}], temperature=0, max_tokens=3, stream=True
    )
    assert sent.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in sent.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_adapters_are_models(served: Running, alone: Loaded, folders: Path) -> None:
    assert [model.id for model in served.client.models.list()] == ["model", *ADAPTERS]
    assert served.client.models.retrieve("doctor").id == "doctor"
    prompt = alone.encoder.ask([{"role": "user", "content": QUESTIONS[0]}])
    found = {name: ask(served, QUESTIONS[0], model=name).choices[0].message.content for name in ("model", *ADAPTERS)}
    assert len(set(found.values())) == 3
    for name in ADAPTERS:
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders / "model"), str(folders / name)).eval()
        assert generate(tuned, alone.tokenizer, [prompt], max_new_tokens=24) == [found[name]]


def made_run(folders: Path, place: Path, adapter: Path) -> Path:
    """A run folder as training leaves it."""
    run = place / "faq"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(tiny_recipe(place, "rows.jsonl", model=str(folders / "model"))), "utf-8")
    shutil.copytree(adapter, run / "adapter")
    AutoTokenizer.from_pretrained(folders / "model").save_pretrained(run / "adapter")
    return run


def test_a_run_is_served_under_its_name_and_its_base_beside_it(folders: Path, tmp_path: Path, alone: Loaded) -> None:
    run = made_run(folders, tmp_path, folders / "lawyer")
    talk = [{"role": "user", "content": QUESTIONS[0]}]
    wanted = {"faq": Run(run).loaded.answer(talk, max_new_tokens=24), "model": alone.answer(talk, max_new_tokens=24)}
    with running(run, dtype="auto", adapters={"doctor": folders / "doctor"}, rows=2, limits=Limits(grace_seconds=1)) as here:
        assert [model.id for model in here.client.models.list()] == ["faq", "model", "doctor"]
        found = {name: ask(here, QUESTIONS[0], model=name).choices[0].message.content for name in ("faq", "model", "doctor")}
    assert len(set(found.values())) == 3 and {name: found[name] for name in wanted} == wanted


def test_a_run_whose_adapter_cannot_be_chosen_row_by_row_is_served_as_it_is(folders: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders / "model")
    tuned = attach(base, LoRA(rank=4, dora=True), seed=0)
    with torch.no_grad():
        for key, weight in tuned.named_parameters():
            if ".lora_B." in key:
                weight.copy_(torch.linspace(-0.3, 0.3, weight.numel()).view_as(weight))
    tuned.save_pretrained(str(tmp_path / "dora"))
    run = made_run(folders, tmp_path, tmp_path / "dora")
    wanted = Run(run).loaded.answer([{"role": "user", "content": QUESTIONS[0]}], max_new_tokens=24)
    with running(run, dtype="auto", rows=2, limits=Limits(grace_seconds=1)) as here:
        assert [model.id for model in here.client.models.list()] == ["faq"]
        assert ask(here, QUESTIONS[0], model="faq").choices[0].message.content == wanted


def test_completions_take_texts_and_tokens(served: Running, alone: Loaded) -> None:
    prompts = ["the sea is", "one two three"]
    tokens = [alone.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    wanted = generate(alone.model, alone.tokenizer, tokens, max_new_tokens=10)
    create = served.client.completions.create
    assert create(model="model", prompt=prompts[0], temperature=0, max_tokens=10).choices[0].text == wanted[0]
    both = create(model="model", prompt=prompts, temperature=0, max_tokens=10)
    assert [choice.text for choice in both.choices] == wanted and [choice.index for choice in both.choices] == [0, 1]
    assert [choice.text for choice in create(model="model", prompt=tokens, temperature=0, max_tokens=10).choices] == wanted
    assert create(model="model", prompt=tokens[1], temperature=0, max_tokens=10).choices[0].text == wanted[1]
    assert create(model="model", prompt=prompts[0], temperature=0).usage.completion_tokens == 16  # type: ignore[union-attr]
    streamed: dict[int, str] = {0: "", 1: ""}
    for event in create(model="model", prompt=prompts, temperature=0, max_tokens=10, stream=True):
        streamed[event.choices[0].index] += event.choices[0].text
    assert [streamed[0], streamed[1]] == wanted


def test_a_seed_is_an_answer_whatever_is_asked_beside_it(served: Running) -> None:
    def said(seed: int, **how: Any) -> list[str]:
        found = ask(served, "say anything", temperature=1.3, top_p=0.95, seed=seed, **how)
        return [choice.message.content for choice in found.choices]

    once = [said(seed)[0] for seed in range(6)]
    assert len(set(once)) == 6
    with ThreadPoolExecutor(6) as pool:
        assert [each[0] for each in pool.map(said, range(6))] == once
    assert said(0, n=3) == once[:3]  # the choices of one request have the seeds that follow
    assert ask(served, "say anything", temperature=1.3).choices[0].message.content not in once


def test_stop_strings_end_an_answer_and_are_no_part_of_it(served: Running) -> None:
    whole = ask(served, QUESTIONS[0]).choices[0].message.content
    stop = whole[7:9]
    found = ask(served, QUESTIONS[0], stop=[stop, "never said"])
    assert found.choices[0].message.content == whole[: whole.index(stop)] and found.choices[0].finish_reason == "stop"
    pieces = [event.choices[0].delta.content or "" for event in ask(served, QUESTIONS[0], stop=stop, stream=True)]
    assert "".join(pieces) == found.choices[0].message.content


def test_logprobs_are_the_models_own(served: Running, alone: Loaded) -> None:
    found = ask(served, QUESTIONS[0], logprobs=True, max_tokens=6)
    said = found.choices[0].logprobs.content
    prompt = alone.encoder.ask([{"role": "user", "content": QUESTIONS[0]}])
    with torch.no_grad():
        out = alone.model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
        )
    logits = torch.stack(out.logits)[:, 0].double()
    tokens = out.sequences[0, len(prompt) :]
    wanted = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    # float32 over two layers, against the same in another shape.
    assert [each.logprob for each in said] == pytest.approx(wanted.tolist(), abs=1e-4)
    assert [each.token for each in said] == [alone.tokenizer.decode([token]) for token in tokens]
    last = list(ask(served, QUESTIONS[0], logprobs=True, max_tokens=6, stream=True))[-1].choices[0]
    assert [each.logprob for each in last.logprobs.content] == [each.logprob for each in said]
    text = served.client.completions.create(model="model", prompt="the sea is", max_tokens=5, temperature=0, logprobs=0).choices[0]
    assert text.logprobs is not None and text.logprobs.token_logprobs is not None and len(text.logprobs.token_logprobs) == 5
    assert all(value is not None and -math.inf < value <= 0 for value in text.logprobs.token_logprobs)


def test_an_answer_satisfies_its_schema(served: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "sure": {"type": "boolean"}},
        "required": ["name", "sure"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for seed in range(4):
        found = ask(served, "who?", temperature=1.5, seed=seed, max_tokens=60, response_format=format).choices[0]
        jsonschema.validate(json.loads(found.message.content), schema)
        assert found.finish_reason == "stop"
    events = ask(served, "who?", temperature=1.5, seed=1, max_tokens=60, response_format=format, stream=True)
    jsonschema.validate(json.loads("".join(event.choices[0].delta.content or "" for event in events)), schema)
    anything = ask(served, "who?", temperature=1, seed=3, max_tokens=40, response_format={"type": "json_object"}).choices[0]
    assert isinstance(json.loads(anything.message.content), dict)


def test_embeddings_are_means_of_the_last_hidden_states(served: Running, folders: Path) -> None:
    texts = ["the sea", "a much longer text of the land and the sea", "Äpfel"]
    model = AutoModel.from_pretrained(folders / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folders / "model")
    wanted = []
    for text in texts:
        with torch.no_grad():
            mean = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].double().mean(0)
        wanted.append((mean / mean.norm()).tolist())
    found = served.client.embeddings.create(model="model", input=texts)  # the client asks for base64
    assert found.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    # float32 sums in another order, padding beside them.
    np.testing.assert_allclose([each.embedding for each in found.data], wanted, atol=1e-5)
    plain = served.client.embeddings.create(model="model", input=texts[1], encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, wanted[1], atol=1e-5)
    coded = served.post("/v1/embeddings", model="model", input=texts[1], encoding_format="base64").json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(coded), "<f4"), np.float32(plain.data[0].embedding))
    tuned = served.client.embeddings.create(model="lawyer", input=texts[1], encoding_format="float").data[0].embedding
    assert float(np.dot(tuned, plain.data[0].embedding)) < 0.999
    again = served.client.embeddings.create(model="model", input=texts[1], encoding_format="float").data[0].embedding
    assert again == plain.data[0].embedding  # the adapter is off again


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_value"),
        ({"top_logprobs": 3, "logprobs": True}, "top_logprobs", "invalid_value"),
        ({"temprature": 0.5}, "temprature", "unknown_parameter"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None, "invalid_value"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages.0.name", "unsupported_value"),
        ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "a" * 600}]}, "messages", "context_length_exceeded"),
        ({"n": 100}, "n", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", "unsupported_value"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}}, None, None),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else None,
)
def test_what_would_change_the_answer_is_refused(served: Running, change: Any, param: str | None, code: str | None) -> None:
    body = {"model": "model", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, **change}
    refused = served.http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["code"] == code and (param is None or error["param"] == param)


def test_what_changes_nothing_is_taken(served: Running) -> None:
    wanted = ask(served, "a").choices[0].message.content
    fine: dict[str, Any] = {
        "user": "me",
        "metadata": {"a": "b"},
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "n": 1,
        "store": False,
        "tools": [],
        "response_format": {"type": "text"},
    }
    assert ask(served, "a", **fine).choices[0].message.content == wanted


def test_json_that_is_broken_is_said_to_be_with_its_place(served: Running) -> None:
    said = served.http.post("/v1/completions", content=b'{"model": ', headers={"Content-Type": "application/json"}).json()["error"]
    assert said["param"] is None and said["message"] == "the body: this is not JSON: Expecting value at character 10"


def test_errors_are_those_that_the_client_knows(served: Running) -> None:
    with pytest.raises(openai.NotFoundError) as absent:
        ask(served, "a", model="gpt-4")
    assert absent.value.code == "model_not_found" and "'gpt-4' is not served here; there are: model, lawyer, doctor" in str(absent.value)
    with pytest.raises(openai.BadRequestError) as long:
        ask(served, "a" * 600)
    assert long.value.code == "context_length_exceeded" and "at most 512" in str(long.value)
    assert served.http.get("/v1/nothing").json()["error"]["message"] == "there is no such route; see /openapi.json"
    assert served.http.get("/v1/chat/completions").status_code == 405
    broken = served.http.post("/v1/chat/completions", content=b'{"model": ', headers={"Content-Type": "application/json"})
    assert broken.status_code == 400 and broken.json()["error"]["code"] == "invalid_json"
    # What a page in a browser can send without being asked for permission is not taken, nor is what curl -d sends; neither is a failure.
    for kind in ({"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}, {}):
        untyped = served.http.post("/v1/completions", content=b'{"model": "model", "prompt": "a"}', headers=kind)
        assert untyped.status_code == 400 and "Content-Type: application/json" in untyped.json()["error"]["message"]
