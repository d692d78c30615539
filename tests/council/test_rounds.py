"""Debates: batched as one by one, the same again with the same seed, and over when they are over."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.council.conftest import Said, Service, completion, tiny_model
from tests.tiny import chats, quiet, tiny_recipe, written

from pantheraml.council import DEFAULT_PERSONAS, Event, Local, Persona, Settings, Transcript, debate
from pantheraml.errors import DataError, DeviceError, RecipeError
from pantheraml.models.adapters import attach
from pantheraml.models.batch import Batcher
from pantheraml.models.load import load_model
from pantheraml.models.request import Answer, Request
from pantheraml.recipe.types import HardwareAsk, LoRA, ModelSpec
from pantheraml.trainer.run import train

QUESTION = "Is 91 a prime number?"
PLAIN = Settings(max_new_tokens=16, synthesis="extract")
GREEDY = tuple(Persona(name=f"n{i}", prompt=f"You are number {i}.", temperature=0.0) for i in range(3))


def who_is_asked(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"].split("You are ")[-1].split(".")[0]


class OneByOne:
    """A batcher that is asked for one answer at a time."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batcher, name)

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        found = []
        for request in requests:
            self.asked += 1
            self._batcher.forget()
            found += self._batcher.run([request])
        return found


def texts(transcript: Transcript) -> list[tuple[str, int, str]]:
    return [(turn.advisor, turn.round, turn.text) for turn in transcript.turns]


def test_eight_advisors_with_adapters_in_a_batch_say_what_they_say_one_by_one(tokenizer: Any) -> None:
    names = [f"advisor{i}" for i in range(4)]
    tuned = attach(tiny_model(), LoRA(rank=4), seed=0)
    for name in names:
        tuned.add_adapter(name, tuned.peft_config["default"])
    with torch.no_grad():
        torch.manual_seed(1)
        for name, weight in tuned.named_parameters():
            if ".lora_" in name:
                weight.normal_(std=0.1)
    tuned.eval()
    personas = [
        Persona(name=f"n{i}", prompt=f"You are number {i}.", temperature=0.0, adapter=f"lora {i}" if i < 4 else None) for i in range(8)
    ]
    called = {f"lora {i}": name for i, name in enumerate(names)}
    settings = replace(PLAIN, max_new_tokens=20, stop_early=False)
    together = Local.of(tuned, tokenizer, "tiny", rows=8, tokens=1024, called=called)
    alone = Local.of(tuned, tokenizer, "tiny", rows=1, tokens=1024, called=called)
    single = OneByOne(alone.batcher)
    batched = debate(QUESTION, personas, settings, local=together)
    one_by_one = debate(QUESTION, personas, settings, local=replace(alone, batcher=single))  # pyright: ignore[reportArgumentType]
    assert single.asked == 16 and len(batched.turns) == 16 and batched.ended == "rounds"
    assert texts(batched) == texts(one_by_one)
    assert len({turn.text for turn in batched.turns}) > 12, "adapters, prompts and rounds make a difference"
    assert [turn.answer_logprob for turn in batched.turns] == pytest.approx([turn.answer_logprob for turn in one_by_one.turns], abs=1e-5)
    # Without its adapter an advisor says something else.
    plain = debate(QUESTION, [replace(each, adapter=None) for each in personas], settings, local=together)
    assert all(one.text != other.text for one, other in zip(batched.turns[:4], plain.turns[:4], strict=True))
    assert texts(plain)[4:8] == texts(batched)[4:8]


def test_the_same_seed_says_the_same_and_another_one_something_else(local: Local) -> None:
    settings = replace(PLAIN, samples=2)
    first, again = (debate(QUESTION, DEFAULT_PERSONAS, settings, local=local) for _ in range(2))
    assert texts(first) == texts(again) and first.outcome == again.outcome
    assert [(each.agreeing, each.samples) for each in first.confidence] == [(each.agreeing, each.samples) for each in again.confidence]
    # What is remembered of the first debate is not read again, in other shapes, and a sum may differ in its last digit.
    assert [each.raw for each in first.confidence] == pytest.approx([each.raw for each in again.confidence], rel=1e-5)
    other = debate(QUESTION, DEFAULT_PERSONAS, replace(settings, seed=1), local=local)
    assert all(one[2] != two[2] for one, two in zip(texts(first), texts(other), strict=True))


def test_a_started_batcher_says_the_same(local: Local) -> None:
    still = debate(QUESTION, DEFAULT_PERSONAS, PLAIN, local=local)
    with local.batcher:
        assert texts(debate(QUESTION, DEFAULT_PERSONAS, PLAIN, local=local)) == texts(still)


def test_a_neighbour_does_not_change_what_an_advisor_says_first(local: Local) -> None:
    alone = debate(QUESTION, DEFAULT_PERSONAS[:1], replace(PLAIN, rounds=1), local=local)
    beside = debate(QUESTION, DEFAULT_PERSONAS, replace(PLAIN, rounds=1), local=local)
    assert texts(alone)[0] == texts(beside)[0]


def test_the_transcript_and_the_log_say_what_was_computed_where(local: Local, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "pantheraml"):
        found = debate(QUESTION, GREEDY, PLAIN, local=local)
    work = found.work
    assert work is not None and (work.model, work.dtype, work.rows) == ("tiny", "float32", 8)
    assert work.new_tokens >= sum(turn.tokens or 0 for turn in found.turns) > 0
    assert f"(float32): 8 rows, {work.new_tokens} new tokens" in caplog.text
    assert work.tokens_per_s == pytest.approx(work.new_tokens / work.busy_s)
    assert sum(turn.prompt_tokens or 0 for turn in found.turns) == work.read_tokens + work.shared_tokens
    for turn in found.turns:
        assert turn.mean_logprob is not None and turn.mean_logprob < 0 and turn.seconds > 0 and turn.finished in ("length", "stop")
    assert Transcript.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert (QUESTION in found.text() and "not calibrated" in found.text()) or "not measured" in found.text()


def test_what_is_no_transcript_is_refused(local: Local) -> None:
    said = debate(QUESTION, GREEDY, PLAIN, local=local).to_dict()
    with pytest.raises(DataError, match="no transcript of a debate: turns"):
        Transcript.from_dict(said | {"turns": [{"advisor": 5}]})


def test_confidence_is_of_the_models_own_numbers(local: Local, model: Any, tokenizer: Any) -> None:
    found = debate(QUESTION, GREEDY[:1], replace(PLAIN, rounds=1), local=local)
    turn = found.turns[0]
    asked = 'Say briefly why. End with a line "Answer:" that holds only your answer.'
    messages = [
        {"role": "system", "content": "Several advisors debate a question."},
        {"role": "user", "content": f"Question: {QUESTION}\n\nYou are n0. You are number 0.\n{asked}"},
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert len(ids) == turn.prompt_tokens
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=16, return_dict_in_generate=True, output_scores=True, pad_token_id=0
        )
    new = out.sequences[0, len(ids) :]
    logprobs = torch.stack([score[0].log_softmax(-1)[token] for score, token in zip(out.scores, new, strict=True)])
    assert tokenizer.decode(new, skip_special_tokens=True) == turn.text
    assert turn.mean_logprob == pytest.approx(logprobs[: turn.tokens].mean().item(), abs=1e-4)


# ---- Rounds that do not come -----------------------------------------------------------------------------------------


def test_it_ends_when_all_agree(service: Service) -> None:
    service.say = lambda body: "Answer: 42" if len(service.bodies) % 2 else "I find that it is\nAnswer: 42.0"
    found = debate(QUESTION, [service.persona("a"), service.persona("b")], replace(PLAIN, rounds=5))
    assert found.ended == "agreed" and len(found.turns) == 2 and found.outcome.reached


def test_it_ends_when_nobody_changes_and_not_before(service: Service) -> None:
    def say(body: dict[str, Any]) -> str:
        revising = "what the others say" in body["messages"][-1]["content"]
        return "Answer: 1" if who_is_asked(body) == "a" else f"Answer: {2 if not revising else 3}"

    service.say = say
    who = [service.persona("a"), service.persona("b")]
    found = debate(QUESTION, who, replace(PLAIN, rounds=9))
    assert found.ended == "unchanged" and max(turn.round for turn in found.turns) == 2
    assert not found.outcome.reached and found.outcome.position is None
    assert debate(QUESTION, who, replace(PLAIN, rounds=4, stop_early=False)).ended == "rounds"


def test_a_later_round_sees_the_last_answers_of_all(service: Service) -> None:
    def say(body: dict[str, Any]) -> str:
        name = who_is_asked(body)
        return f"I am {name}\nAnswer: {name} {sum(who_is_asked(each) == name for each in service.bodies)}"

    service.say = say
    debate(QUESTION, [service.persona(name) for name in ("a", "b", "c")], replace(PLAIN, rounds=3))
    (last,) = [body for body in service.bodies[6:] if who_is_asked(body) == "b"]
    asked = last["messages"][-1]["content"]
    assert asked.startswith(f"Question: {QUESTION}")
    assert all(f"{name}: I am {name}\nAnswer: {name} 2" in asked for name in ("a", "b", "c")) and "Answer: a 1" not in asked


def test_what_all_see_is_read_once(local: Local) -> None:
    found = debate(QUESTION * 8, GREEDY, PLAIN, local=local)
    assert found.work is not None
    for round in (0, 1):
        shared = [turn.shared_tokens or 0 for turn in found.turns if turn.round == round]
        assert sorted(shared)[1] >= 192, "all but one copy the question, and in the second round the answers"


def test_it_can_be_cancelled_in_the_middle_of_a_round(local: Local) -> None:
    heard: list[Event] = []

    def cancelled() -> bool:
        return any(event.kind == "text" and event.round == 1 for event in heard)

    for started in (False, True):
        heard.clear()
        if started:
            local.batcher.start()
        found = debate(QUESTION, GREEDY, PLAIN, local=local, on_event=heard.append, cancelled=cancelled)
        assert found.ended == "cancelled" and [turn.round for turn in found.turns] == [0, 0, 0]
        assert heard[-1].kind == "verdict" and found.synthesis.made_by == "extract"
    local.batcher.close()
    assert debate(QUESTION, GREEDY, PLAIN, local=local, cancelled=lambda: True).turns == ()


def test_events_tell_all_that_is_said(local: Local) -> None:
    heard: list[Event] = []
    found = debate(QUESTION, GREEDY, replace(PLAIN, samples=1), local=local, on_event=heard.append)
    assert [event.kind for event in heard if event.kind != "text"] == [
        "round",
        *["turn"] * 3,
        "round",
        *["turn"] * 3,
        "sampling",
        "verdict",
    ]
    for turn in found.turns:
        pieces = [event.text for event in heard if event.kind == "text" and (event.advisor, event.round) == (turn.advisor, turn.round)]
        assert "".join(pieces) == turn.text
    assert [event.turn for event in heard if event.kind == "turn"] == list(found.turns)


# ---- Advisors that fail ----------------------------------------------------------------------------------------------


def test_a_failed_advisor_is_recorded_and_the_others_go_on(service: Service, local: Local) -> None:
    service.say = lambda body: Said({"error": {"message": "no such model"}}, status=404)
    found = debate(QUESTION, [*GREEDY, service.persona()], replace(PLAIN, rounds=2), local=local)
    failed = [turn for turn in found.turns if turn.error is not None]
    assert [(turn.advisor, turn.round) for turn in failed] == [("afar", 0), ("afar", 1)]
    assert "answered 404: no such model" in (failed[0].error or "") and len(found.turns) == 8
    assert found.outcome.silent == ("afar",) and "afar" not in [each.advisor for each in found.confidence]
    assert found.ended == "rounds"


def test_it_ends_when_the_quorum_is_out_of_reach(service: Service, local: Local) -> None:
    service.say = lambda body: Said({}, status=400)
    who = [GREEDY[0], service.persona("a"), service.persona("b")]
    found = debate(QUESTION, who, replace(PLAIN, rounds=5, samples=2), local=local)
    assert found.ended == "out of reach" and len(found.turns) == 3 and not found.outcome.reached
    assert found.outcome.why.endswith("a and b said nothing")
    assert debate(QUESTION, [GREEDY[0], service.persona("a")], replace(PLAIN, quorum="unanimous"), local=local).ended == "out of reach"


def test_an_advisor_that_fails_later_stands_by_what_it_said(service: Service) -> None:
    service.say = lambda body: "Answer: 1" if len(service.bodies) <= 2 else Said({}, status=400)
    found = debate(QUESTION, [service.persona("a"), service.persona("b")], replace(PLAIN, rounds=2, stop_early=False))
    assert [turn.error is None for turn in found.turns] == [True, True, False, False]
    assert found.outcome.reached and found.outcome.position == "1"


def test_a_device_that_fails_for_one_takes_no_other_with_it(local: Local) -> None:
    class Broken(OneByOne):
        def run(self, requests: Sequence[Request]) -> list[Answer]:
            if any("number 1" in local.tokenizer.decode(request.prompt) for request in requests):
                raise DeviceError("the model's logits are not finite", why="w", fix="f")
            return self._batcher.run(requests)

    found = debate(QUESTION, GREEDY, PLAIN, local=replace(local, batcher=Broken(local.batcher)))  # pyright: ignore[reportArgumentType]
    assert [turn.error for turn in found.turns if turn.round == 0] == [None, "the model's logits are not finite", None]
    assert texts(found)[0] == texts(debate(QUESTION, GREEDY, PLAIN, local=local))[0]


# ---- What cannot be debated ------------------------------------------------------------------------------------------


def test_mistakes_are_told_before_anything_is_asked(local: Local, service: Service) -> None:
    with pytest.raises(RecipeError, match="different names"):
        debate(QUESTION, [GREEDY[0], GREEDY[0]], local=local)
    with pytest.raises(RecipeError, match="needs a question"):
        debate("  ", GREEDY, local=local)
    with pytest.raises(RecipeError, match="nothing answers for n0, n1, n2"):
        debate(QUESTION, GREEDY)
    with pytest.raises(RecipeError, match="there is no adapter 'law'"):
        debate(QUESTION, [replace(GREEDY[0], adapter="law")], local=local)
    with pytest.raises(RecipeError, match="the variable KEY is not set"):
        debate(QUESTION, [service.persona(key_env="KEY")])
    assert service.bodies == []


def test_a_question_that_has_no_room_is_an_error(local: Local) -> None:
    with pytest.raises(RecipeError, match=r"tokens with its instructions, and \d+ fit"):
        debate("why? " * 300, GREEDY, PLAIN, local=local)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"samples": -1}, {"quorum": "most"}, {"threshold": 0.0}, {"synthesis": "always"}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least|one of|above"):
        Settings(**wrong)


# ---- Room, templates, runs -------------------------------------------------------------------------------------------


def test_what_has_no_room_is_dropped_and_recorded(model: Any, tokenizer: Any) -> None:
    narrow = Local.of(model, tokenizer, "tiny", rows=4, tokens=420)
    wide = Local.of(model, tokenizer, "tiny", rows=4, tokens=1024)
    settings = replace(PLAIN, max_new_tokens=60)
    found, whole = (debate(QUESTION, GREEDY, settings, local=each) for each in (narrow, wide))
    assert all(not turn.dropped for turn in whole.turns)
    assert texts(found)[:3] == texts(whole)[:3]
    later = [turn for turn in found.turns if turn.round == 1]
    assert all(turn.dropped for turn in later)
    for turn in later:
        said = {each.advisor: len(tokenizer(each.text)["input_ids"]) for each in found.turns if each.round == 0}
        assert all(each.round == 0 and 0 < each.tokens <= said[each.advisor] for each in turn.dropped)
        assert (turn.prompt_tokens or 0) <= 420 - 60
    assert "(not seen: " in found.text()


def test_templates_without_a_system_role_or_none_at_all_are_announced(model: Any, tokenizer: Any) -> None:
    bare, strict = copy.copy(tokenizer), copy.copy(tokenizer)
    bare.chat_template = None
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tokenizer.chat_template
    for each, said in ((bare, "no chat template"), (strict, "no system role")):
        found = debate(QUESTION, GREEDY, replace(PLAIN, stop_early=False), local=Local.of(model, each, "tiny", rows=4, tokens=1024))
        assert any(said in note for note in found.notes) and len(found.turns) == 6
    assert bare.chat_template is None


def test_a_model_is_loaded_with_the_adapters_that_personas_name(tmp_path: Any) -> None:
    tuned = attach(load_model(ModelSpec(name="tiny:llama"), dtype=torch.float32, device=torch.device("cpu")), LoRA(rank=4), seed=0)
    with torch.no_grad():
        torch.manual_seed(1)
        for name, weight in tuned.named_parameters():
            if ".lora_" in name:
                weight.normal_(std=0.3)
    place = tmp_path / "an.adapter"
    tuned.save_pretrained(str(place))
    local = Local.open("tiny:llama", {"law": str(place)}, rows=2, tokens=256, ask=HardwareAsk(kind="cpu", threads=1))
    assert local.device is not None and local.dtype in ("float32", "bfloat16") and local.batcher.rows == 2
    who = [replace(GREEDY[0], adapter="law"), replace(GREEDY[0], name="plain")]
    found = debate("Why?", who, replace(PLAIN, rounds=1), local=local)
    assert found.turns[0].text != found.turns[1].text and found.work is not None and found.work.device == local.device.label
    with pytest.raises(RecipeError, match="holds no adapter"):
        Local.open("tiny:llama", {"law": str(tmp_path)}, ask=HardwareAsk(kind="cpu", threads=1))


def test_a_run_answers_with_what_it_trained_with_other_adapters_or_without(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path, written(tmp_path / "rows.jsonl", chats(24)), optim={"steps": 4, "lr": 5e-2}, eval={"every": "end", "generate_rows": 0}
    )
    run = train(recipe, console=quiet()[0])
    settings = replace(PLAIN, rounds=1, max_new_tokens=12)

    def said(local: Local, persona: Persona) -> str:
        return debate("Why?", [persona], settings, local=local).turns[0].text

    alone = Local.open(str(run.folder), tokens=256, rows=1)
    both = Local.open(str(run.folder), {"law": str(run.folder)}, tokens=256, rows=1)
    law = replace(GREEDY[0], adapter="law")
    assert alone.adapter is None and both.adapter is not None and alone.dtype == "float32"
    assert said(alone, GREEDY[0]) == said(both, GREEDY[0]) == said(both, law)
    assert said(replace(both, adapter=None), GREEDY[0]) != said(both, law), "without it the base answers"


def test_who_writes_in_the_name_of_another_is_noted(service: Service) -> None:
    personas = [service.persona(name=name) for name in ("a", "sceptic")]
    service.say = lambda body: Said(
        completion("So it is.\n\nsceptic: I agree.\nAnswer: yes" if who_is_asked(body) == "a" else "Answer: no")
    )
    found = debate(QUESTION, personas, Settings(rounds=1))
    assert [note for note in found.notes if "in the name" in note] == [
        "a writes in the name of sceptic in round 0, which those that read it may take for sceptic's."
    ]
