"""Who debates: a name, how it is asked to look at a question, and what answers for it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from pantheraml.errors import RecipeError
from pantheraml.recipe.text import LIST, MAP, Reader, scalar, syntax_error

MAX_FILE_BYTES = 1 << 20
MOST = 64
"""Personas of a debate."""
Lines = Mapping[tuple[str | int, ...], int]
"""The line of each place in a file: ("personas", 0, "name") -> 3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible service.

    Attributes:
        url: up to where "/chat/completions" follows, such as http://127.0.0.1:8000/v1. model: its name there.
        key_env: name of the environment variable that holds the key; None: it takes none.
        timeout_s: of one attempt, from the question to its last byte; after so many seconds no other one is made.
    Raises: ValueError for a url that is not http or https, or holds a password, and a time that is not positive.
    """

    url: str
    model: str
    key_env: str | None = None
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an endpoint's url begins with http:// or https:// and names a host")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("an endpoint's url holds no name, password or query: a key goes into the variable that key_env names")
        if not self.model or not 0 < self.timeout_s < math.inf:
            raise ValueError("an endpoint has a model and a timeout_s above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Persona:
    """An advisor.

    Attributes:
        name: unique among the personas of a debate. prompt: its system prompt.
        adapter: LoRA adapter of the local model. temperature: 0: always the likeliest token.
        expertise: fields it knows, added to its prompt. weight: in a weighted quorum.
        endpoint: a service that answers in place of the local model.
    Raises: ValueError for values out of range.
    """

    name: str
    prompt: str
    adapter: str | None = None
    temperature: float = 0.7
    expertise: tuple[str, ...] = ()
    weight: float = 1.0
    endpoint: Endpoint | None = None

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.name.isprintable() or len(self.name) > 80:
            raise ValueError("a persona's name is one line of 1 to 80 characters")
        if not 0 <= self.temperature < math.inf or not 0 < self.weight < math.inf:
            raise ValueError("temperature is at least 0, and weight above 0")
        if isinstance(self.expertise, str):
            raise ValueError("expertise is a list")
        if self.adapter is not None and self.endpoint is not None:
            raise ValueError("an adapter is one of the local model, and an endpoint answers in its place: give one of the two")

    @property
    def system(self) -> str:
        """What stands before everything that it is asked."""
        known = f" You know: {', '.join(self.expertise)}." if self.expertise else ""
        return self.prompt.strip() + known


DEFAULT_PERSONAS: tuple[Persona, ...] = (
    Persona(
        name="analyst",
        prompt="Take the question apart and reason step by step from what is known.",
        temperature=0.3,
        expertise=("logic", "numbers"),
    ),
    Persona(
        name="sceptic",
        prompt="Look for what is wrong: hidden assumptions, missing evidence, ways to fail. Say what would convince you.",
        expertise=("criticism", "risk"),
    ),
    Persona(
        name="practitioner",
        prompt="Think of doing it: cost, time and effort, what breaks, and how it is undone.",
        expertise=("engineering", "operations"),
    ),
    Persona(
        name="historian",
        prompt="Ask how like questions were settled before and how that ended. Frequencies count for more than stories.",
        expertise=("precedent", "statistics"),
    ),
    Persona(
        name="advocate",
        prompt="Speak for those whom it concerns: who gains, who loses, who was not asked.",
        temperature=0.9,
        expertise=("ethics", "people"),
    ),
)


def load_personas(path: Path) -> tuple[Persona, ...]:
    """The personas of a YAML file: a list, or one under the key `personas`.

    Raises: RecipeError for a file that cannot be read, an unknown key or a wrong value, with the line.
    """
    source = str(path)
    text = _text(path)
    try:
        root = Reader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        raise syntax_error(source, error) from None
    except (yaml.reader.ReaderError, RecursionError) as error:
        raise RecipeError(f"{source} is not YAML", why=str(error), fix="see recipes/council/personas.yaml for an example") from None
    lines: dict[tuple[str | int, ...], int] = {}
    value = None if root is None else _plain(root, (), lines, source)
    if isinstance(value, Mapping):
        _known(value, ("personas",), (), lines, source)
        value = value.get("personas")
        lines = {place[1:]: line for place, line in lines.items() if place[:1] == ("personas",)}
    return personas_from(value, source=source, lines=lines)


def personas_from(values: Any, *, source: str = "", lines: Lines | None = None) -> tuple[Persona, ...]:
    """Personas that are written as a list of mappings, as in a file or a request.

    Args:
        source: where they come from, for errors. lines: of each place in it.
    Raises: RecipeError, with the place.
    """
    lines = lines or {}
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise RecipeError(
            f"{source + ': ' if source else ''}there are no personas",
            why="a debate needs advisors",
            fix="write a list: personas: [{name: sceptic, prompt: Look for what is wrong.}]",
        )
    found = [_persona(value, (number,), lines, source) for number, value in enumerate(values)]
    names: dict[str, int] = {}
    for number, persona in enumerate(found):
        if persona.name in names:
            raise _wrong(
                (number, "name"),
                lines,
                source,
                f"two personas are called {persona.name!r}",
                why="what they say is told apart by name",
                fix="rename one of them",
            )
        names[persona.name] = number
    if len(found) > MOST:
        raise RecipeError(f"{len(found)} personas are too many", why=f"{MOST} fit into a debate", fix="leave some out")
    return tuple(found)


def _persona(value: Any, place: tuple[str | int, ...], lines: Lines, source: str) -> Persona:
    given = _mapping(value, Persona, ("name", "prompt"), place, lines, source)
    if given.get("endpoint") is not None:
        there = (*place, "endpoint")
        inner = _mapping(given["endpoint"], Endpoint, ("url", "model"), there, lines, source)
        given["endpoint"] = _made(Endpoint, inner, there, lines, source)
    if "expertise" in given:
        known = given["expertise"]
        given["expertise"] = tuple(known) if isinstance(known, list | tuple) else (known,)
    return _made(Persona, given, place, lines, source)


_TYPES: Mapping[str, tuple[type, ...]] = {
    "name": (str,),
    "prompt": (str,),
    "adapter": (str, type(None)),
    "temperature": (int, float),
    "expertise": (str, list, tuple),
    "weight": (int, float),
    "endpoint": (dict, type(None)),
    "url": (str,),
    "model": (str,),
    "key_env": (str, type(None)),
    "timeout_s": (int, float),
}
_MEANT = {str: "text", int: "a number", list: "a list", dict: "a section with url and model"}


def _mapping(value: Any, kind: type, needed: Sequence[str], place: tuple[str | int, ...], lines: Lines, source: str) -> dict[str, Any]:
    """The keys of a persona or an endpoint, each known and of its type."""
    if not isinstance(value, Mapping):
        raise _wrong(
            place,
            lines,
            source,
            f"{kind.__name__.lower()} is not a mapping",
            why=f"it has {' and '.join(needed)}",
            fix="write name: value lines",
        )
    _known(value, [each.name for each in fields(kind)], place, lines, source)
    for key, each in value.items():
        accepted = _TYPES[key]
        items = each if isinstance(each, list | tuple) else ()
        if not isinstance(each, accepted) or isinstance(each, bool) or not all(isinstance(item, str) for item in items):
            raise _wrong(
                (*place, key),
                lines,
                source,
                f"{key} is {each!r}",
                why=f"it is {_MEANT[accepted[0]]}",
                fix="put it in quotes if it is meant as text" if accepted[0] is str else "correct it, or leave it out for its default",
            )
    for key in needed:
        if key not in value:
            raise _wrong(
                place, lines, source, f"{kind.__name__.lower()} has no {key}", why="it cannot answer without", fix=f"add {key}: ..."
            )
    return dict(value)


def _made(kind: type, given: dict[str, Any], place: tuple[str | int, ...], lines: Lines, source: str) -> Any:
    try:
        return kind(**given)
    except ValueError as error:
        raise _wrong(place, lines, source, str(error), why="it cannot be used as it is", fix="correct it") from None


def _known(value: Mapping[Any, Any], names: Sequence[str], place: tuple[str | int, ...], lines: Lines, source: str) -> None:
    for key in value:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, 0.5)
            raise _wrong(
                (*place, key),
                lines,
                source,
                f"unknown key {key}",
                why="a key that nothing reads changes nothing",
                fix=f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}",
            )


def _wrong(place: tuple[str | int, ...], lines: Lines, source: str, what: str, *, why: str, fix: str) -> RecipeError:
    """An error with the line of the place, or of what holds it."""
    line = next((lines[place[:end]] for end in range(len(place), -1, -1) if place[:end] in lines), None)
    where = f"{source}:{line}: " if source and line else f"{source}: " if source else ""
    number = next((each for each in place if isinstance(each, int)), None)
    return RecipeError(f"{where}{what}" + ("" if where or number is None else f" (persona {number + 1})"), why=why, fix=fix)


def _plain(node: yaml.Node, place: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int], source: str) -> Any:
    """The value of a YAML node; the line of each place in it is noted."""
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode) and node.tag == MAP:
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            lines[*place, key] = key_node.start_mark.line + 1
            if key in found:
                raise _wrong((*place, key), lines, source, f"{key} stands there twice", why="one of them would be lost", fix="remove one")
            found[key] = _plain(value_node, (*place, key), lines, source)
        return found
    if isinstance(node, yaml.SequenceNode) and node.tag == LIST:
        return [_plain(item, (*place, number), lines, source) for number, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value, node.tag)
    raise _wrong(place, lines, source, f"the YAML tag {node.tag} is not read", why="it could make anything", fix="remove the tag")


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise RecipeError(f"{path} is too large for a list of personas", why="it has over 1 MiB", fix="check the path")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 text (byte {error.start})", why="its letters cannot be told apart", fix="save it as UTF-8"
        ) from None
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror or error}",
            why="it says who debates",
            fix="check the path, or leave it out for the default ones",
        ) from None
