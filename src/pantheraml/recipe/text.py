"""The text of a recipe: YAML as this project reads and writes it, with the line of everything.

It is version 1.2's core: `2e-4` is a number, `on`, `off`, `yes` and `no` are text, and so are dates. There are
no aliases. What is written reads the same in version 1.1.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from pantheraml.errors import RecipeError

MAX_FILE_BYTES = 1 << 20  # a recipe has a page or two; a larger file is data or weights, given by mistake


def read_text(path: Path) -> str:
    """The text of the file `path`, or a RecipeError that says why it cannot be had."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise RecipeError(
                f"{path} has {path.stat().st_size:,} bytes, which is too large for a recipe",
                why=f"a recipe is a page of YAML (at most {MAX_FILE_BYTES:,} bytes); this looks like data or weights",
                fix="give the recipe's path, and name this file in it",
            )
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"there is no file {path}", why="the recipe says what to train, on what", fix=_nearest_file(path)) from None
    except IsADirectoryError:
        inside = sorted(each.name for each in path.glob("*.y*ml"))
        raise RecipeError(
            f"{path} is a folder",
            why="a recipe is one YAML file",
            fix=f"did you mean {path / inside[0]}?" if inside else "give the path of the file in it",
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 text (byte {error.start})",
            why="its letters cannot be told apart otherwise",
            fix="save it again as UTF-8 in your editor",
        ) from None
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror or error}",
            why="the recipe says what to train, on what",
            fix="check the path and its permissions",
        ) from None


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"check the path: there is no folder {folder} in {Path.cwd()}"
    names = sorted(each.name for each in folder.iterdir() if each.is_file())
    near = difflib.get_close_matches(path.name, names, 1, 0.6) or [name for name in names if name.endswith((".yaml", ".yml"))]
    return f"did you mean {folder / near[0]}?" if near else f"check the path: {folder.resolve()} holds no recipe"


def syntax_error(source: str, error: yaml.MarkedYAMLError) -> RecipeError:
    """What the YAML parser met, with its line and column."""
    mark = error.problem_mark or error.context_mark
    place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
    problem = (error.problem or error.context or "it cannot be read").removeprefix("but ")
    fix = "check the line and the one above: quotes and brackets closed, a space after each colon, keys of one section equally indented"
    if "'\\t'" in problem:
        fix = "indent with spaces: YAML does not allow tabs"
    elif isinstance(error, _AliasError):
        fix = "write the value out"
    elif "single document" in (error.context or ""):
        fix = "keep one recipe in a file: remove the line --- and what follows it"
    return RecipeError(f"{place}: this is not YAML: {problem}", why="not a single key can be trusted when one line cannot be read", fix=fix)


TEXT, WHOLE, NUMBER, TRUTH, NOTHING, LIST, MAP = (
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")
)
SHAPES: Mapping[type[yaml.Node], str] = {
    yaml.ScalarNode: "a single value",
    yaml.SequenceNode: "a list",
    yaml.MappingNode: "a mapping",
}
# YAML 1.2 core, in decimal. A whole number of more digits than 64 bits hold is read as a float.
_PLAIN = {
    NOTHING: re.compile(r"~|null|Null|NULL|"),
    TRUTH: re.compile(r"true|True|TRUE|false|False|FALSE"),
    WHOLE: re.compile(r"[-+]?[0-9]{1,19}"),
    NUMBER: re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
}


def tag_of(text: str) -> str:
    """What an unquoted word of YAML is."""
    return next((tag for tag, pattern in _PLAIN.items() if pattern.fullmatch(text)), TEXT)


def scalar(text: str, tag: str) -> str | int | float | bool | None:
    """The value of a YAML scalar."""
    if tag == NOTHING:
        return None
    if tag == TRUTH:
        return text.lower() == "true"
    if tag == WHOLE:
        return int(text)
    return float(text) if tag == NUMBER else text


class _AliasError(yaml.MarkedYAMLError):
    """An alias: it makes one line mean another, and a few of them can fill the memory."""


class Reader(yaml.SafeLoader):
    """Reads YAML into nodes, which know their lines. Of values it knows only what `tag_of` knows."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:  # noqa: D102 (PyYAML names it)
        if kind is yaml.ScalarNode:
            return tag_of(value) if implicit[0] else TEXT
        return LIST if kind is yaml.SequenceNode else MAP

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: D102 (PyYAML names it)
        event = cast("Any", self).peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _AliasError(problem=f"*{event.anchor} stands for another place, which a recipe cannot do", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class Writer(yaml.SafeDumper):
    """Writes YAML that means the same to version 1.1 (PyYAML) and 1.2 (`tag_of`): text is quoted where either would misread it."""


def _write_text(writer: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds the line breaks of Unicode (U+0085, U+2028) into spaces unless they are escaped.
    style = '"' if not text.isprintable() else "'" if tag_of(text) != TEXT else None
    return cast("Any", writer).represent_scalar(TEXT, text, style=style)


Writer.add_representer(str, _write_text)
