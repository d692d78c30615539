from __future__ import annotations

import json

import pytest
from rich.console import Console

from pantheraml.data.chat import Encoder
from pantheraml.data.inspect import check, convert, show, split_file
from pantheraml.data.load import rows_of
from pantheraml.errors import DataError
from pantheraml.models.tiny import tiny_tokenizer
from pantheraml.recipe.types import DataSpec

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(path, records) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def printed(renderable) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - closed with the console
    with console.file:
        console.print(renderable)
        return console.export_text()


def test_check_reports_everything(tmp_path):
    good = [{"instruction": f"question {i}", "output": "yes"} for i in range(20)]
    path = write(
        tmp_path / "a.jsonl", [*good, good[0], "broken", {"instruction": "x", "output": None}, {"instruction": "long", "output": "y" * 90}]
    )
    held = write(tmp_path / "eval.jsonl", [good[3], {"instruction": "other", "output": "no"}])
    spec = DataSpec(train=(path,), eval=(held,), too_long="error")
    report = check([path], tiny_tokenizer(), spec, 64, batch_size=4, row_tokens=(32, 64), micro_tokens=64)
    assert (report.format, report.rows, report.duplicates) == ("alpaca", 23, 1)
    assert [b.line for b in report.bad] == [22, 23] and "output is null, not text" in report.bad_table
    assert report.counts is not None and (report.counts.used, report.counts.truncated) == (22, 1)
    # begin, user, text, end, assistant, "yes", end: 4 + 10 or 11 + 4; the cut one has 64.
    assert report.lengths == ((32, 21), (64, 1))
    labels = 21 * 4 + 64 - len("_" + "_" + "long" + "__")
    assert report.learned_share == pytest.approx(labels / report.counts.tokens)
    assert report.overlap == ((f"{held}:1", f"{path}:4"),)
    assert 0.4 < (report.packing_efficiency or 0) < 1
    assert json.loads(json.dumps(report.to_dict()))["counts"]["truncated"] == 1
    text = printed(report.render())
    for part in (
        "alpaca (23 of the first",
        "1 repeated and 2 unusable",
        "1 truncated",
        "up to tokens",
        "not valid JSON",
        f"{held}:1 = {path}:4"[:60],
    ):
        assert part in text.replace("\n", "") or part in text


def test_check_without_tokenizer_looks_at_rows_only(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT[:1]}])
    report = check([path], None, DataSpec(train=(path,)), 64)
    assert report.counts is None and report.lengths is None and "there is no assistant turn to learn" in report.bad_table
    assert "1 unusable" in printed(report.render())


def test_check_announces_the_default_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    report = check([path], tokenizer, DataSpec(train=(path,)), 64)
    assert "no chat template" in report.notes[0] and "no chat template" in printed(report.render())


def test_show_colours_what_is_learned(tokenizer):
    encoder = Encoder(tokenizer, "assistant", "messages")
    shown = show(
        rows_of([{"messages": [CHAT[0], {"role": "assistant", "content": "é🙂"}]}, {"messages": []}, {"messages": CHAT}]), encoder, 2
    )
    green = [shown.plain[span.start : span.end] for span in shown.spans if span.style == "green"]
    assert green == ["é🙂<|end|>"] and "unusable: messages is empty" in shown.plain
    assert (
        "<|begin|><|user|>q<|end|><|assistant|>" in shown.plain
        and "12 tokens, 7 learned" in shown.plain
        and "<memory>:3" not in shown.plain
    )


ALPACA = {"instruction": "q", "input": "", "output": "a"}
SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
COMPLETION = {"prompt": CHAT[:1], "completion": CHAT[1:]}


@pytest.mark.parametrize("record", [ALPACA, SHAREGPT, COMPLETION, {"prompt": "q", "completion": "a"}, {"messages": CHAT}])
@pytest.mark.parametrize(
    ("to", "wanted"), [("messages", {"messages": CHAT}), ("sharegpt", SHAREGPT), ("alpaca", ALPACA), ("prompt-completion", COMPLETION)]
)
def test_convert(tmp_path, record, to, wanted):
    path = write(tmp_path / "a.jsonl", [record])
    if to == "prompt-completion" and record.get("prompt") == "q":
        wanted = record
    assert convert([path], str(tmp_path / "out.jsonl"), to) == 1
    assert read(tmp_path / "out.jsonl") == [wanted]


@pytest.mark.parametrize(
    ("record", "to", "reason"),
    [
        ({"text": "t"}, "messages", "no question and no answer"),
        ({"messages": CHAT * 2}, "alpaca", "one question and one answer"),
        ({"messages": CHAT, "tools": [{"name": "f"}]}, "alpaca", "one question and one answer"),
        ({"messages": CHAT * 2}, "prompt-completion", "holds one answer"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]}, "sharegpt", "tool calls"),
        ({"prompt": CHAT, "completion": CHAT}, "messages", "only the completion is learned"),
    ],
)
def test_convert_refuses_to_lose_anything(tmp_path, record, to, reason):
    path = write(tmp_path / "a.jsonl", [record])
    with pytest.raises(DataError, match=rf"a\.jsonl:1 cannot be written as {to}: .*" + reason):
        convert([path], str(tmp_path / "out.jsonl"), to)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_split_file(tmp_path):
    rows = [{"text": f"é {i % 20}"} for i in range(40)]
    path = write(tmp_path / "a.jsonl", rows)
    train, held = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    counts = split_file(path, str(train), str(held), 0.2, seed=1)
    assert counts == (32, 8) and sorted(map(str, read(train) + read(held))) == sorted(map(str, rows))
    assert not {str(r) for r in read(train)} & {str(r) for r in read(held)}
    with pytest.raises(DataError, match="has 40 rows, and 0 of them is none"):
        split_file(path, str(train), str(held), 0.0, seed=1)
