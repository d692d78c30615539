from __future__ import annotations

import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pantheraml.data.load import (
    BadRow,
    BadRows,
    Conversation,
    PromptCompletion,
    Row,
    Text,
    UnusableRow,
    detect_format,
    fingerprint,
    normalize,
    read_rows,
    rows_of,
    write_jsonl,
)
from pantheraml.errors import DataError, MissingExtra


def read(*paths):
    bad: list[BadRow] = []
    return list(read_rows([str(path) for path in paths], on_bad=bad.append)), bad


def row(record) -> Row:
    return Row(record, "f", 1)


def test_jsonl_with_bom_crlf_blank_lines_and_unicode(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "é 🙂\u2028x"}\r\n\r\n{"text": "two"}'.encode())
    rows, bad = read(path)
    assert [r.record for r in rows] == [{"text": "é 🙂\u2028x"}, {"text": "two"}] and not bad
    assert [r.where for r in rows] == [f"{path}:1", f"{path}:3"]


def test_bad_jsonl_lines_are_handed_on_with_place_reason_and_text(tmp_path):
    path = tmp_path / "a.jsonl"
    huge = b'{"n": ' + b"9" * 5000 + b"}"
    path.write_bytes(b'{"text": "a"}\n{"text": \n[1]\n3\n{"text": "\xff"}\n' + huge + b'\n{"text": "b"}\n')
    rows, bad = read(path)
    assert [r.line for r in rows] == [1, 7]
    assert [(b.line, b.reason) for b in bad] == [
        (2, "the line is not valid JSON: Expecting value at column 1"),
        (3, "the row is a list, not an object with named fields"),
        (4, "the row is a number, not an object with named fields"),
        (5, "the line is not valid UTF-8"),
        (6, "the line is not valid JSON: too large a number, or too deep"),
    ]
    assert bad[0].text == '{"text":' and bad[3].text == '{"text": "�"}\n' and len(bad[4].text) == 203


@pytest.mark.parametrize(
    "content",
    ['[{"text": "a"}, {"text": "b"}]', '{"data": [{"text": "a"}, {"text": "b"}], "version": 1}', '\ufeff[{"text": "a"}, {"text": "b"}]'],
)
def test_json_arrays(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    rows, _ = read(tmp_path / "a.json")
    assert [(r.record["text"], r.line) for r in rows] == [("a", 1), ("b", 2)]


def test_json_that_is_lines_or_one_row(tmp_path):
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "one.json").write_text('{"messages": [{"role": "user", "content": "x"}]}')
    assert [r.record["text"] for r in read(tmp_path / "lines.json")[0]] == ["a", "b"]
    assert read(tmp_path / "one.json")[0][0].record["messages"][0]["content"] == "x"


def test_csv_keeps_numbers_as_text_and_finds_bad_lines(tmp_path):
    path = tmp_path / "a.csv"
    long = "x" * 200_000  # over the default limit of the csv module
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"two\nlines",007\r\na,b,c\r\nonly\r\n\xff,b\r\n' + long.encode() + b",y\r\n")
    rows, bad = read(path)
    assert rows[0].record == {"prompt": "two\nlines", "completion": "007"} and rows[0].line == 2
    assert rows[1].record["prompt"] == long
    assert [(b.line, b.reason) for b in bad] == [
        (4, "the row has more fields than the header"),
        (5, "the row has fewer fields than the header"),
        (6, "the line is not valid UTF-8"),
    ]


def test_parquet_rows_count_from_one_over_batches(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(2500)]}), path)
    rows, _ = read(path)
    assert [r.line for r in rows] == list(range(1, 2501)) and rows[2000].record == {"text": "2000"}


def test_text_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\nmore\r\n\r\n \n\ntwo\n\n\xff\n")
    rows, bad = read(tmp_path / "a.txt")
    assert [(r.record["text"], r.line) for r in rows] == [("one\nmore", 1), ("two", 6)]
    assert [(b.line, b.reason) for b in bad] == [(8, "the text is not valid UTF-8")]


def test_a_folder_is_its_data_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "readme.md").write_text("no data")
    assert [r.record["text"] for r in read(tmp_path)[0]] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nbroken')
    assert next(read_rows([str(path)], on_bad=BadRows("fail", 0))).record == {"text": "a"}


@pytest.mark.parametrize(
    ("name", "content", "what", "fix"),
    [
        ("trian.jsonl", None, "there is no file", "did you mean"),
        ("nowhere/x.jsonl", None, "there is no file", "check the path"),
        ("empty.jsonl", b"\n\n", "holds no rows", "write rows"),
        ("empty.json", b"", "holds no rows", "write rows"),
        ("a.docx", b"x", "an ending that is not known", "JSONL"),
        ("broken.json", b'{"a": ', "cannot be read", "correct it"),
        ("number.json", b"3", "holds a number, not a list of rows", "array"),
        ("a.parquet", b"not parquet", "is not a readable Parquet file", "write it again"),
        ("folder", None, "holds no data files", "name the files"),
    ],
)
def test_what_is_wrong_with_a_whole_file(tmp_path, name, content, what, fix):
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert name in caught.value.what and what in caught.value.what and fix in caught.value.fix and caught.value.why
    if name == "trian.jsonl":
        assert str(tmp_path / "train.jsonl") in caught.value.fix


def test_hub_rows_stream_and_failures_are_told(monkeypatch):
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        if name == "a/missing":
            raise FileNotFoundError("no such set")
        return iter([{"text": "a"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read("hub:a/b:test")[0][0].where == "hub:a/b:test:1"
    read("hub:a/b")
    assert asked == [("a/b", "test", True), ("a/b", "train", True)]
    with pytest.raises(DataError, match="hub:a/missing cannot be read: no such set"):
        read("hub:a/missing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match="datasets is not installed") as caught:
        read("hub:a/b")
    assert caught.value.fix == "pip install 'pantheraml[hub]'"


def test_bad_rows_fail_names_place_and_reason():
    with pytest.raises(DataError) as caught:
        BadRows("fail", 0)(BadRow("f.jsonl", 7, "output is empty", "{}"))
    assert caught.value.what == "f.jsonl:7 cannot be used: output is empty"
    assert "data.on_bad_row=skip" in caught.value.fix and "silence" in caught.value.why


def test_bad_rows_skip_counts_up_to_the_limit_and_writes(tmp_path):
    bad = BadRows("skip", 2)
    bad(BadRow("f", 1, "output is empty", "é"))
    bad(BadRow("f", 1, "output is empty", "é"))  # the same row in the next epoch
    bad(BadRow("f", 2, "output is empty", ""))
    assert bad.table() == "      2  output is empty  (first: f:1)"
    bad.write(tmp_path / "bad_rows.jsonl")
    lines = (tmp_path / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"file": "f", "line": 1, "reason": "output is empty", "text": "é"} and len(lines) == 2
    with pytest.raises(DataError, match=r"3 rows cannot be used, and data\.max_bad_rows is 2") as caught:
        bad(BadRow("f", 3, "text is missing", ""))
    assert "2  output is empty  (first: f:1)" in caught.value.why and "1  text is missing  (first: f:3)" in caught.value.why


def test_writing_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_jsonl(path, iter([{"a": 1}, {"a": object()}]))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_fingerprint_sees_content(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}')
    before = fingerprint([str(path)])
    assert fingerprint([str(path)]) == before
    path.write_text('{"text": "b"}')
    assert fingerprint([str(path)]) != before


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"messages": [], "prompt": "x"}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"instruction": "", "input": "", "output": "", "text": ""}, "alpaca"),
        ({"prompt": "", "completion": ""}, "prompt-completion"),
        ({"text": "", "id": 3}, "text"),
    ],
)
def test_detect_format(record, format):
    detected = detect_format([row(record), row({"other": 1}), row(record)])
    assert detected.format == format and "2 of the first 3 rows" in detected.why


def test_undetectable_names_the_nearest_format():
    with pytest.raises(DataError, match="f is in no known format") as caught:
        detect_format([row({"instrution": "a", "output": "b"})])
    assert caught.value.why == "alpaca needs instruction and output; found instrution, output" and "rename" in caught.value.fix
    with pytest.raises(DataError, match="there are no rows"):
        detect_format([])


def test_normalize_every_format():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert normalize(row({"messages": turns}), "messages") == Conversation(turns)
    spoken = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert normalize(row({"conversations": spoken}), "sharegpt") == Conversation(turns)
    assert normalize(row({"conversations": turns}), "sharegpt") == Conversation(turns)
    asked = normalize(row({"instruction": "do", "input": "this", "output": "a"}), "alpaca")
    assert asked == Conversation([{"role": "user", "content": "do\n\nthis"}, turns[1]])
    for nothing in ({}, {"input": ""}, {"input": None}):
        assert normalize(row({"instruction": "q", "output": "a", **nothing}), "alpaca") == Conversation(turns)
    assert normalize(row({"prompt": "q", "completion": "a"}), "prompt-completion") == PromptCompletion("q", "a")
    assert normalize(row({"prompt": turns, "completion": turns}), "prompt-completion") == Conversation(turns + turns, None, 2)
    assert normalize(row({"text": " t "}), "text") == Text(" t ")
    (only,) = rows_of([{"text": "t"}])
    assert only.where == "<memory>:1"


def test_tools_and_calls_take_the_shape_that_templates_print():
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "+2"}], "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "name": "add"},
    ]
    said = normalize(row({"messages": turns, "tools": '[{"name": "add"}]'}), "messages")
    assert isinstance(said, Conversation)
    assert said.tools == [{"name": "add"}]
    assert said.messages == [
        {"role": "user", "content": "2+2"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
        },
        {"role": "tool", "content": "4", "name": "add"},
    ]


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("format", "record", "reason"),
    [
        ("text", {}, "text is missing"),
        ("text", {"text": None}, "text is null, not text"),
        ("text", {"text": 3}, "text is a number, not text"),
        ("text", {"text": " \n"}, "text is empty"),
        ("text", {"text": "a\ud800"}, "text holds half a character (a lone surrogate)"),
        ("alpaca", {"output": "a"}, "instruction is missing"),
        ("alpaca", {"instruction": "q", "output": ""}, "output is empty"),
        ("alpaca", {"instruction": "q", "output": "a", "input": 3}, "input is a number, not text"),
        ("prompt-completion", {"prompt": "q"}, "completion is missing"),
        ("prompt-completion", {"prompt": "q", "completion": ["a"]}, "completion is a list, not text"),
        ("prompt-completion", {"prompt": [USER], "completion": "a"}, "completion is text, not a list"),
        ("prompt-completion", {"prompt": [USER], "completion": [USER]}, "there is no assistant turn to learn"),
        ("messages", {}, "messages is missing"),
        ("messages", {"messages": "hi"}, "messages is text, not a list"),
        ("messages", {"messages": []}, "messages is empty"),
        ("messages", {"messages": ["hi"]}, "messages[0] is text, not an object"),
        ("messages", {"messages": [{"content": "q"}]}, "messages[0].role is missing"),
        (
            "messages",
            {"messages": [{"role": "human", "content": "q"}]},
            "messages[0].role is 'human', not one of system, user, assistant, tool",
        ),
        ("messages", {"messages": [USER]}, "there is no assistant turn to learn"),
        ("messages", {"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content is null, not text"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": " "}]}, "messages[1].content is empty"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": True}]}, "messages[1].content is true or false, not text"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content holds parts that are not text"),
        ("messages", {"messages": [{"role": "assistant", "tool_calls": "add"}]}, "messages[0].tool_calls is text, not a list"),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            "messages[0].tool_calls holds a call without a function name",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "messages[0].tool_calls holds arguments that are not valid JSON",
        ),
        ("messages", {"messages": [{"role": "assistant", "content": "a"}], "tools": "{"}, "tools is text that is not valid JSON"),
        ("messages", {"messages": [{"role": "assistant", "content": "a"}], "tools": ["f"]}, "tools is not a list of objects"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "conversations[0].value is missing"),
        ("sharegpt", {"conversations": [{"value": "x"}]}, "conversations[0].from is missing"),
    ],
)
def test_every_reason(format, record, reason):
    with pytest.raises(UnusableRow) as caught:
        normalize(row(record), format)
    assert str(caught.value) == reason
