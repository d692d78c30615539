"""A record, and what is known of one that is stored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, TypeAlias, get_args

import blake3

from pantheraml.errors import DataError, StorageError

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
Content: TypeAlias = "str | bytes | JSON"
Form = Literal["text", "bytes", "json"]
Fidelity = Literal["exact", "gist"]
Tier = Literal["hot", "warm", "cold"]

FORMS: tuple[Form, ...] = get_args(Form)
"""In the order of their numbers in a container."""
DEEPEST = 100
"""Levels of lists and objects in a JSON record."""
LONGEST_INT = 14_000
"""Bits of a whole number in a JSON record; Python refuses to write or read more than 4,300 digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Something to remember.

    Attributes:
        key: its name, unique within a tenant; putting another record there replaces it.
        content: text, bytes, or what JSON can say.
        kind: records of one kind look alike, and share a dictionary.
        tenant: whose it is; no query sees another one's. None: that of the memory it is put into.
        created: with a time zone; None: when it is put. metadata: what searches can ask for.
        fidelity: gist: only what it is about is kept, a vector and maybe a summary; see gist.py.
    """

    key: str
    content: Content
    kind: str = "note"
    tenant: str | None = None
    created: datetime | None = None
    metadata: Mapping[str, JSON] = field(default_factory=dict[str, JSON])
    fidelity: Fidelity = "exact"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where content was encoded: the device, the dtype of its arithmetic, and how many records went through it at once."""

    kind: str
    name: str
    dtype: str
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What is known of a stored record without decoding it.

    Attributes:
        codec: that has encoded it. model: what it takes to decode, in hex; None: nothing. origin: None: no device took part.
        raw_bytes: of its content. stored_bytes: of its container; 0 where it shares another record's.
        hash: blake3 of its content, in hex; see `content_hash`.
    """

    id: int
    key: str
    kind: str
    tenant: str
    created: datetime
    metadata: Mapping[str, JSON]
    tier: Tier
    codec: str
    model: str | None
    origin: Origin | None
    raw_bytes: int
    stored_bytes: int
    hash: str
    fidelity: Fidelity


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """The content of a record.

    Attributes:
        exact: it is what was put, bit by bit. score: measured likeness of a gist to what was put, 0 to 1; None where it is exact.
    """

    content: Content
    exact: bool
    score: float | None
    info: Info


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A record that a search has found. score: cosine of its vector and that of the question."""

    id: int
    key: str
    kind: str
    tenant: str
    score: float
    metadata: Mapping[str, JSON]


def to_bytes(content: Content) -> tuple[Form, bytes]:
    """The form of some content, and its bytes.

    Text is UTF-8, in which lone surrogates are kept; JSON has no spaces, and objects keep their order.

    Raises: DataError for what JSON cannot say, and where it stands.
    """
    if isinstance(content, str):
        return "text", content.encode("utf-8", "surrogatepass")
    if isinstance(content, bytes | bytearray | memoryview):
        return "bytes", bytes(content)
    if fault := _not_json(content, 0):
        where, what, why = fault
        raise DataError(
            f"content{where if len(where) < 80 else where[:80] + '...'} {what}",
            why=why,
            fix="give text, bytes, or lists, objects, text, numbers, true, false and null",
        )
    return "json", json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def from_bytes(form: Form, data: bytes) -> Content:
    """What `to_bytes` was given. Raises: StorageError for bytes that it never makes."""
    if form == "bytes":
        return data
    try:
        text = data.decode("utf-8", "surrogatepass")
        return text if form == "text" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{len(data)} bytes are not {'UTF-8' if form == 'text' else 'JSON'}",
            why=f"the container says that they are {form}: {error}",
            fix="see `pantheraml memory verify`: it names what is damaged",
        ) from error


def content_hash(form: Form, data: bytes) -> bytes:
    """32 bytes by which content is known: blake3 of the number of its form and of its bytes."""
    return blake3.blake3(bytes((FORMS.index(form),)) + data).digest()


def _not_json(value: Any, depth: int) -> tuple[str, str, str] | None:
    """Where in a value something stands that JSON cannot say, what it is, and why it matters; None: nowhere."""
    if value is None or isinstance(value, bool | str):
        return None
    if isinstance(value, int):
        long = value.bit_length() > LONGEST_INT
        return ("", f"is a number of {value.bit_length():,} bits", "Python reads numbers of about 4,300 digits at most") if long else None
    if isinstance(value, float):
        return None if math.isfinite(value) else ("", f"is {value}", "JSON has no such number")
    if not isinstance(value, list | dict):
        return "", f"is a {type(value).__name__}", "it would not come back as what it is"
    if depth == DEEPEST:
        return "", f"is more than {DEEPEST} levels deep", "readers of JSON give up at some depth"
    for name, each in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(value, dict) and not isinstance(name, str):
            return "", f"has the key {name!r}", "keys of JSON are text, and it would come back as such"
        if fault := _not_json(each, depth + 1):
            where, what, why = fault
            return f".{name}{where}" if isinstance(value, dict) else f"[{name}]{where}", what, why
    return None
