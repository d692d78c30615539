"""Where answers end, and their text piece by piece: never half a character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pantheraml.models.head import causal_model

# Ends of a turn that some tokenizers know without calling them their end-of-text token.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_role|>")
_BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet one."""


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: what the model's generation config says, the tokenizer's end of text, known ends of a turn."""
    configured = causal_model(model).generation_config.eos_token_id
    known = tokenizer.get_vocab()
    stops = [configured] if isinstance(configured, int) else list(configured or ())
    stops += [tokenizer.eos_token_id] + [known[end] for end in _TURN_ENDS if end in known]
    return list(dict.fromkeys(stop for stop in stops if stop is not None))


class Text:
    """The text of an answer while its tokens come.

    Only a few tokens are decoded at a time: those since the last piece, behind those of the piece before, since some tokenizers
    write a token differently at the beginning of a text.

    Args:
        stop: the text ends before the first of these strings.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._from = self._whole = 0  # the window that is decoded begins here; up to there all characters were complete
        self._shown = 0  # characters of the window that are in the text
        self._text = ""
        self._given = 0
        self.stopped = False
        """Whether a stop string has come."""

    @property
    def text(self) -> str:
        """All that was given."""
        return self._text[: self._given]

    def add(self, token: int) -> str:
        """What is certain now."""
        self._tokens.append(token)
        window = self._window()
        whole = window.rstrip(_BROKEN)
        if len(whole) <= self._shown:
            return ""
        self._text += whole[self._shown :]
        self._shown = len(whole)
        if whole == window:
            self._from, self._whole = self._whole, len(self._tokens)
            self._shown = len(self._window())
        return self._certain(held_back=True)

    def rest(self) -> str:
        """What is left when no more tokens come."""
        if not self.stopped:
            self._text += self._window()[self._shown :]
        return self._certain(held_back=False)

    def _window(self) -> str:
        return self._tokenizer.decode(self._tokens[self._from :], skip_special_tokens=True)

    def _certain(self, *, held_back: bool) -> str:
        found = [place for place in (self._text.find(stop, self._given) for stop in self._stop) if place >= 0]
        if found:
            self._text, self.stopped, held_back = self._text[: min(found)], True, False
        end = len(self._text) - (self._held() if held_back else 0)
        piece, self._given = self._text[self._given : end], end
        return piece

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        new = len(self._text) - self._given
        lengths = (length for stop in self._stop for length in range(min(len(stop) - 1, new), 0, -1) if self._text.endswith(stop[:length]))
        return max(lengths, default=0)
