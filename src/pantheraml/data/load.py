"""Rows from files, row by row, and what each row says: a conversation, a prompt with its completion, or plain text.

Nothing here reads a whole data set: JSONL, CSV and text come line by line and Parquet in batches, so
that sets larger than memory stream. A row that cannot be read is handed on as a `BadRow`, with its place.
"""

from __future__ import annotations

import csv
import difflib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import blake3

from pantheraml.errors import DataError, MissingExtra
from pantheraml.recipe.types import Format

HUB = "hub:"
ROLES = ("system", "user", "assistant", "tool")
# ShareGPT has no standard: these are the speakers seen in its data sets.
_SPEAKERS = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
# Format -> the columns it needs, in the order in which formats are tried.
_COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}


class UnusableRow(ValueError):
    """A row that cannot be learned from; the message is the reason, in words for a person."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record and its place. `line` counts from 1: the line in JSONL, CSV and text, else the row."""

    record: dict[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is left out, why, and the beginning of what it holds."""

    file: str
    line: int
    reason: str
    text: str

    @classmethod
    def of(cls, row: Row, reason: str) -> BadRow:
        """The bad row of a row that was read but cannot be used."""
        return cls(row.file, row.line, reason, _snippet(json.dumps(row.record, ensure_ascii=False, default=str)))


class BadRows:
    """What happens to bad rows: `fail` stops at the first one, `skip` keeps a list of at most `limit`.

    A row that is met again, in the next epoch of a stream, is counted once.
    """

    def __init__(self, policy: Literal["fail", "skip"], limit: int) -> None:
        self.policy = policy
        self.limit = limit
        self.rows: list[BadRow] = []
        self._places: set[tuple[str, int]] = set()

    def __call__(self, bad: BadRow) -> None:
        """Takes one bad row. Raises: DataError by policy, or when there are more than `limit`."""
        if self.policy == "fail":
            raise DataError(
                f"{bad.file}:{bad.line} cannot be used: {bad.reason}",
                why="a row that is left out in silence is data that you think was learned",
                fix="correct the row, or set data.on_bad_row=skip to leave such rows out and list them in bad_rows.jsonl",
            )
        if (bad.file, bad.line) in self._places:
            return
        self._places.add((bad.file, bad.line))
        self.rows.append(bad)
        if len(self.rows) > self.limit:
            raise DataError(
                f"{len(self.rows)} rows cannot be used, and data.max_bad_rows is {self.limit}",
                why="so many bad rows mean that the file or its format is not what it seems:\n" + self.table(),
                fix="correct the rows, set data.format, or raise data.max_bad_rows",
            )

    def table(self) -> str:
        """One line a reason, the most frequent first: count, reason, first place."""
        first: dict[str, BadRow] = {}
        for bad in self.rows:
            first.setdefault(bad.reason, bad)
        counts = Counter(bad.reason for bad in self.rows)
        return "\n".join(
            f"{count:>7}  {reason}  (first: {first[reason].file}:{first[reason].line})" for reason, count in counts.most_common()
        )

    def write(self, path: str | Path) -> None:
        """One JSON object a bad row: file, line, reason, text."""
        write_jsonl(path, ({"file": b.file, "line": b.line, "reason": b.reason, "text": b.text} for b in self.rows))


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes one JSON object a line and returns how many; a reader never sees half a file."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def rows_of(records: Iterable[Mapping[str, Any]], name: str = "<memory>") -> Iterator[Row]:
    """Rows from memory; their file is `name` and their line counts from 1."""
    for line, record in enumerate(records, 1):
        yield Row(dict(record), name, line)


def read_rows(paths: Sequence[str], *, on_bad: Callable[[BadRow], None]) -> Iterator[Row]:
    """Rows of files, folders and `hub:ORG/SET[:SPLIT]`, in order, read while they are taken.

    Args:
        paths: .jsonl, .json (an array, or an object that holds one), .csv, .parquet, .txt (a row for each
            block between blank lines), or a folder: its data files, in sorted order.
        on_bad: is given each row that cannot be read (broken JSON, not an object, not UTF-8) before the next is read.
    Raises:
        DataError: a file is missing, empty, or of an unknown kind; or a folder holds no data file.
        MissingExtra: `hub:` without the datasets package.
    """
    for source in _sources(paths):
        if source.startswith(HUB):
            yield from _read_hub(source)
            continue
        held = False
        for item in _READERS[Path(source).suffix.lower()](source):
            held = True
            if isinstance(item, BadRow):
                on_bad(item)
            else:
                yield item
        if not held:
            raise DataError(
                f"{source} holds no rows", why="there is nothing to learn in an empty file", fix="write rows into it, or leave it out"
            )


def fingerprint(paths: Sequence[str]) -> str:
    """A hash of the names, sizes, heads and tails of the files: tells data apart without reading all of it."""
    seen = blake3.blake3()
    for source in _sources(paths):
        seen.update(source.encode())
        if not source.startswith(HUB):
            with Path(source).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                seen.update(str(size).encode())
                for start in (0, max(0, size - 65536)):
                    file.seek(start)
                    seen.update(file.read(65536))
    return seen.hexdigest()


def _sources(paths: Sequence[str]) -> list[str]:
    """Folders become their data files; what does not exist or has no known ending is an error."""
    sources: list[str] = []
    for path in paths:
        place = Path(path)
        if path.startswith(HUB):
            sources.append(path)
        elif place.is_dir():
            found = sorted(str(file) for file in place.rglob("*") if file.is_file() and file.suffix.lower() in _READERS)
            if not found:
                raise DataError(
                    f"the folder {path} holds no data files",
                    why="files that end in " + ", ".join(_READERS) + " are read",
                    fix="name the files, or convert them to JSONL",
                )
            sources += found
        elif not place.exists():
            beside = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
            near = difflib.get_close_matches(place.name, beside, n=1)
            raise DataError(
                f"there is no file {path}",
                why="the rows to learn from are read from it",
                fix=f"did you mean {place.parent / near[0]}?" if near else "check the path; it counts from the current folder",
            )
        elif place.suffix.lower() not in _READERS:
            raise DataError(
                f"{path} has an ending that is not known",
                why="the ending tells how to read a file: " + ", ".join(_READERS),
                fix="rename the file, or convert it to JSONL (one JSON object a line)",
            )
        else:
            sources.append(path)
    return sources


def _snippet(text: str) -> str:
    text = text.encode(errors="replace").decode()  # lone surrogates cannot be written to a file
    return text if len(text) <= 200 else text[:200] + "..."


def _parse_line(raw: bytes, file: str, line: int) -> Row | BadRow:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow(file, line, "the line is not valid UTF-8", _snippet(raw.decode("utf-8", errors="replace")))
    except (ValueError, RecursionError) as error:
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too large a number, or too deep"
        return BadRow(file, line, f"the line is not valid JSON: {detail}", _snippet(raw.decode("utf-8").strip()))
    return _as_row(record, file, line)


def _as_row(record: Any, file: str, line: int) -> Row | BadRow:
    if isinstance(record, dict):
        return Row(record, file, line)
    return BadRow(
        file, line, f"the row is {_kind(record)}, not an object with named fields", _snippet(json.dumps(record, ensure_ascii=False))
    )


def _read_jsonl(path: str) -> Iterator[Row | BadRow]:
    with Path(path).open("rb") as file:
        for line, raw in enumerate(file, 1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
            if raw.strip():
                yield _parse_line(raw, path, line)


def _read_json(path: str) -> Iterator[Row | BadRow]:
    try:
        content = json.loads(Path(path).read_bytes().decode("utf-8-sig") or "[]")
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _read_jsonl(path)  # many JSONL files are named .json
            return
        raise DataError(
            f"{path} cannot be read: {error}",
            why="a .json file is one JSON value, read as a whole",
            fix="correct it, or write one JSON object a line into a .jsonl file",
        ) from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if _fitting(content) is not None:
            content = [content]
        elif len(lists) == 1:
            content = lists[0]
    if not isinstance(content, list):
        raise DataError(
            f"{path} holds {_kind(content)}, not a list of rows",
            why="a .json file is an array of objects, or an object with one array in it",
            fix="write the rows as an array, or one JSON object a line into a .jsonl file",
        )
    for line, record in enumerate(content, 1):
        yield _as_row(record, path, line)


def _read_csv(path: str) -> Iterator[Row | BadRow]:
    # surrogateescape keeps broken bytes visible, so that one bad row does not end the file.
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        while True:
            line = reader.line_num + 1 if reader.line_num else 2
            limit = csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
            try:
                record = next(reader, None)
            except csv.Error as error:
                yield BadRow(path, line, f"the line is not valid CSV: {error}", "")
                continue
            finally:
                csv.field_size_limit(limit)
            if record is None:
                return
            text = _snippet(str(record))
            if None in record:
                yield BadRow(path, line, "the row has more fields than the header", text)
            elif None in record.values():
                yield BadRow(path, line, "the row has fewer fields than the header", text)
            elif any("\ud800" <= char <= "\udfff" for value in record.values() for char in value):
                yield BadRow(path, line, "the line is not valid UTF-8", text)
            else:
                yield Row(record, path, line)


def _read_parquet(path: str) -> Iterator[Row | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            line = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    line += 1
                    yield Row(record, path, line)
    except pa.ArrowException as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {error}", why="its rows cannot be taken out", fix="write it again"
        ) from error


def _read_text(path: str) -> Iterator[Row | BadRow]:
    block: list[bytes] = []
    start = 1

    def finished() -> Row | BadRow:
        raw = b"\n".join(block)
        try:
            return Row({"text": raw.decode("utf-8")}, path, start)
        except UnicodeDecodeError:
            return BadRow(path, start, "the text is not valid UTF-8", _snippet(raw.decode("utf-8", errors="replace")))

    with Path(path).open("rb") as file:
        for line, raw in enumerate(file, 1):
            raw = (raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw).rstrip(b"\r\n")
            if raw.strip():
                start = start if block else line
                block.append(raw)
            elif block:
                yield finished()
                block = []
    if block:
        yield finished()


def _read_hub(source: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", needed_for=f"reading {source}", install="'pantheraml[hub]'") from error

    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        for line, record in enumerate(datasets.load_dataset(name, split=split or "train", streaming=True), 1):
            yield Row(dict(record), source, line)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{source} cannot be read: {error}",
            why="the rows come from the Hugging Face Hub",
            fix="check the name, the split and the connection, or download the files and name them",
        ) from error


_READERS: dict[str, Callable[[str], Iterator[Row | BadRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


@dataclass(frozen=True, slots=True)
class Detected:
    """The format that most rows have, and how that was seen."""

    format: Format
    why: str


def _fitting(record: Mapping[str, Any]) -> Format | None:
    return next((format for format, columns in _COLUMNS.items() if all(column in record for column in columns)), None)


def detect_format(rows: Sequence[Row]) -> Detected:
    """The format of the first rows, by their columns. Raises: DataError that names the nearest known format."""
    counts: Counter[Format] = Counter(format for row in rows if (format := _fitting(row.record)) is not None)
    if counts:
        format, count = counts.most_common(1)[0]
        return Detected(format, f"{count} of the first {len(rows)} rows have {' and '.join(_COLUMNS[format])}")
    if not rows:
        raise DataError("there are no rows", why="the format is detected from the first of them", fix="check data.train")
    found = list(dict.fromkeys(column for row in rows for column in row.record))

    def nearness(format: Format) -> float:
        needs = _COLUMNS[format]
        return sum(max((difflib.SequenceMatcher(None, need, column).ratio() for column in found), default=0) for need in needs) / len(needs)

    nearest = max(_COLUMNS, key=nearness)
    raise DataError(
        f"{rows[0].file} is in no known format",
        why=f"{nearest} needs {' and '.join(_COLUMNS[nearest])}; found {', '.join(found) or 'no columns'}",
        fix="rename the columns, or convert the rows to {'messages': [{'role': 'user', 'content': ...}, ...]}",
    )


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns as chat templates take them. Assistant turns before `learn_from` are context only."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    learn_from: int = 0


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Plain text to go on from, and how it goes on."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text."""

    text: str


def normalize(row: Row, format: Format) -> Conversation | PromptCompletion | Text:
    """What the row says. Raises: UnusableRow with the reason."""
    record = row.record
    match format:
        case "messages" | "sharegpt":
            (field,) = _COLUMNS[format]
            return _conversation(_turns(record, field, format), record)
        case "alpaca":
            instruction, answer = _text(record, "instruction"), _text(record, "output")
            extra = "" if record.get("input") is None else _text(record, "input", empty=True)
            asked = f"{instruction}\n\n{extra}" if extra.strip() else instruction
            return Conversation([{"role": "user", "content": asked}, {"role": "assistant", "content": answer}])
        case "prompt-completion":
            if isinstance(record.get("prompt"), list):
                before, after = _turns(record, "prompt", "messages"), _turns(record, "completion", "messages")
                _conversation(after, {})  # the answer itself must hold something to learn
                return _conversation(before + after, record, learn_from=len(before))
            return PromptCompletion(_text(record, "prompt", empty=True), _text(record, "completion"))
        case "text":
            return Text(_text(record, "text"))
        case "auto":
            raise ValueError("auto is not a format: ask detect_format first")


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _text(record: Mapping[str, Any], field: str, *, name: str | None = None, empty: bool = False) -> str:
    name = name or field
    if field not in record:
        raise UnusableRow(f"{name} is missing")
    value = record[field]
    if not isinstance(value, str):
        raise UnusableRow(f"{name} is {_kind(value)}, not text")
    if not empty and not value.strip():
        raise UnusableRow(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow(f"{name} holds half a character (a lone surrogate)") from error
    return value


def _turns(record: Mapping[str, Any], field: str, format: Format) -> list[dict[str, Any]]:
    if field not in record:
        raise UnusableRow(f"{field} is missing")
    turns = record[field]
    if not isinstance(turns, list):
        raise UnusableRow(f"{field} is {_kind(turns)}, not a list")
    if not turns:
        raise UnusableRow(f"{field} is empty")
    return [_turn(turn, f"{field}[{index}]", format) for index, turn in enumerate(turns)]


def _turn(turn: Any, name: str, format: Format) -> dict[str, Any]:
    """One message with role and content; other keys, such as tool_calls or name, go on to the template."""
    if not isinstance(turn, dict):
        raise UnusableRow(f"{name} is {_kind(turn)}, not an object")
    # Parquet fills the keys that only some turns have with null.
    turn = {key: value for key, value in turn.items() if value is not None or key in ("role", "from", "content", "value")}
    spoken = format == "sharegpt" and "role" not in turn
    who, what = ("from", "value") if spoken else ("role", "content")
    role = _text(turn, who, name=f"{name}.{who}")
    known = _SPEAKERS if format == "sharegpt" else {role: role for role in ROLES}
    if role not in known:
        raise UnusableRow(f"{name}.{who} is {role!r}, not one of {', '.join(known)}")
    message = {key: value for key, value in turn.items() if key not in (who, what)}
    message["role"] = known[role]
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = _calls(calls, f"{name}.tool_calls")
    else:
        message.pop("tool_calls", None)
    if isinstance(parts := turn.get(what), list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
            raise UnusableRow(f"{name}.{what} holds parts that are not text")
        turn[what] = "".join(_text(part, "text", name=f"{name}.{what}", empty=True) for part in parts)
    if calls and turn.get(what) is None:
        message["content"] = ""
    else:
        answers = message["role"] == "assistant" and not calls
        message["content"] = _text(turn, what, name=f"{name}.{what}", empty=not answers)
    return message


def _calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which is what chat templates print; OpenAI stores them as JSON text."""
    if not isinstance(calls, list):
        raise UnusableRow(f"{name} is {_kind(calls)}, not a list")
    made: list[dict[str, Any]] = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UnusableRow(f"{name} holds a call without a function name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise UnusableRow(f"{name} holds arguments that are not valid JSON") from error
        made.append({**call, "type": call.get("type", "function"), "function": {**function, "arguments": arguments}})
    return made


def _conversation(messages: list[dict[str, Any]], record: Mapping[str, Any], learn_from: int = 0) -> Conversation:
    if all(message["role"] != "assistant" for message in messages):
        raise UnusableRow("there is no assistant turn to learn")
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UnusableRow("tools is text that is not valid JSON") from error
    if tools and (not isinstance(tools, list) or any(not isinstance(tool, dict) for tool in tools)):
        raise UnusableRow("tools is not a list of objects")
    return Conversation(messages, tools or None, learn_from)
