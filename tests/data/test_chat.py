"""Masks are checked against runs written by hand, against Hugging Face's own, and against separately tokenised pieces."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pantheraml.data.chat import Encoder, ensure_chat_template, read_chat_template
from pantheraml.data.load import Row, UnusableRow
from pantheraml.errors import DataError
from pantheraml.models.tiny import tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{ first if loop.first else '' }}{{ m.content | trim }}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
# Qwen3's habit: thinking is kept, and made up if absent, in the last answer only.
THINKING = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% if loop.last %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else '' %}"
    "{% set text = '<think>\\n' + thought + '\\n</think>\\n\\n' + text %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Phi-3's habit: a text that is not a prompt ends with one more token.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|pad|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Mistral's habit: the system text moves into the last question, and there is no role before an answer.
MISTRAL = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last = loop.last or (loop.index0 + 2 == messages | length and messages[-1].role == 'assistant') %}"
    "{{ '[INST] ' + (system + '\\n\\n' if system and last else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# DeepSeek-R1's habit: a prompt opens thinking that stored answers do not have.
OPEN_THINK = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)

SYSTEM = {"role": "system", "content": "Be brief."}
ONE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
TWO = [*ONE, {"role": "user", "content": "More é 🙂?"}, {"role": "assistant", "content": " <think>\nhm\n</think>\n\nNo 🙂. "}]


def row(messages, **more) -> Row:
    return Row({"messages": messages, **more}, "f", 1)


@pytest.mark.parametrize(
    ("template", "messages", "runs"),
    [
        (CHATML, TWO, ["Hello!<|im_end|>\n", " <think>\nhm\n</think>\n\nNo 🙂. <|im_end|>\n"]),
        (CHATML, [SYSTEM, *ONE, *ONE[:1]], ["Hello!<|im_end|>\n"]),
        (GENERATION, TWO, ["Hello!<|im_end|>", " <think>\nhm\n</think>\n\nNo 🙂. <|im_end|>"]),
        (LLAMA, [SYSTEM, *TWO], ["Hello!<|eot_id|>", "<think>\nhm\n</think>\n\nNo 🙂.<|eot_id|>"]),
        (GEMMA, [SYSTEM, *TWO], ["Hello!<end_of_turn>\n", "<think>\nhm\n</think>\n\nNo 🙂.<end_of_turn>\n"]),
        (THINKING, TWO, ["Hello!<|im_end|>\n", "<think>\nhm\n</think>\n\nNo 🙂. <|im_end|>\n"]),
        (THINKING, [*TWO, *ONE], ["Hello!<|im_end|>\n", "No 🙂. <|im_end|>\n", "<think>\n\n</think>\n\nHello!<|im_end|>\n"]),
        (THINKING, [*TWO, *ONE[:1]], ["Hello!<|im_end|>\n", "No 🙂. <|im_end|>\n"]),
        (PHI, [*ONE, *ONE], ["Hello!<|pad|>", "Hello!<|pad|>\n<|end|>"]),
        (MISTRAL, [SYSTEM, *ONE, *ONE], [" Hello!<|end|>", " Hello!<|end|>"]),
        (OPEN_THINK, [*TWO, *ONE], ["Hello!<|end|>", "\n\nNo 🙂. <|end|>", "Hello!<|end|>"]),
        (CHATML, [ONE[1], *ONE], ["Hello!<|im_end|>\n", "Hello!<|im_end|>\n"]),
    ],
    ids=[
        "chatml",
        "chatml-system-open",
        "generation",
        "llama",
        "gemma",
        "thinking",
        "thinking-3",
        "thinking-open",
        "phi",
        "mistral",
        "r1",
        "gpt-first",
    ],
)
def test_learned_runs_by_template(tokenizer, learned, template, messages, runs):
    example = Encoder(tokenizer, "assistant", "messages", template).encode(row(messages))
    assert learned(example) == runs
    rendered = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert example.tokens.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert example.tokens.dtype == np.int32 and example.loss.dtype == bool and example.where == "f:1"


@pytest.mark.parametrize("template", [CHATML, GENERATION, THINKING, OPEN_THINK])
def test_loss_on_last_and_all(tokenizer, learned, template):
    last = Encoder(tokenizer, "last", "messages", template).encode(row([*TWO, *ONE]))
    end = {CHATML: "Hello!<|im_end|>\n", GENERATION: "Hello!<|im_end|>", OPEN_THINK: "Hello!<|end|>"}
    assert learned(last) == [end.get(template, "<think>\n\n</think>\n\nHello!<|im_end|>\n")]
    everything = Encoder(tokenizer, "all", "messages", template).encode(row(TWO))
    assert everything.loss.tolist() == [False] + [True] * (len(everything.tokens) - 1)


def test_tiny_template_token_by_token(tokenizer):
    """The whole arrays, written by hand: begin=1, end=2, user=3, assistant=4, and a byte is its place after 7."""
    example = Encoder(tokenizer, "assistant", "messages").encode(
        row([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    )
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert example.tokens.tolist() == [1, 3, a, 2, 4, b, 2]
    assert example.loss.tolist() == [False, False, False, False, False, True, True]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}
TOOL_TURNS = [{"role": "user", "content": "2+2"}, CALL, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "Four"}, *ONE]


def test_tools_and_calls(tokenizer, learned):
    tools = [{"type": "function", "function": {"name": "add"}}]
    example = Encoder(tokenizer, "assistant", "messages").encode(row(TOOL_TURNS, tools=tools))
    printed = '[{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]'
    assert learned(example) == [printed + "<|end|>", "Four<|end|>", "Hello!<|end|>"]
    assert '<|system|>[{"type": "function", "function": {"name": "add"}}]<|end|>' in tokenizer.decode(example.tokens)


def test_a_template_that_leaves_things_out_is_refused(tokenizer):
    with pytest.raises(UnusableRow, match=r"leaves out what messages\[1\] says"):
        Encoder(tokenizer, "assistant", "messages", CHATML).encode(row(TOOL_TURNS))
    silent = "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %}\n{% endfor %}"
    with pytest.raises(UnusableRow, match=r"leaves out what messages\[1\] says"):
        Encoder(tokenizer, "assistant", "messages", silent).encode(row(ONE))


PARTS = [*"ab é🙂\n<|>/\ue000\ue001", "<think>", "</think>", "<|im_end|>", "assistant"]
ANSWERS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=12).map("".join)


@settings(max_examples=200, deadline=None)
@given(turns=st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=4))
def test_thinking_masks_for_any_content(tokenizer, turns):
    """The template of THINKING written again in Python, with the learned pieces known by construction. Never a wrong mask."""
    messages, pieces = [], []
    for index, (question, answer) in enumerate(turns):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = answer.split("</think>")[-1].lstrip("\n")
        if index == len(turns) - 1:
            thought = answer.split("</think>")[0].split("<think>")[-1].strip("\n") if "</think>" in answer else ""
            text = f"<think>\n{thought}\n</think>\n\n{text}"
        pieces += [(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False), (f"{text}<|im_end|>\n", True)]
    try:
        example = Encoder(tokenizer, "assistant", "messages", THINKING).encode(row(messages))
    except UnusableRow as error:
        # Refused only for an empty answer, or one that is all thinking, which the template drops.
        assert any(not answer.split("</think>")[-1].strip() for _, answer in turns), error
        return
    ids = [(tokenizer(text, add_special_tokens=False)["input_ids"], learn) for text, learn in pieces]
    assert example.tokens.tolist() == [token for piece, _ in ids for token in piece]
    assert example.loss.tolist() == [learn for piece, learn in ids for _ in piece]


def test_what_cannot_be_located_is_refused(tokenizer):
    backwards = "{% for m in messages | reverse %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(UnusableRow, match="cannot be located exactly"):
        Encoder(tokenizer, "assistant", "messages", backwards).encode(row(TWO))


def test_special_tokens_inside_content_do_not_move_masks(tokenizer, learned):
    trick = "<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    messages = [{"role": "user", "content": trick}, {"role": "assistant", "content": "x<|im_end|>y"}, *ONE]
    for template in (CHATML, THINKING):
        example = Encoder(tokenizer, "assistant", "messages", template).encode(row(messages))
        assert learned(example)[0] == "x<|im_end|>y<|im_end|>\n" and len(learned(example)) == 2
    example = Encoder(tokenizer, "assistant", "messages").encode(
        row([{"role": "user", "content": "a<|end|><|assistant|>b<|end|>"}, ONE[1]])
    )
    assert learned(example) == ["Hello!<|end|>"]


def _merging_tokenizer(pre, decoder, post, end: str):
    """A BPE that merges, to see tokens of several characters and offsets as real tokenizers report them."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre, decoder
    if post is not None:
        inner.post_processor = post
    alphabet = sorted({*pre.alphabet()} if hasattr(pre, "alphabet") else [])
    special = [end, "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["user assistant Hello! More think   spaces and  words", "Hi there, hello there\n\n"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-trimmed", "metaspace"])
@pytest.mark.parametrize("answer", ["Hello there", " Hello  ", "   ", "é🙂\n\n", "a   b"])
def test_tokens_of_several_characters(kind, answer):
    """Special tokens split a text, so the tokens of the whole are those of its pieces; the mask is the middle piece."""
    from tokenizers import decoders, pre_tokenizers, processors

    byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = {
        "byte-level": (byte, decoders.ByteLevel(), None),
        "byte-level-trimmed": (byte, decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)),
        "metaspace": (pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace(prepend_scheme="never"), None),
    }[kind]
    tokenizer = _merging_tokenizer(*made, end="</s>")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    encoder = Encoder(tokenizer, "assistant", "messages", template)
    messages = [{"role": "user", "content": " Hi there "}, {"role": "assistant", "content": answer}]
    if not answer.strip():  # only spaces are no answer, but a question may be
        messages[0]["content"], messages[1]["content"] = answer, "Hello"
    pieces = ["<|im_start|>", messages[0]["content"], "<|im_end|>", "<|im_start|>", messages[1]["content"], "<|im_end|>"]
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    example = encoder.encode(row(messages))
    assert example.tokens.tolist() == [token for piece in ids for token in piece]
    count = len(ids[4]) + len(ids[5])
    assert example.loss.tolist() == [False] * (len(example.tokens) - count) + [True] * count


TRL_TEMPLATES = Path(find_spec("trl").origin).parent / "chat_templates" if find_spec("trl") else Path("absent")
# Families whose training variant in TRL differs by the {% generation %} marks alone.
FAMILIES = ["cohere", "cohere2", "gemma", "gemma3", "llama3", "lfm2_v2", "qwen3_instruct_2507", "qwen3_vl"]


@pytest.mark.skipif(not TRL_TEMPLATES.exists(), reason="TRL is not installed")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("messages", [ONE, [*TWO, *ONE]], ids=["one", "three"])
def test_real_templates_against_hugging_face_masks(tokenizer, family, messages):
    original, training = ((TRL_TEMPLATES / f"{family}{end}.jinja").read_text() for end in ("", "_training"))
    reference = tokenizer.apply_chat_template(
        messages, chat_template=training, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    for template in (original, training):
        example = Encoder(tokenizer, "assistant", "messages", template).encode(row(messages))
        assert example.tokens.tolist() == reference["input_ids"]
        assert example.loss.astype(int).tolist() == reference["assistant_masks"]


@pytest.mark.skipif(not TRL_TEMPLATES.exists(), reason="TRL is not installed")
@pytest.mark.parametrize("family", ["qwen3", "qwen3_6"])
def test_real_thinking_templates(tokenizer, learned, family):
    template = (TRL_TEMPLATES / f"{family}.jinja").read_text()
    opened = "<think>\n" if family == "qwen3" else ""  # Qwen3.6 opens the thinking in the prompt
    example = Encoder(tokenizer, "assistant", "messages", template).encode(row([SYSTEM, *TWO, *ONE]))
    assert learned(example) == ["Hello!<|im_end|>\n", learned(example)[1], opened + "\n</think>\n\nHello!<|im_end|>\n"]
    assert learned(example)[1].strip() in ("No 🙂. <|im_end|>", "No 🙂.<|im_end|>")


def test_sharegpt_and_alpaca_golden(tokenizer, learned):
    spoken = {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    example = Encoder(tokenizer, "assistant", "sharegpt").encode(Row(spoken, "f", 1))
    assert tokenizer.decode(example.tokens) == "<|begin|><|system|>s<|end|><|user|>q<|end|><|assistant|>a<|end|>"
    assert learned(example) == ["a<|end|>"]
    example = Encoder(tokenizer, "assistant", "alpaca").encode(Row({"instruction": "do", "input": "x", "output": "a"}, "f", 1))
    assert tokenizer.decode(example.tokens) == "<|begin|><|user|>do\n\nx<|end|><|assistant|>a<|end|>" and learned(example) == ["a<|end|>"]


def test_prompt_completion_and_text_golden(tokenizer, learned):
    pair = Row({"prompt": "2+2=", "completion": "4"}, "f", 1)
    example = Encoder(tokenizer, "assistant", "prompt-completion").encode(pair)
    assert tokenizer.decode(example.tokens) == "2+2=4<|end|>" and learned(example) == ["4<|end|>"]
    assert learned(Encoder(tokenizer, "all", "prompt-completion").encode(pair)) == ["+2=4<|end|>"]
    both = Row({"prompt": ONE, "completion": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "f", 1)
    assert learned(Encoder(tokenizer, "assistant", "prompt-completion").encode(both)) == ["a<|end|>"]
    assert learned(Encoder(tokenizer, "assistant", "prompt-completion", GENERATION).encode(both)) == ["a<|im_end|>"]
    text = Encoder(tokenizer, "assistant", "text").encode(Row({"text": "abc"}, "f", 1))
    assert tokenizer.decode(text.tokens) == "abc<|end|>" and learned(text) == ["bc<|end|>"]
    ended = Encoder(tokenizer, "assistant", "text").encode(Row({"text": "abc<|end|>"}, "f", 1))
    assert ended.tokens.tolist() == text.tokens.tolist()


def test_begin_of_text_once_if_the_tokenizer_adds_one():
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    pair = Encoder(tokenizer, "assistant", "prompt-completion")
    assert tokenizer.decode(pair.encode(Row({"prompt": "q", "completion": "a"}, "f", 1)).tokens) == "<|begin|>qa<|end|>"
    assert pair.encode(Row({"prompt": "", "completion": "a"}, "f", 1)).loss.tolist() == [False, True, True]
    assert pair.question(Row({"prompt": "q", "completion": "a"}, "f", 1)).prompt_tokens[0] == 1
    text = Encoder(tokenizer, "assistant", "text")
    for content in ("abc", "<|begin|>abc"):
        assert tokenizer.decode(text.encode(Row({"text": content}, "f", 1)).tokens) == "<|begin|>abc<|end|>"
    assert Encoder(tokenizer, "assistant", "messages").encode(row(ONE)).tokens.tolist().count(1) == 1


def test_question_is_everything_before_the_last_answer(tokenizer):
    asked = Encoder(tokenizer, "assistant", "messages", CHATML).question(row([*TWO, *ONE]))
    assert asked.text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n") and asked.answer == "Hello!"
    assert tokenizer.decode(asked.prompt_tokens) == asked.text
    asked = Encoder(tokenizer, "assistant", "prompt-completion").question(Row({"prompt": "q", "completion": "a"}, "f", 1))
    assert (asked.text, asked.answer, tokenizer.decode(asked.prompt_tokens)) == ("q", "a", "q")
    called = Encoder(tokenizer, "assistant", "messages").question(row(TOOL_TURNS[:2]))
    assert '"name": "add"' in called.answer
    with pytest.raises(UnusableRow, match="no question"):
        Encoder(tokenizer, "assistant", "text").question(Row({"text": "t"}, "f", 1))
    with pytest.raises(UnusableRow, match="no question"):
        Encoder(tokenizer, "assistant", "messages").question(row([ONE[1]]))


def test_default_template_learns_answers_and_their_end(learned):
    tokenizer = tiny_tokenizer()
    assert ensure_chat_template(tokenizer) is None
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template") as caught:
        Encoder(tokenizer, "assistant", "alpaca")
    assert "alpaca rows are conversations" in caught.value.why and "data.chat_template" in caught.value.fix
    Encoder(tokenizer, "assistant", "text")
    assert "text headings" in (ensure_chat_template(tokenizer) or "")
    example = Encoder(tokenizer, "assistant", "messages").encode(row([SYSTEM, *ONE, *ONE]))
    turn = "### User:\nHi\n\n### Assistant:\nHello!<|end|>\n\n"
    assert tokenizer.decode(example.tokens) == "### System:\nBe brief.\n\n" + turn + turn
    assert learned(example) == ["Hello!<|end|>\n\n"] * 2
    assert '{"a": 2}' in learned(Encoder(tokenizer, "assistant", "messages").encode(row(TOOL_TURNS)))[0]


def test_what_a_tokenizer_or_template_lacks():
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match="not valid Jinja") as caught:
        Encoder(tokenizer, "assistant", "messages", "{% for %}").encode(row(ONE))
    assert "data.chat_template" in caught.value.fix
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(UnusableRow, match="the chat template refuses the conversation: no system role"):
        Encoder(tokenizer, "assistant", "messages", refusing).encode(row([SYSTEM, *ONE]))
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token") as caught:
        Encoder(tokenizer, "assistant", "text")
    assert "never learns to stop" in caught.value.why and "eos_token" in caught.value.fix


def test_the_room_imports_neither_torch_nor_transformers():
    modules = ", ".join(f"pantheraml.data.{name}" for name in ("load", "chat", "source", "pack", "inspect"))
    code = f"import sys, {modules}; print([m for m in ('torch', 'transformers', 'pyarrow', 'datasets', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_read_chat_template(tmp_path):
    (tmp_path / "t.jinja").write_text(CHATML)
    assert read_chat_template(str(tmp_path / "t.jinja")) == CHATML
    with pytest.raises(DataError, match=r"data\.chat_template=.*none\.jinja cannot be read"):
        read_chat_template(str(tmp_path / "none.jinja"))
