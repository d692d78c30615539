"""What can be asked: every key with its value, what it may be, and what it means; for people and for editors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pantheraml.recipe.keys import keys
from pantheraml.recipe.mistakes import scalar_or_list, shown
from pantheraml.recipe.types import Recipe

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One key. `value` is None where the recipe's kind of section does not have it; `changed`: it differs from the default."""

    name: str
    value: str | None
    default: str
    changed: bool
    allowed: str
    description: str


def rows(recipe: Recipe | None = None) -> list[Row]:
    """Every key, with the value that `recipe` gives it; without a recipe, with its default."""
    return [
        Row(
            name=key.name,
            value=_value(recipe, key.section, key.last) if recipe else _default(key.default, key.required),
            default=_default(key.default, key.required),
            changed=recipe is not None and getattr(getattr(recipe, key.section), key.last, key.default) != key.default,
            allowed=key.allowed,
            description=key.description,
        )
        for key in keys().values()
    ]


def _value(recipe: Recipe, section: str, last: str) -> str | None:
    values: dict[str, Any] = getattr(recipe, section).model_dump()
    return _plainly(values[last]) if last in values else None


def _default(value: Any, required: bool) -> str:
    return "required" if required else _plainly(value)


def _plainly(value: Any) -> str:
    value = scalar_or_list(value)
    return value if isinstance(value, str) else shown(value)


def explain(recipe: Recipe | None = None) -> Table:
    """The table that `pantheraml recipe explain` prints; what differs from its default is bold."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("key", "value" if recipe else "default", "may be", "meaning"):
        table.add_column(title, no_wrap=title == "key", overflow="fold")
    section = ""
    for row in rows(recipe):
        if row.value is None:
            continue
        if section and not row.name.startswith(f"{section}."):
            table.add_section()
        section = row.name.split(".")[0]
        table.add_row(*(Text(cell, style="bold" if row.changed else "") for cell in (row.name, row.value, row.allowed, row.description)))
    return table


def schema() -> dict[str, Any]:
    """JSON schema of a recipe file, the short forms included, for editors that complete and check YAML."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(mode="validation"),
        "title": "PantheraML recipe",
    }


def example() -> str:
    """A small recipe with comments, to start from."""
    return _EXAMPLE


_EXAMPLE = """\
# What to train, and on what. Everything else has a default: pantheraml recipe explain
model: Qwen/Qwen3-0.6B      # a Hub id, a folder, or tiny:llama for a small model made from nothing
data: examples.jsonl        # messages, prompt and completion, or text; relative to the folder you run in

adapter: {rank: 16}         # LoRA; write `adapter: full` to train every weight
batch: {size: 16}           # examples in one optimizer step
optim:
  lr: auto                  # 2e-4 for LoRA, 2e-5 for full
  epochs: 1
eval:
  prompts: ["What is PantheraML?"]  # answered before and after training
export: {merged: false}     # true: also write the model with the adapter merged in
"""
