"""Answers in batches: transformers' own, token for token, whatever is answered beside them; and a service of many threads."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from tests.models.test_families import OTHERS, other

from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.backend import MemoryUse
from pantheraml.hardware.cpu import CpuBackend
from pantheraml.models.batch import Batcher
from pantheraml.models.request import Answer, Request
from pantheraml.models.rows import Part
from pantheraml.models.tiny import FAMILIES
from pantheraml.planning.memory import RUNTIME_BYTES

ATTENTION_ONLY = [family for family in FAMILIES if family != "falcon_h1"]


def requests(count: int, *, seed: int = 0, most: int = 90, **how: Any) -> list[Request]:
    """Of mixed lengths: shorter and longer than a window, than a piece of a prompt, and than one another."""
    drawn = random.Random(seed)
    lengths = [length for length in (1, 2, 5, 9, 20, 40, 70, 90) if length <= most]
    return [
        Request(
            prompt=tuple(drawn.randrange(7, 263) for _ in range(drawn.choice(lengths))), max_new_tokens=drawn.choice([1, 3, 8, 14]), **how
        )
        for _ in range(count)
    ]


def alone(model: Any, request: Request, stop: int = 2) -> tuple[int, ...]:
    """What transformers answers to one prompt, before the token that ends it."""
    ids = torch.tensor([request.prompt])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=stop,
            pad_token_id=0,
        )
    tokens = out[0, ids.shape[1] :].tolist()
    return tuple(tokens[: tokens.index(stop)] if stop in tokens else tokens)


# ---- What is answered ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ATTENTION_ONLY)
def test_greedy_answers_are_transformers_own_in_batches_of_any_size(family: str, small: Any, tokenizer: Any) -> None:
    model = small(family)
    asked = requests(19)
    wanted = [alone(model, request) for request in asked]
    assert len(set(wanted)) > 8
    for rows, how in ((1, {}), (3, {"chunk": 16}), (17, {}), (17, {"steady": False})):
        batcher = Batcher(model, tokenizer, rows=rows, tokens=104, **how)
        answers = batcher.run(asked)
        assert [answer.tokens for answer in answers] == wanted, (rows, how)
        assert batcher.fallback is None and batcher.work.new_tokens >= sum(map(len, wanted))
        finished = ["length" if len(tokens) == request.max_new_tokens else "stop" for tokens, request in zip(wanted, asked, strict=True)]
        assert [answer.finished for answer in answers] == finished


@pytest.mark.parametrize("family", OTHERS)
def test_families_that_nobody_prepared_are_answered_as_well(family: str, tokenizer: Any) -> None:
    model = other(family)
    asked = requests(7, most=40)
    batcher = Batcher(model, tokenizer, rows=4, tokens=60, chunk=16)
    assert batcher.fallback is None
    assert [answer.tokens for answer in batcher.run(asked)] == [alone(model, request) for request in asked]


def test_sinks_and_windows_of_gpt_oss(tokenizer: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"vocab_size": 263, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    config = AutoConfig.for_model("gpt_oss", **sizes, **ends, head_dim=16, num_local_experts=4, sliding_window=8)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.tensor([2.0, -1.0, 3.0, 0.5]))
    asked = requests(6)
    batcher = Batcher(model, tokenizer, rows=3, tokens=104)
    assert batcher.fallback is None
    assert [answer.tokens for answer in batcher.run(asked)] == [alone(model, request) for request in asked]


def test_layers_with_a_state_are_answered_one_by_one_and_it_is_said(small: Any, tokenizer: Any, caplog: Any) -> None:
    model = small("falcon_h1")
    asked = requests(5, most=20)
    with caplog.at_level(logging.WARNING, "pantheraml"):
        batcher = Batcher(model, tokenizer, rows=2, tokens=60)
    why = "it has layers of the kind 'hybrid', which keep more than keys and values"
    assert batcher.fallback == why
    assert f"FalconH1ForCausalLM answers one prompt at a time: {why}" in caplog.text
    assert [answer.tokens for answer in batcher.run(asked)] == [alone(model, request) for request in asked]


def test_positions_that_turn_with_the_longest_row_are_not_batched(small: Any, tokenizer: Any) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = small("llama", max_position_embeddings=64, rope_parameters=rope)
    assert Batcher(model, tokenizer, rows=2, tokens=64).fallback is None
    assert Batcher(model, tokenizer, rows=2, tokens=65).fallback == "its positions beyond 64 turn those of every row"


def test_a_forward_that_is_wrong_with_rows_is_found_out(small: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    attend = model.model.layers[1].self_attn
    real = attend.forward

    def forgetful(*args: Any, position_embeddings: Any, **kwargs: Any) -> Any:
        """As if each call began at position 0."""
        cos, sin = (each[:, :1].expand_as(each) if kwargs.get("past_key_values") is not None else each for each in position_embeddings)
        return real(*args, position_embeddings=(cos, sin), **kwargs)

    monkeypatch.setattr(attend, "forward", forgetful)
    fallback = Batcher(model, tokenizer, rows=2, tokens=64).fallback
    assert fallback is not None and fallback.startswith("with a cache of rows its logits are off by")


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
def test_neighbours_do_not_change_a_bit_of_an_answer(family: str, small: Any, tokenizer: Any) -> None:
    model = small(family)
    asked = requests(24, seed=1, logprobs=True)
    batcher = Batcher(model, tokenizer, rows=17, tokens=104, chunk=16)
    lonely = []
    for request in asked:
        batcher.forget()
        lonely += batcher.run([request])
    batcher.forget()
    together = batcher.run(asked)  # more than rows: they come and go, and some begin alike
    again = [batcher.run(list(reversed(asked)))[-1 - i] for i in range(3)]  # with what rows remember
    for one, among in (*zip(lonely, together, strict=True), *zip(lonely, again, strict=False)):
        assert one.logprobs == among.logprobs and one.tokens == among.tokens
    assert len(batcher._rows.widths) > 1  # several shapes were in use


def test_log_probabilities_are_those_of_a_teacher_forced_forward(small: Any, tokenizer: Any) -> None:
    model = small("qwen3")
    for request, answer in zip(
        asked := requests(9, logprobs=True, temperature=0.7, seed=5), Batcher(model, tokenizer, rows=4, tokens=104).run(asked), strict=True
    ):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*request.prompt, *answer.tokens]])).logits[0, len(request.prompt) - 1 : -1]
        wanted = logits.log_softmax(-1)[torch.arange(len(answer.tokens)), torch.tensor(answer.tokens, dtype=torch.int64)]
        assert answer.logprobs is not None
        torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, rtol=0, atol=1e-5)


def test_a_request_and_its_seed_have_one_answer(small: Any, tokenizer: Any) -> None:
    model = small("llama")
    how = [{"temperature": 1.0}, {"temperature": 2.0, "top_p": 0.8}, {"temperature": 1.5, "top_k": 30}, {}]
    asked = [
        Request(prompt=(1, 40, 50 + i % 2), max_new_tokens=10, seed=i, **how[i % 4])  # pyright: ignore[reportArgumentType]
        for i in range(12)
    ]
    batcher = Batcher(model, tokenizer, rows=5, tokens=32)
    together = [answer.tokens for answer in batcher.run(asked)]
    assert together == [batcher.run([request])[0].tokens for request in asked]
    assert len(set(together)) == 10  # the greedy ones are two prompts three times, and seeds differ
    free = [Request(prompt=(1, 40, 50), max_new_tokens=10, temperature=2.0) for _ in range(4)]
    assert len({answer.tokens for answer in batcher.run(free)}) == 4  # without a seed, each time another


def test_stop_strings_end_an_answer_across_tokens(small: Any, tokenizer: Any) -> None:
    model = small("llama")
    model.generation_config.eos_token_id = None
    request = Request(prompt=(1, 40, 51), max_new_tokens=24, temperature=1.0, seed=3)
    batcher = Batcher(model, tokenizer, rows=2, tokens=32)
    (whole,) = batcher.run([request])
    stop = whole.text[7:10]
    pieces: list[str] = []
    stopping = Request(prompt=request.prompt, max_new_tokens=24, temperature=1.0, seed=3, stop=(stop,), on_text=pieces.append)
    (answer,) = batcher.run([stopping])
    assert answer.text == "".join(pieces) == whole.text[: whole.text.index(stop)]
    assert answer.finished == "stop" and answer.tokens == whole.tokens[: len(answer.tokens)]
    assert len(answer.tokens) < 24


# ---- What is shared -----------------------------------------------------------------------------------------------


def test_a_common_beginning_is_read_once(small: Any, tokenizer: Any) -> None:
    model = small("mistral")  # its window is shorter than what is shared
    common = requests(1, seed=3)[0].prompt[:1] * 3 + tuple(range(20, 61))
    asked = [Request(prompt=(*common, 90 + i, 91 + i), max_new_tokens=6) for i in range(6)]
    batcher = Batcher(model, tokenizer, rows=6, tokens=64, chunk=16)
    answers = batcher.run(asked)
    assert [answer.tokens for answer in answers] == [alone(model, request) for request in asked]
    assert [answer.shared_tokens for answer in answers] == [0, 32, 32, 32, 32, 32]  # whole pieces of 44 common tokens
    assert batcher.work.read_tokens == 46 + 5 * 14 and batcher.work.shared_tokens == 5 * 32


def test_what_was_read_for_an_answer_that_is_over_is_shared_with_the_next(small: Any, tokenizer: Any) -> None:
    model = small("llama")
    first, second = (Request(prompt=tuple(range(20, end)), max_new_tokens=4) for end in (60, 70))
    batcher = Batcher(model, tokenizer, rows=2, tokens=96, chunk=16)
    batcher.run([first])
    (answer,) = batcher.run([second])
    assert answer.shared_tokens == 32 and answer.tokens == alone(model, second)
    # Not steady, the answer itself is shared as well: a conversation goes on from where it was.
    quick = Batcher(model, tokenizer, rows=2, tokens=96, steady=False)
    (said,) = quick.run([first])
    third = Request(prompt=(*first.prompt, *said.tokens, 77, 78, *range(30, 46)), max_new_tokens=4)
    (answer,) = quick.run([third])
    assert answer.shared_tokens == (len(first.prompt) + len(said.tokens) - 1) // 16 * 16
    assert answer.tokens == alone(model, third)


# ---- The rows, by a model that remembers every token -----------------------------------------------------------------


class Remembering:
    """`Rows` whose logits are a function of every token that was read; that rows are used as promised is checked."""

    fallback = None
    chunk = 4
    block = 4
    tokens = 40
    widths = (2, 5, 7)
    count = 7

    def __init__(self) -> None:
        self.held: list[list[int]] = [[] for _ in range(self.count)]
        self.going = 0

    def ready(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def adapter(self, name: str | None) -> int:
        return 0 if name is None else int(name)

    def most(self, width: int) -> int:
        return 3

    def read(self, parts: Sequence[Part], width: int) -> torch.Tensor:
        slots = [part.slot for part in parts]
        assert len(set(slots)) == len(slots) and all(len(part.tokens) <= width for part in parts)
        if width == 1:
            assert max(slots) - min(slots) < self.count
            self.going = max(self.going, len(slots))
        else:
            assert len(parts) <= 3 and all(part.start % 4 == 0 for part in parts)
        rows = []
        for part in parts:
            assert part.start <= len(self.held[part.slot])
            self.held[part.slot][part.start :] = part.tokens
            rows.append(self.logits(self.held[part.slot], part.adapter))
        return torch.stack(rows)

    @staticmethod
    def logits(tokens: Sequence[int], adapter: int) -> torch.Tensor:
        return torch.randn(30, generator=torch.Generator().manual_seed(hash((adapter, *tokens)) % (1 << 62)))

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        assert len(self.held[source]) >= end and (len(self.held[target]) >= start)
        self.held[target][start:] = self.held[source][start:end]

    def clear(self, slot: int) -> None:
        self.held[slot] = []


class Numbers:
    """A tokenizer that writes tokens as numbers; 29 ends an answer."""

    eos_token_id = 29

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(f"{token} " for token in tokens)


def by_definition(request: Request) -> tuple[int, ...]:
    adapter = 0 if request.adapter is None else int(request.adapter)
    tokens: list[int] = []
    while len(tokens) < request.max_new_tokens:
        token = int(Remembering.logits([*request.prompt, *tokens], adapter).argmax())
        if token == 29:
            break
        tokens.append(token)
    return tuple(tokens)


def few_words(drawn: random.Random) -> Request:
    """A prompt that often begins like another one."""
    begin = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10][: drawn.randrange(1, 11)] * drawn.choice([1, 2])
    tail = [drawn.randrange(11, 29) for _ in range(drawn.randrange(0, 5))]
    adapter = drawn.choice([None, None, "1"])
    return Request(prompt=(*begin, *tail), max_new_tokens=drawn.randrange(1, 12), adapter=adapter, stream=drawn.random() < 0.5)


@pytest.fixture
def remembering(small: Any) -> Callable[[], Batcher]:
    model = small("llama", num_hidden_layers=1)
    model.generation_config.eos_token_id = None
    return lambda: Batcher(model, Numbers(), using=Remembering())


@pytest.mark.parametrize("seed", range(4))
def test_many_answers_that_come_and_go_are_what_each_is_alone(seed: int, remembering: Any) -> None:
    drawn = random.Random(seed)
    asked = [few_words(drawn) for _ in range(60)]
    batcher = remembering()
    answers = batcher.run(asked)
    assert [answer.tokens for answer in answers] == [by_definition(request) for request in asked]
    assert batcher._rows.going == 7 and batcher.work.shared_tokens > 0
    assert batcher.work.read_tokens + batcher.work.shared_tokens == sum(len(request.prompt) for request in asked)
    assert batcher.going == (0, 0) and batcher._slots.free == 7


def test_a_service_of_many_threads_mixes_nothing_up(remembering: Any) -> None:
    def client(seed: int) -> int:
        drawn, cancelled = random.Random(seed), 0
        for _ in range(12):
            request = few_words(drawn)
            handle = batcher.submit(request)
            if drawn.random() < 0.25:
                for _ in handle:
                    break
                handle.cancel()
                answer = handle.result(20)
                assert answer.tokens == by_definition(request)[: len(answer.tokens)]
                cancelled += answer.finished == "cancelled"
            else:
                text = "".join(handle)
                answer = handle.result(20)
                assert answer.tokens == by_definition(request) and text == answer.text
        return cancelled

    with remembering() as batcher, ThreadPoolExecutor(16) as pool:
        cancelled = sum(pool.map(client, range(16)))
        assert batcher.work.answers == 16 * 12 and cancelled > 0
        assert batcher.going == (0, 0) and batcher._slots.free == 7


# ---- A service ------------------------------------------------------------------------------------------------------


def test_a_new_request_is_taken_while_another_goes_on_and_a_cancelled_one_frees_its_row(small: Any, tokenizer: Any) -> None:
    model = small("llama")
    model.generation_config.eos_token_id = None
    endless = Request(prompt=(1, 40, 50), max_new_tokens=900, temperature=1.0, seed=1, stream=True)
    short = Request(prompt=(1, 41, 50), max_new_tokens=5)
    model.config.max_position_embeddings = 1024
    (wanted,) = Batcher(model, tokenizer, rows=1, tokens=32).run([short])
    with Batcher(model, tokenizer, rows=2, tokens=1000, steady=False) as batcher:
        first, second = batcher.submit(endless), batcher.submit(endless)
        stream = iter(first)
        next(stream)
        third = batcher.submit(short)
        assert not third.done  # both rows are taken
        second.cancel()
        assert second.result(30).finished == "cancelled"
        answer = third.result(30)
        assert answer.tokens == wanted.tokens and answer.waited_s > 0
        assert not first.done
        first.cancel()
        assert first.result(30).finished == "cancelled"
        assert 0 < len(first.result().tokens) < 900
        assert batcher.going == (0, 0)


def test_close_cancels_or_drains_and_nothing_is_taken_afterwards(remembering: Any) -> None:
    asked = [few_words(random.Random(seed)) for seed in range(30)]
    batcher = remembering().start()
    handles = [batcher.submit(request) for request in asked]
    batcher.close(drain=True)
    assert [handle.result(0).tokens for handle in handles] == [by_definition(request) for request in asked]
    with pytest.raises(ValueError, match="not at work"):
        batcher.submit(asked[0])
    batcher.start()
    handles = [batcher.submit(request) for request in asked]
    batcher.close()
    for request, handle in zip(asked, handles, strict=True):
        answer = handle.result(0)
        assert answer.tokens == by_definition(request)[: len(answer.tokens)]
    assert "cancelled" in {handle.result(0).finished for handle in handles}
    assert batcher.run(asked[:2])[1].tokens == by_definition(asked[1])  # a list can be answered all the same


def test_what_fails_ends_those_in_work_and_the_service_goes_on(remembering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(prompt=(1, 2, 3), max_new_tokens=3)
    with remembering() as batcher:
        real = batcher._rows.read

        def fails(parts: Sequence[Part], width: int) -> torch.Tensor:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(batcher._rows, "read", fails)
        handle = batcher.submit(request)
        with pytest.raises(RuntimeError, match="out of memory"):
            handle.result(20)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(handle)
        monkeypatch.setattr(batcher._rows, "read", real)
        assert batcher.submit(request).result(20).tokens == by_definition(request)


def test_a_callers_function_that_fails_ends_its_own_answer_alone(remembering: Any) -> None:
    def fails(piece: str) -> None:
        raise KeyError(piece)

    plain = Request(prompt=(1, 2, 3, 4, 5), max_new_tokens=6)
    with remembering() as batcher:
        broken, fine = batcher.submit(Request(prompt=(1, 2, 3), max_new_tokens=6, on_text=fails)), batcher.submit(plain)
        with pytest.raises(KeyError):
            broken.result(20)
        assert fine.result(20).tokens == by_definition(plain)
        assert batcher._slots.free == 7
    with pytest.raises(KeyError):
        batcher.run([Request(prompt=(1, 2, 3), max_new_tokens=6, on_text=fails)])


def test_logits_that_are_not_finite_end_their_answer_and_reach_no_other(small: Any, tokenizer: Any) -> None:
    model = small("llama")
    fine = Request(prompt=(1, 40, 50), max_new_tokens=6, logprobs=True)
    wanted = Batcher(model, tokenizer, rows=2, tokens=32).run([fine])[0]
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("inf")
    with Batcher(model, tokenizer, rows=2, tokens=32) as batcher:
        broken = [batcher.submit(Request(prompt=(1, 40, 7, 50, 51, 52, 53, 54), max_new_tokens=6)) for _ in range(4)]
        beside = batcher.submit(fine)
        for handle in broken:
            with pytest.raises(DeviceError, match="the model's logits are not finite"):
                handle.result(20)
        assert beside.result(20).tokens == wanted.tokens
        assert batcher.submit(fine).result(20).logprobs == wanted.logprobs  # in a row that one of them had


def test_waiting_has_a_limit(remembering: Any) -> None:
    batcher = remembering()
    held = threading.Event()
    real = batcher._rows.read
    batcher._rows.read = lambda parts, width: (held.wait(), real(parts, width))[1]
    with batcher:
        handle = batcher.submit(Request(prompt=(1,), max_new_tokens=1))
        with pytest.raises(TimeoutError):
            handle.result(0.01)
        held.set()
        assert handle.result(20).finished == "length"


# ---- What is asked --------------------------------------------------------------------------------------------------


def test_a_request_that_does_not_fit_is_refused_with_its_numbers(small: Any, tokenizer: Any) -> None:
    batcher = Batcher(small("llama"), tokenizer, rows=1, tokens=20)
    with pytest.raises(RecipeError, match="the prompt has 15 tokens, and 6 may follow, which is more than 20") as said:
        batcher.run([Request(prompt=(1,) * 15, max_new_tokens=6)])
    assert said.value.fix == "set max_new_tokens to 5 or less"
    with pytest.raises(ValueError, match="there is no adapter 'x'; there are none"):
        batcher.run([Request(prompt=(1,), max_new_tokens=6, adapter="x")])
    assert batcher.run([Request(prompt=(1,) * 15, max_new_tokens=5)])[0].prompt_tokens == 15


@pytest.mark.parametrize(
    "wrong",
    [{"prompt": ()}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"stop": ("",)}, {"stop": "end"}],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Request(**{"prompt": (1,), "max_new_tokens": 1, **wrong})


def test_rows_are_as_many_as_fit_into_free_memory(small: Any, tokenizer: Any) -> None:
    class Little(CpuBackend):
        free_bytes = 0

        def memory(self, index: int) -> MemoryUse:
            return MemoryUse(total_bytes=None, free_bytes=self.free_bytes, used_bytes=None, reserved_bytes=None, peak_bytes=None)

    model, backend = small("llama"), Little()
    # Two layers, two key heads of 32 in float32: 1 KiB for each of 448 places; and 24 bytes for each of 263 entries of the logits.
    row = 448 * 1024 + 24 * 263
    reading = 512 * (6 * 128 + 3 * 352) * 4 + 512 * 263
    backend.free_bytes = (RUNTIME_BYTES + reading + 20 * row + row // 2) * 10 // 9
    assert Batcher(model, tokenizer, backend=backend, tokens=400).rows == 20
    assert Batcher(model, tokenizer, backend=backend, tokens=400, most_rows=3).rows == 3
    backend.free_bytes = 100 << 20
    with pytest.raises(DeviceError, match="an answer needs 454 KiB beside the model, and 100 MiB are free"):
        Batcher(model, tokenizer, backend=backend, tokens=400)


def test_the_model_is_left_as_it_was(small: Any, tokenizer: Any) -> None:
    model = small("llama").train()
    before = {name: id(module) for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    Batcher(model, tokenizer, rows=2, tokens=32).run([Request(prompt=(1, 2), max_new_tokens=2)])
    assert model.training and model.config._attn_implementation == attention
    assert {name: id(module) for name, module in model.named_modules()} == before
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_answer_says_how_long_it_took(small: Any, tokenizer: Any) -> None:
    batcher = Batcher(small("llama"), tokenizer, rows=1, tokens=32)
    begun = time.monotonic()
    answers: list[Answer] = batcher.run([Request(prompt=(1, 2), max_new_tokens=6)] * 2)
    whole = time.monotonic() - begun
    for answer in answers:
        assert answer.first_s is not None and 0 < answer.first_s <= answer.total_s <= whole
    assert answers[0].waited_s < answers[1].waited_s <= whole
    assert 0 < batcher.work.busy_s <= whole and batcher.work.answers == 2
