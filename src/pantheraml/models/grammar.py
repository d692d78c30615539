"""Answers that satisfy a JSON schema: which tokens may come next, and how to end in time.

llguidance knows at each place which tokens keep the answer on its way. That alone would not make an answer whole: a limit of tokens
could cut it off. So near the limit a way to the end is kept at hand, and taken when a token would make it too long.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pantheraml.errors import MissingExtra, RecipeError

# What brings a JSON text to its end: ends of what is open, which always come first, and otherwise what was taken least often on the way.
_CLOSING = ('"', "}", "]")
_ENDINGS = (*_CLOSING, ",", "0", "1", "9", "null", "true", "false", "n", "t", "f", "[", "{", ":", " ", "-", ".", "e", "a", "A")
_WALKS, _WALK_TOKENS = 8, 256
"""Where that does not end, as with a pattern that wants a certain character, so many ways are gone by chance, each up to so long."""


class Grammars:
    """JSON schemas for one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocab: entries of the logits, of which the last ones may stand for no token.
        stops: tokens that end an answer; they can come when the schema is satisfied.
    Raises: MissingExtra without llguidance; RecipeError for a tokenizer that it cannot read.
    """

    def __init__(self, tokenizer: Any, vocab: int, stops: Sequence[int]) -> None:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise MissingExtra("llguidance", needed_for="an answer that satisfies a JSON schema", install="pantheraml[serve]") from error
        try:
            known = max(vocab, len(tokenizer))
            self._tokenizer = from_tokenizer(tokenizer, n_vocab=known, eos_token=list(stops) or None)
        except (ValueError, TypeError, AttributeError) as error:
            raise RecipeError(
                "answers to a JSON schema are not possible with this model's tokenizer",
                why=f"the bytes of its tokens are not known: {error}",
                fix="leave the schema out, or choose a model with a tokenizer.json",
            ) from error
        self._vocab = vocab
        spelled = {text: self._tokenizer.tokenize_bytes(text.encode()) for text in _ENDINGS}
        self._endings = [tokens[0] for tokens in spelled.values() if len(tokens) == 1 and tokens[0] < vocab]
        self._closing = frozenset(spelled[text][0] for text in _CLOSING)
        letters = [self._tokenizer.tokenize_bytes(bytes([code])) for code in range(32, 127)]
        self._letters = [tokens[0] for tokens in letters if len(tokens) == 1 and tokens[0] < vocab]
        self._stops = frozenset(stops)

    def start(self, schema: Mapping[str, Any], max_new_tokens: int) -> Grammar:
        """The grammar of one answer. Raises: RecipeError for a schema that cannot be kept to, or not in so many tokens."""
        from llguidance import LLMatcher

        text = json.dumps(dict(schema))
        try:
            written = LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
            )
            matcher = LLMatcher(self._tokenizer, written)
            trouble = matcher.get_error()
        except ValueError as error:
            matcher, trouble = None, str(error)
        if matcher is None or trouble:
            raise RecipeError(
                f"the JSON schema cannot be used: {trouble.splitlines()[0]}",
                why="every token of the answer is checked against it",
                fix="leave out what is named; of JSON Schema most is known, https://github.com/guidance-ai/llguidance says what",
            )
        grammar = Grammar(matcher, self._vocab, (self._endings, self._closing, self._letters), self._stops, max_new_tokens)
        if grammar.needed is None or grammar.needed > max_new_tokens:
            raise RecipeError(
                f"no answer to the JSON schema was found in {max_new_tokens} tokens",
                why="one that is cut off satisfies nothing",
                fix="ask for more new tokens, or for less in the schema",
            )
        return grammar


class Grammar:
    """One answer on its way. needed: tokens to the end from here that are known to do; None: no end was found."""

    def __init__(
        self,
        matcher: Any,
        vocab: int,
        endings: tuple[Sequence[int], frozenset[int], Sequence[int]],
        stops: frozenset[int],
        left: int,
    ) -> None:
        self._matcher, self._vocab, self._stops, self._left = matcher, vocab, stops, left
        self._endings, self._closing, self._letters = endings
        self._way: list[int] | None = self._ending(matcher)

    @property
    def needed(self) -> int | None:
        """Tokens to the end, on the way that is known."""
        return None if self._way is None else len(self._way)

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    @property
    def trouble(self) -> RecipeError | None:
        """Why the answer cannot be checked any further."""
        said = self._matcher.get_error()
        if not said:
            return None
        return RecipeError(
            "an answer could no longer be checked against its JSON schema",
            why=said.splitlines()[0],
            fix="make the schema simpler: fewer alternatives, shorter patterns",
        )

    def allowed(self) -> Tensor:
        """Which tokens may come next, bool [V] on the host."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        mask = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().bool()
        return mask[: self._vocab]

    def take(self, token: int) -> int:
        """The token that comes: this one, or where the answer could no longer end in time behind it, the next on the way to its end."""
        self._left -= 1
        if token not in self._stops:
            before = self._way if self._way is not None else self._ending(self._matcher)
            ahead = self._matcher.deep_copy()
            way = self._way_on(ahead, before) if ahead.consume_token(token) else None
            if before is not None and (way is None or len(way) > self._left) and (before or self._stops):
                token, way = (before[0], before[1:]) if before else (min(self._stops), [])
            self._way = way
        self._matcher.consume_token(token)
        return token

    def _way_on(self, ahead: Any, before: list[int] | None) -> list[int] | None:
        """The way to the end behind one token more. Most tokens, such as those within a text, leave the way as it was, which is soon
        found out; any one can open what takes hundreds, so none goes unchecked.
        """
        for way in () if before is None else (before[1:], before):
            if len(way) <= self._left and ahead.validate_tokens(way) == len(way):
                end = ahead.deep_copy()
                if (not way or end.consume_tokens(way)) and end.is_accepting():
                    return way
        return self._ending(ahead)

    def _ending(self, matcher: Any) -> list[int] | None:
        """Tokens that end the answer from here, few of them; None: none were found that are not more than can come."""
        taken = Counter[int]()

        def closing_first(able: list[int]) -> int:
            closing = [token for token in able if token in self._closing]
            taken.update(chosen := closing[:1] or sorted(able, key=taken.__getitem__)[:1])
            return chosen[0]

        way = self._walked(matcher, self._endings, closing_first, self._left)
        if way is not None:
            return way
        draw, most = random.Random(0), min(self._left, _WALK_TOKENS)

        def any_but_quote_first(able: list[int]) -> int:
            return able[0] if able[:1] == self._endings[:1] else draw.choice(able)

        walks = [self._walked(matcher, (*self._endings, *self._letters), any_but_quote_first, most) for _ in range(_WALKS)]
        return min((way for way in walks if way is not None), key=len, default=None)

    def _walked(self, matcher: Any, among: Sequence[int], choose: Callable[[list[int]], int], most: int) -> list[int] | None:
        """A way to the end of so many tokens at most: `choose` names one of those among some that may come."""
        matcher, way = matcher.deep_copy(), list[int]()
        while not matcher.is_accepting() and len(way) <= most:
            tokens = matcher.compute_ff_tokens()
            if not tokens:
                bits = matcher.compute_bitmask()
                able = [token for token in among if bits[token >> 3] >> (token & 7) & 1]
                tokens = [choose(able)] if able else _first(bits)
            if not tokens or not matcher.consume_tokens(tokens):
                return None
            way += tokens
        return way if matcher.is_accepting() else None


def _first(bits: bytes) -> list[int]:
    """The first token that may come."""
    return [i * 8 + bit for i, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1][:1]
