"""What a run takes from its data: what is held out, what is asked, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pantheraml.data.load import BadRows
from pantheraml.data.prepare import IN_MEMORY, Prepared, prepare
from pantheraml.data.source import Shuffled, Streamed
from pantheraml.errors import DataError
from pantheraml.models.tiny import tiny_tokenizer
from pantheraml.recipe.types import DataSpec


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}: ", "completion": f"answer {i * i}"} for i in range(count)]


def written(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" if isinstance(row, dict) else row for row in rows))
    return str(path)


def prepared(rows=None, held_out=None, *, seed=1, questions=3, max_tokens=64, memory_bytes=None, tokenizer=None, **spec) -> Prepared:
    asked = DataSpec(**{"train": (IN_MEMORY,), **spec})
    return prepare(
        asked,
        tokenizer or tiny_tokenizer(),
        BadRows(asked.on_bad_row, asked.max_bad_rows),
        max_tokens=max_tokens,
        loss_on="assistant",
        seed=seed,
        questions=questions,
        memory_bytes=memory_bytes,
        train=rows,
        held_out=held_out,
    )


def texts(examples) -> list[str]:
    tokenizer = tiny_tokenizer()
    return [tokenizer.decode(example.tokens, skip_special_tokens=True) for example in examples]


def all_texts(rows) -> list[str]:
    return [row["prompt"] + row["completion"] for row in rows]


# ---- What is held out --------------------------------------------------------------------------------------------


def test_held_out_and_learned_rows_are_all_rows_and_share_none():
    data = prepared(pairs(100), eval_fraction=0.2)
    learned, held = texts(data.train), texts(data.held_out)
    assert len(held) == 20 and not set(learned) & set(held)
    assert sorted(learned + held) == sorted(all_texts(pairs(100)))


def test_the_same_seed_holds_out_the_same_rows_whatever_their_order():
    held = [set(texts(prepared(rows, seed=seed, eval_fraction=0.2).held_out)) for rows, seed in ((pairs(50), 1), (pairs(50)[::-1], 1))]
    assert held[0] == held[1]
    assert held[0] != set(texts(prepared(pairs(50), seed=2, eval_fraction=0.2).held_out))


def test_at_most_so_many_rows_are_held_out_and_none_without_a_fraction():
    assert len(prepared(pairs(100), eval_fraction=0.5, max_eval_rows=7).held_out) == 7
    nothing = prepared(pairs(100), eval_fraction=0.0)
    assert len(nothing.held_out) == 0 and nothing.questions == () and len(nothing.train) == 100


def test_rows_given_for_evaluation_leave_train_whole():
    given = prepared(pairs(20), pairs(100)[90:], max_eval_rows=4)
    assert len(given.train) == 20 and texts(given.held_out) == all_texts(pairs(100)[90:94])
    assert [example.where for example in given.held_out] == [f"<eval>:{i}" for i in range(1, 5)]


def test_no_rows_given_for_evaluation_means_none():
    assert len(prepared(pairs(20), []).held_out) == 0


def test_evaluation_files_may_have_another_format(tmp_path: Path):
    chat = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}]
    data = prepared(train=(written(tmp_path / "t.jsonl", pairs(5)),), eval=(written(tmp_path / "e.jsonl", chat),))
    assert data.detected.format == "prompt-completion"
    assert texts(data.held_out) == ["hellogood day"] and data.questions[0].answer == "good day"


def test_a_bad_row_that_is_held_out_by_chance_is_a_bad_row_like_any_other():
    """One of twelve rows is held out; for some seeds it is the bad one, and then nothing is."""
    rows = [*pairs(11), {"prompt": "without a completion"}]
    left = []
    for seed in range(40):
        data = prepared(rows, seed=seed, on_bad_row="skip")
        assert len(data.bad.rows) == 1 and len(data.train) + len(data.held_out) == 11
        left.append(len(data.held_out))
    assert set(left) == {0, 1}


# ---- Streams -----------------------------------------------------------------------------------------------------


def test_a_stream_learns_all_that_is_not_held_out(tmp_path: Path):
    rows = [*pairs(60), *pairs(10)]  # ten stand there twice: their copies are held out with them
    path = written(tmp_path / "rows.jsonl", rows)
    data = prepared(train=(path,), streaming="on", eval_fraction=0.3)
    assert data.train is None and data.shared == ()
    held = set(texts(data.held_out))
    assert 5 <= len(held) <= 35  # each row with probability 0.3: outside of this once in a million
    source = data.source(batch_size=4, seed=1, epochs=1.0, steps=None)
    assert isinstance(source, Streamed)
    learned = [text for k in range(source.total_steps) for text in texts(source.step(k))]
    assert sorted(learned) == sorted(text for text in all_texts(rows) if text not in held)


def test_a_stream_holds_out_the_same_rows_again(tmp_path: Path):
    path = written(tmp_path / "rows.jsonl", pairs(60))
    made = [prepared(train=(path,), streaming="on", eval_fraction=0.3, seed=seed) for seed in (1, 1, 2)]
    assert texts(made[0].held_out) == texts(made[1].held_out) and made[0].held_keys == made[1].held_keys
    assert made[0].held_keys != made[2].held_keys
    assert len(prepared(train=(path,), streaming="on", eval_fraction=0.9, max_eval_rows=5).held_out) == 5


def test_a_stream_with_evaluation_files_leaves_nothing_out(tmp_path: Path):
    train, held = written(tmp_path / "t.jsonl", pairs(12)), written(tmp_path / "e.jsonl", pairs(3))
    data = prepared(train=(train,), eval=(held,), streaming="on")
    assert data.held_keys == frozenset() and len(data.held_out) == 3
    assert data.source(batch_size=1, seed=1, epochs=1.0, steps=None).total_steps == 12


def test_auto_streams_files_of_more_than_a_quarter_of_free_memory(tmp_path: Path):
    path = written(tmp_path / "rows.jsonl", pairs(20))
    size = Path(path).stat().st_size
    for where in (path, str(tmp_path)):
        assert prepared(train=(where,), memory_bytes=4 * size).train is not None
        assert prepared(train=(where,), memory_bytes=4 * size - 1).train is None
    assert prepared(train=(path,), memory_bytes=1, streaming="off").train is not None
    assert prepared(train=(path,)).train is not None


def test_a_stream_of_which_everything_is_held_out_or_unusable_is_an_error(tmp_path: Path):
    """Otherwise the run would have no step, and nobody would know why."""
    data = prepared(train=(written(tmp_path / "rows.jsonl", pairs(5)),), streaming="on", eval_fraction=0.999)
    assert len(data.held_out) == 5
    with pytest.raises(DataError, match="no row is left to train on") as raised:
        data.source(batch_size=1, seed=1, epochs=1.0, steps=None)
    assert "data.eval_fraction" in raised.value.fix
    broken = written(tmp_path / "broken.jsonl", ["{\n"] * 3)
    data = prepared(train=(broken,), streaming="on", format="messages", on_bad_row="skip")
    with pytest.raises(DataError, match="no row is left") as raised:
        data.source(batch_size=1, seed=1, epochs=1.0, steps=None)
    assert "not valid JSON" in raised.value.why


# ---- Rows from memory --------------------------------------------------------------------------------------------


def test_rows_from_memory_are_never_streamed_and_any_iterable_will_do():
    data = prepared((dict(row) for row in pairs(20)), memory_bytes=1)
    assert data.train is not None and len(data.train) + len(data.held_out) == 20
    assert isinstance(data.source(batch_size=2, seed=1, epochs=1.0, steps=None), Shuffled)


def test_rows_from_memory_cannot_be_read_again():
    with pytest.raises(DataError, match="given from memory") as raised:
        prepared()
    assert "pantheraml.train" in raised.value.fix


@pytest.mark.parametrize("format", ["auto", "messages"])
def test_no_rows_at_all_is_an_error(format):
    with pytest.raises(DataError, match="there are no rows"):
        prepared([], format=format)


def test_only_unusable_lines_is_an_error_that_counts_them(tmp_path: Path):
    broken = written(tmp_path / "broken.jsonl", ["{\n"] * 3)
    with pytest.raises(DataError, match="there are no rows to train on") as raised:
        prepared(train=(broken,), format="messages", on_bad_row="skip")
    assert "3  the line is not valid JSON" in raised.value.why


# ---- What is asked, and what is said -----------------------------------------------------------------------------


def test_questions_are_held_out_rows_whose_answer_is_not_in_the_prompt():
    data = prepared(pairs(100), eval_fraction=0.1, questions=4)
    held = texts(data.held_out)
    assert len(data.questions) == 4
    for question, whole in zip(data.questions, held, strict=False):
        prompt = tiny_tokenizer().decode(question.prompt_tokens, skip_special_tokens=True)
        assert prompt + question.answer == whole
    assert len(prepared(pairs(100), eval_fraction=0.1, questions=0).questions) == 0


def test_answers_are_compared_without_white_space_at_the_ends():
    assert prepared(pairs(3), [{"prompt": "q", "completion": "  a b \n"}]).questions[0].answer == "a b"


def test_rows_without_a_question_or_with_one_that_is_too_long_are_not_asked():
    assert prepared([{"text": f"plain {i}"} for i in range(20)]).questions == ()
    long = [{"prompt": "x" * 30, "completion": "y"}, {"prompt": "short", "completion": "y"}]
    assert [question.answer for question in prepared(pairs(3), long, max_tokens=33).questions] == ["y", "y"]
    assert len(prepared(pairs(3), long, max_tokens=20, on_bad_row="skip").questions) == 1


def test_rows_in_both_are_counted_and_said():
    data = prepared(pairs(12), [*pairs(2), {"prompt": "new", "completion": "row"}])
    assert data.shared == (("<eval>:1", "<memory>:1"), ("<eval>:2", "<memory>:2"))
    assert any(
        note.startswith("2 of 3 evaluation examples also stand in the training data (first: <eval>:1 = <memory>:1)") for note in data.notes
    )
    assert prepared(pairs(12)).notes == ()


def test_cut_rows_and_bad_rows_are_said():
    rows = [*pairs(5), {"prompt": "q", "completion": "y" * 80}, {"prompt": "nothing more"}]
    data = prepared(rows, eval_fraction=0.0, on_bad_row="skip", max_tokens=40)
    assert any("Longer than model.max_tokens=40: 1 rows truncated, 0 dropped, 0 split" in note for note in data.notes)
    assert any(note.startswith("1 rows cannot be used and are left out:") and "completion is missing" in note for note in data.notes)


def test_a_tokenizer_without_a_template_gets_a_plain_one_that_is_announced():
    bare = tiny_tokenizer()
    bare.chat_template = None
    chat = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}]
    assert "no chat template" in " ".join(prepared(chat, tokenizer=bare).notes)
    bare.chat_template = None
    prepared(pairs(3), tokenizer=bare)
    assert bare.chat_template is None  # prompts and completions need none


def test_a_template_of_the_users_own_is_used(tmp_path: Path):
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
        "{% else %}Q:{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    chat = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}]
    data = prepared(chat, chat_template=str(tmp_path / "own.jinja"))
    assert texts(data.train) == ["Q:helloA:good day"]


def test_progress_counts_the_rows():
    seen: list[int] = []
    prepare(
        DataSpec(train=(IN_MEMORY,), eval_fraction=0.0),
        tiny_tokenizer(),
        BadRows("fail", 0),
        max_tokens=64,
        loss_on="all",
        seed=1,
        questions=0,
        train=pairs(4),
        progress=seen.append,
    )
    assert seen == [1, 2, 3, 4]
