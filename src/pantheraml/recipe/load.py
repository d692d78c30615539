"""How a YAML file, or the words of a command line, become a recipe, and what is said when they do not.

Every mistake is found before anything is said, and each one names its line:

    recipe.yaml:7: unknown key optim.learning_rate
      why: a key that nothing reads changes nothing, so the run would not be the one you asked for
      fix: did you mean optim.lr?

Relative paths stay as they are written, and are relative to the folder in which the command runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from pantheraml.errors import RecipeError
from pantheraml.recipe.keys import SECTIONS, keys, nearest, nearest_section
from pantheraml.recipe.mistakes import EXAMPLES, Mistake, Place, all_at_once, scalar_or_list, shown, value_fix
from pantheraml.recipe.text import LIST, MAP, SHAPES, TEXT, Reader, Writer, read_text, scalar, syntax_error, tag_of
from pantheraml.recipe.types import SHORTHAND, Recipe, expanded

COMMAND_LINE = "command line"


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, changed by `overrides`.

    Args:
        path: a YAML file. Relative paths in it stay as written: they are relative to the working folder.
        overrides: `section.key=value` sets one key, `section=value` replaces a section that can be written
            short (`adapter=full`). The last one wins. A value is a YAML scalar, or a list: `[a.jsonl, b.jsonl]`.

    Raises:
        RecipeError: with all mistakes of file and overrides, each with its place.
    """
    asked = _Asked(source=str(path))
    asked.put_file(read_text(path))
    return _checked(asked, overrides)


def recipe_from(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that is written as a mapping, as in `{"model": "tiny:llama", "data": "a.jsonl"}`; see `load_recipe`."""
    asked = _Asked()
    asked.put(_plain(values))
    return _checked(asked, overrides)


def dump_recipe(recipe: Recipe, *, full: bool = False) -> str:
    """YAML that `load_recipe` reads back as an equal recipe.

    Args:
        recipe: what was asked.
        full: write every key; otherwise those that differ from their defaults, besides model and data.
    """
    sections: dict[str, Any] = {}
    for name in SECTIONS:
        values = cast("dict[str, Any]", getattr(recipe, name).model_dump())
        kind = values.get("kind")
        written = {last: scalar_or_list(value) for last, value in values.items() if full or _differs(f"{name}.{last}", value)}
        if not full and name in SHORTHAND and list(written) == [SHORTHAND[name]]:
            sections[name] = written[SHORTHAND[name]]
        elif written:
            sections[name] = {"kind": kind, **written} if kind and name in SHORTHAND else written
    return yaml.dump(sections, Dumper=Writer, sort_keys=False, allow_unicode=True, width=2**16)


def _differs(name: str, value: Any) -> bool:
    key = keys()[name]
    return key.required or value != key.default


# ---- What was asked, and where ----------------------------------------------------------------------------------


@dataclass
class _Asked:
    """The sections as they were written, in long form, the place of each key, and the mistakes so far."""

    source: str = ""
    values: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    places: dict[str, Place] = field(default_factory=dict[str, Place])
    mistakes: list[Mistake] = field(default_factory=list[Mistake])
    spoilt: set[str] = field(default_factory=set[str])  # sections and keys that were given, but cannot be used

    def mistake(self, place: Place, what: str, *, why: str, fix: str) -> None:
        self.mistakes.append(Mistake(place, what, why, fix))

    def place(self, name: str) -> Place:
        """Where `name` was written, or the section or list it is in."""
        for known in (name, name.split("[")[0], name.split(".")[0]):
            if known in self.places:
                return self.places[known]
        return Place(self.source)

    def put(self, sections: Mapping[str, Any]) -> None:
        """Take over what is known; each unknown key or broken section is a mistake."""
        for section, value in sections.items():
            place = self.place(section)
            if section not in SECTIONS:
                self.unknown(section, place, value)
            elif value is None or section in self.spoilt:  # None: `optim:` with nothing under it
                continue
            elif not isinstance(value := expanded(section, value), dict):
                self.spoilt.add(section)
                first = next(key for key in keys().values() if key.section == section)
                self.mistake(
                    place,
                    f"{section} must be a section with keys of its own, got {shown(value)}",
                    why="one value does not say which of its keys is meant",
                    fix=f"write {section}: {{{first.last}: ...}}",
                )
            else:
                self.values[section] = {}
                for last, leaf in cast("dict[str, Any]", value).items():
                    if f"{section}.{last}" in keys():
                        if f"{section}.{last}" not in self.spoilt:
                            self.values[section][last] = leaf
                    else:
                        self.unknown(f"{section}.{last}", self.place(f"{section}.{last}"), leaf)

    def unknown(self, name: str, place: Place, value: Any, *, suffix: str = "") -> None:
        """A key that no recipe has; `suffix` completes a suggestion to what can be typed."""
        section, dot, last = name.partition(".")
        near = nearest(name)
        if name in keys():  # a dotted key, written at the top level of a file
            fix = f"write {last} as a line of its own under {section}:"
        elif not dot and isinstance(value, dict) and (other := nearest_section(section)):
            fix = f"did you mean {other}:?"
        elif near:
            fix = f"did you mean {' or '.join(other + suffix for other in near)}?"
        else:
            fix = "leave it out, or find its name with: pantheraml recipe explain"
        self.mistake(
            place,
            f"unknown key {name}",
            why="a key that nothing reads changes nothing, so the run would not be the one you asked for",
            fix=fix,
        )

    def put_file(self, text: str) -> None:
        """Take over the text of a YAML file."""
        try:
            root = Reader(text).get_single_node()
        except yaml.MarkedYAMLError as error:
            raise syntax_error(self.source, error) from None
        except yaml.reader.ReaderError as error:
            raise RecipeError(
                f"{self.source}: character {error.character!r} at position {error.position} is not allowed in YAML",
                why="a recipe is plain text",
                fix="remove the character, or save the file again as UTF-8 text",
            ) from None
        except RecursionError:
            raise RecipeError(
                f"{self.source}: brackets inside brackets, too deep to read",
                why="a recipe has sections, and keys in them, and nothing deeper",
                fix="write section: {key: value}",
            ) from None
        if root is None or (isinstance(root, yaml.ScalarNode) and root.value == ""):
            raise RecipeError(
                f"{self.source} is empty",
                why="a recipe names at least a model and data",
                fix="start with two lines such as: model: tiny:llama and data: examples.jsonl",
            )
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(
                f"{self.source}:{root.start_mark.line + 1}: a recipe is made of lines such as model: NAME, and this is not",
                why=f"the file holds {SHAPES[type(root)]}, and nothing in it says what is meant",
                fix="start with two lines such as: model: tiny:llama and data: examples.jsonl",
            )
        self.put(self.read(root, ""))

    def read(self, node: yaml.Node, name: str) -> Any:
        """The value of a YAML node, the places of everything in it noted."""
        place = Place(self.source, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == MAP:
            return self.read_mapping(node, name)
        if isinstance(node, yaml.SequenceNode) and node.tag == LIST:
            for i, item in enumerate(node.value):
                self.places[f"{name}[{i}]"] = Place(self.source, item.start_mark.line + 1)
            return [self.read(item, f"{name}[{i}]") for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and (node.tag == TEXT or (node.style is None and node.tag == tag_of(node.value))):
            return scalar(node.value, node.tag)
        self.mistake(
            place,
            f"{name or 'the recipe'} has the YAML tag {node.tag.replace('tag:yaml.org,2002:', '!!')}",
            why="a recipe holds text, numbers, true, false, null and lists, and nothing that a tag could make",
            fix="remove the tag",
        )
        self.spoilt.add(name.split("[")[0])
        return None

    def read_mapping(self, node: yaml.MappingNode, name: str) -> dict[str, Any]:
        """One level of sections or keys."""
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = Place(self.source, key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                self.mistake(
                    place,
                    f"{name or 'the recipe'} has a key that is {SHAPES[type(key_node)]}",
                    why="a key is one word",
                    fix="write key: value",
                )
                continue
            dotted = f"{name}.{key_node.value}" if name else key_node.value
            if key_node.value in values:
                self.mistake(
                    place,
                    f"{dotted} is given twice, first on line {self.places[dotted].line}",
                    why="only one of them can count, and which one is not said",
                    fix="keep one of the two lines",
                )
                continue
            self.places[dotted] = place
            values[key_node.value] = self.read(value_node, dotted)
        return values

    def override(self, text: str) -> None:
        """Apply one `a.b=c` of the command line."""
        name, equals, raw = text.partition("=")
        name, place = name.strip(), Place(COMMAND_LINE, rank=1)
        section, _, last = name.partition(".")
        if not equals:
            near = (name,) if name in keys() else nearest(name)
            self.mistake(
                place,
                f'"{text}" is not of the form key=value',
                why="each word after the recipe sets one key",
                fix=f"write {near[0]}=VALUE" if near else "write it as in batch.size=8, or leave it out",
            )
            return
        try:
            value = self.read_word(raw.strip(), name, place)
        except (yaml.YAMLError, RecursionError) as error:
            problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else "characters that are not allowed"
            self.mistake(
                place,
                f"{name}={raw} is not YAML: {problem}",
                why="a value that starts with a bracket or a quote must end with one",
                fix=f"write a list as '{name}=[first, second]', in quotes for the shell",
            )
            return
        if name in SECTIONS:
            self._forget(section)
            self.places[section] = place
            self.put({section: value})
        elif name in keys():
            self._forget(name)
            if section not in self.spoilt:
                self.values.setdefault(section, {})[last] = value
            self.places[name] = place
        else:
            self.unknown(name, place, value, suffix=f"={raw}")

    def _forget(self, name: str) -> None:
        """Drop what is known of a place that is overridden."""
        self.spoilt = {known for known in self.spoilt if known != name and not known.startswith(f"{name}.")}
        self.places = {known: at for known, at in self.places.items() if known != name and not known.startswith((f"{name}.", f"{name}["))}

    def read_word(self, raw: str, name: str, place: Place) -> Any:
        """The value of an override: quoted text and brackets are YAML; all else is one scalar, colons and stars included."""
        if not raw.startswith(("[", "{", '"', "'")):
            return scalar(raw, tag_of(raw))
        inner = _Asked(source=COMMAND_LINE)
        node = Reader(raw).get_single_node()
        value = None if node is None else inner.read(node, name)
        self.mistakes += [Mistake(place, each.what, each.why, each.fix) for each in inner.mistakes]
        return value


# ---- From what was asked to a recipe ----------------------------------------------------------------------------


def _checked(asked: _Asked, overrides: Sequence[str]) -> Recipe:
    for text in overrides:
        asked.override(text)
    _drop_other_kinds(asked)
    for section in SECTIONS:
        if section in asked.spoilt or (section not in asked.values and section not in EXAMPLES):
            continue
        for key in keys().values():
            if key.section == section and key.required and key.name not in asked.spoilt and key.last not in asked.values.get(section, {}):
                asked.mistake(
                    asked.place(section),
                    f"the recipe names no {section}" if section not in asked.values else f"{key.name} is missing",
                    why=f"nothing can be trained without it: {key.description[0].lower()}{key.description[1:]}",
                    fix=f"add a line such as {EXAMPLES[section]}",
                )
    try:
        recipe = Recipe.model_validate(asked.values)
    except ValidationError as error:
        _explain_values(asked, error)
    else:
        if not asked.mistakes:
            return recipe
    raise all_at_once(asked.mistakes)


def _drop_other_kinds(asked: _Asked) -> None:
    """`adapter: {kind: full, rank: 8}`: a key that its section's kind does not know."""
    for section, values in asked.values.items():
        kind = values.get("kind", keys()[f"{section}.kind"].default if f"{section}.kind" in keys() else None)
        for last in list(values):
            key = keys()[f"{section}.{last}"]
            if key.kinds and kind in keys()[f"{section}.kind"].kinds and kind not in key.kinds:
                del values[last]
                asked.mistake(
                    asked.place(key.name),
                    f"{key.name} does not go with {section}.kind={kind}",
                    why=f"only {' and '.join(key.kinds)} would read it",
                    fix=f"leave it out, or set {section}.kind to {key.kinds[0]}",
                )


def _explain_values(asked: _Asked, error: ValidationError) -> None:
    """One mistake for each value that is not allowed. pydantic says where; the words are ours."""
    seen: set[str] = set()
    for problem in error.errors(include_url=False):
        section, *rest = problem["loc"] or ("",)
        if not section:
            if not asked.mistakes:  # a rule between sections says nothing while a section is broken
                _explain_rule(asked, str(problem["msg"]).removeprefix("Value error, "))
            continue
        if rest and f"{section}.kind" in keys() and keys()[f"{section}.kind"].kinds:
            rest = rest[1:]  # pydantic's name for the kind
        last, *rest = rest or ("kind",)
        name = where = f"{section}.{last}"
        if problem["type"] == "missing" or name not in keys():  # said already, or a section that is not there
            continue
        value: Any = asked.values[str(section)].get(str(last))
        index = next((i for i in rest if isinstance(i, int)), None)
        if index is not None and isinstance(value, list):
            where, value = f"{name}[{index}]", cast("list[Any]", value)[index]
        if where not in seen:
            seen.add(where)
            key = keys()[name]
            allowed = key.allowed if where == name else key.allowed.split(", or a list")[0]
            asked.mistake(
                asked.place(where),
                f"{where} must be {allowed}, got {shown(value)}",
                why=f"a value is never guessed, and this one decides: {key.description}",
                fix=value_fix(name, where, value, on_command_line=asked.place(where).source == COMMAND_LINE),
            )


def _explain_rule(asked: _Asked, rule: str) -> None:
    """A rule between keys. Its sentence names them, with their values or without."""
    named = [name for word in rule.split() if (name := word.partition("=")[0].strip(",.")) in keys()]
    asked.mistake(
        next((asked.place(name) for name in named if name in asked.places), Place(asked.source)),
        rule,
        why="both cannot be had in one run",
        fix=f"change {' or '.join(named)}",
    )


def _plain(value: Any) -> Any:
    """A mapping from Python with the types that YAML would give."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in cast("Mapping[Any, Any]", value).items()}
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
