"""What is wrong with a recipe: where, what, why it matters, and what to write instead."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from pantheraml.errors import RecipeError
from pantheraml.recipe.keys import keys
from pantheraml.recipe.text import NUMBER, WHOLE, tag_of

EXAMPLES = {"model": "model: Qwen/Qwen3-0.6B", "data": "data: examples.jsonl"}


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file, the command line (rank 1: said after the file), or nowhere (a mapping from Python)."""

    source: str = ""
    line: int = 0
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: " if self.line else f"{self.source}: " if self.source else ""


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing to settle, in the parts of a PantheraError."""

    place: Place
    what: str
    why: str
    fix: str


def all_at_once(mistakes: Sequence[Mistake]) -> RecipeError:
    """One error for all mistakes, in the order in which they were written."""
    ordered = sorted(mistakes, key=lambda each: (each.place.rank, each.place.line))
    if len(ordered) == 1:
        (only,) = ordered
        return RecipeError(f"{only.place}{only.what}", why=only.why, fix=only.fix)
    whys = list(dict.fromkeys(each.why for each in ordered))
    return RecipeError(
        "\n".join(f"{i}. {each.place}{each.what}" for i, each in enumerate(ordered, 1)),
        why=whys[0] if len(whys) == 1 else f"nothing runs until all {len(ordered)} are settled, so that a typo costs seconds and not hours",
        fix="\n       ".join(f"{i}. {each.fix}" for i, each in enumerate(ordered, 1)),
    )


def shown(value: Any) -> str:
    """A value as it would stand in the recipe, not too long."""
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


# What other trainers and other YAML call the same value.
_OTHER_WORDS = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "flash_attn": "flash_attention_2",
    "flash": "flash_attention_2",
    "chatml": "messages",
    "openai": "messages",
    "true": "on",
    "false": "off",
}


def value_fix(name: str, where: str, value: Any, *, on_command_line: bool) -> str:
    """What to write instead of `value`, for the key `name`, at `where` (the key, or an item of its list)."""
    is_ = "=" if on_command_line else ": "
    key = keys()[name]
    text = shown(value).strip('"')
    choices = [word for part in key.allowed.split(", or ") for word in part.removeprefix("one of ").split(", ")]
    if isinstance(value, str) and key.many and "," in value:
        return f"write {name}{is_}[{(',' if on_command_line else ', ').join(part.strip() for part in value.split(','))}]"
    if "true or false" in key.allowed and text.lower() in _TRUTHS:
        return f"write {where}{is_}{_TRUTHS[text.lower()]}"
    if isinstance(value, str) and "number" in key.allowed and tag_of(value) in (WHOLE, NUMBER):
        return f"write the number without quotes: {where}{is_}{value}"
    if isinstance(value, float) and "a whole number" in key.allowed and value.is_integer():
        return f"write {where}{is_}{value:.0f}"
    if "text" in key.allowed and isinstance(value, int | float):
        quoted = f"'{where}=\"{text}\"'" if on_command_line else f'{where}: "{text}"'
        return f"put it in quotes if it is meant as text: {quoted}"
    if _OTHER_WORDS.get(text.lower()) in choices:
        return f"did you mean {_OTHER_WORDS[text.lower()]}?"
    if near := difflib.get_close_matches(text.lower(), choices, 1, 0.7):
        return f"did you mean {near[0]}?"
    if key.required:
        return f"write it as in {EXAMPLES[key.section]}"
    return f"leave it out to have the default, {shown(scalar_or_list(key.default))}"


_TRUTHS = {"yes": "true", "on": "true", "1": "true", "true": "true", "no": "false", "off": "false", "0": "false", "false": "false"}


def scalar_or_list(value: Any) -> Any:
    """A tuple as it is written in YAML: one item without brackets, else a list. Anything else as it is."""
    if not isinstance(value, tuple):
        return value
    items = cast("tuple[Any, ...]", value)
    return items[0] if len(items) == 1 else list(items)
