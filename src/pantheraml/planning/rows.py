"""What a row holds: the longest example, how many share a row, and the lengths of rows. Needs no torch."""

from __future__ import annotations

from pantheraml.errors import RecipeError
from pantheraml.planning.batch import row_lengths
from pantheraml.planning.shape import ModelShape
from pantheraml.recipe.types import Recipe

USUAL_TOKENS = 2048
PACKED_ROW_EXAMPLES = 4
"""A packed row holds about so many of the longest examples: the unfilled rest is small, attention still short."""

STATIC_ROW_TOKENS = 128
"""Where shapes are static, packed rows are a multiple of so many: attention's kernel for TPUs takes no others."""


def longest_allowed(recipe: Recipe, shape: ModelShape) -> tuple[int, str]:
    """Tokens of the longest example, and why. Raises: RecipeError if more is asked than the model was made for."""
    asked = recipe.model.max_tokens
    if asked == "auto":
        if shape.max_tokens < USUAL_TOKENS:
            return shape.max_tokens, "the longest position the model was made for"
        return USUAL_TOKENS, f"enough for most data; the model could do {shape.max_tokens}"
    if asked > shape.max_tokens:
        raise RecipeError(
            f"model.max_tokens={asked}, but {shape.name} was made for {shape.max_tokens}",
            why="positions it never saw make it worse, without any error",
            fix=f"set model.max_tokens to {shape.max_tokens} or less",
        )
    return asked, "the recipe asks for it"


def choose_packing(recipe: Recipe, shape: ModelShape) -> tuple[bool, str]:
    """Whether examples share a row, and why. Raises: RecipeError if that is asked for and the model cannot."""
    asked = recipe.data.packing
    if asked == "auto":
        if shape.packs:
            return True, "the model keeps the examples of a row apart, so less is padded"
        return False, f"{shape.family} carries state from one example of a row into the next"
    if asked == "on" and not shape.packs:
        raise RecipeError(
            f"data.packing=on, but {shape.name} ({shape.family}) cannot keep packed examples apart",
            why="its layers carry state along the row, so each example would see the one before it",
            fix="set data.packing to off, or auto",
        )
    return asked == "on", "the recipe asks for it"


def choose_row_tokens(
    max_tokens: int, longest_example: int | None, packing: bool, at_once: int | None = None, *, static: bool = False
) -> tuple[tuple[int, ...], str]:
    """The static row lengths, rising, and why.

    Args:
        at_once: tokens that the recipe wants to be taken at once. static: each length costs a compilation.
    """
    if at_once is not None and longest_example is not None:
        max_tokens = min(max_tokens, max(at_once, longest_example))
    if longest_example is None:
        return row_lengths(max_tokens), "a few fixed lengths up to max_tokens, so that few shapes are compiled"
    if packing:
        lengths = row_lengths(max_tokens, longest_example * PACKED_ROW_EXAMPLES)
        if static:
            row = -(-lengths[-1] // STATIC_ROW_TOKENS) * STATIC_ROW_TOKENS
            why = f"room for several of the longest examples ({longest_example} tokens); one length, so that a step is compiled once"
            return (row if at_once is None or row <= at_once else lengths[-1],), why
        return lengths, f"room for several of the longest examples ({longest_example} tokens), up to max_tokens"
    return row_lengths(
        max_tokens, longest_example
    ), f"a few fixed lengths; the longest example has {min(longest_example, max_tokens)} tokens"


def check_micro_tokens(recipe: Recipe, longest_row: int) -> None:
    """Raises: RecipeError if fewer tokens are asked for at once than a row has."""
    asked = recipe.batch.micro_tokens
    if asked != "auto" and asked < longest_row:
        raise RecipeError(
            f"batch.micro_tokens={asked} is less than the longest row, {longest_row} tokens",
            why="an example is never cut, so the device must take at least a whole one at once",
            fix=f"set batch.micro_tokens to {longest_row} or more, or model.max_tokens to {asked} or less",
        )
