"""`pantheraml memory import`: rows of JSONL from anywhere are kept as they are, or named with what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pantheraml.cli_memory import memory_app
from pantheraml.errors import DataError
from pantheraml.memory import Memory


def imported(tmp_path: Path, data: bytes) -> Path:
    rows, store = tmp_path / "rows.jsonl", tmp_path / "store"
    rows.write_bytes(data)
    CliRunner().invoke(memory_app, ["import", str(store), str(rows)], catch_exceptions=False)
    return store


def test_a_row_ends_at_a_line_feed_alone(tmp_path: Path):
    """JSON text may hold U+2028, U+0085 and their like as they are; a byte order mark before the first row is none of it."""
    text = "one\u2028two\u2029three\u0085four"
    store = imported(tmp_path, f'\ufeff{{"key":"k","content":"{text}"}}\r\n\n{{"key":7,"content":"x"}}'.encode())
    with Memory.open(store, readonly=True) as memory:
        assert memory.get("k").content == text and memory.get("7").content == "x"


@pytest.mark.parametrize(
    "row",
    [
        b'{"key":"k","content":"caf\xe9"}',
        b'{"key":"k","base64":"aGVsbG8!!="}',
        b'{"key":"k","content":"x","created":"2020-01-01"}',
        b'{"key":"k","content":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"key":"k","content":"x","kind":5}',
        b'{"key":"k","content":"x","metadata":[1]}',
        b'{"key":null,"content":"x"}',
    ],
    ids=lambda row: repr(row[:40]),
)
def test_what_is_wrong_with_a_row_is_named(tmp_path: Path, row: bytes):
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2 is no record"):
        imported(tmp_path, b'{"key":"a","content":"b"}\n' + row + b"\n")


def test_a_lone_surrogate_is_printed_as_an_escape(tmp_path: Path):
    with Memory.open(tmp_path) as memory:
        memory.put("k", "one \ud800 two")
    for verb in (["get", str(tmp_path), "k"], ["get", str(tmp_path), "k", "--json"], ["search", str(tmp_path), "two"]):
        assert "one \\ud800 two" in CliRunner().invoke(memory_app, verb, catch_exceptions=False).output
