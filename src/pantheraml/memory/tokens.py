"""Bytes as the tokens of a language model, and back: lossless for any bytes, since every byte has a token too."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pantheraml.errors import MissingExtra, RecipeError, StorageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NOT_TEXT = re.compile("[\udc80-\udcff]+")
"""Bytes that are no UTF-8, as `surrogateescape` writes them."""


class Tokens:
    """A table from tokens to bytes, and a tokenizer that knows how to choose among them.

    Decoding is the table alone. Encoding lets the tokenizer cut what is UTF-8, and looks that its tokens say the same bytes; what is
    no UTF-8, and what the tokenizer would change, becomes a token a byte.

    Args:
        table: the bytes of each token; empty for those that stand for none (begin, padding).
        begin: the token that a record begins behind. spec: the text of a tokenizer.json (library `tokenizers`).
    Raises: RecipeError if a byte has no token of its own.
    """

    def __init__(self, table: Sequence[bytes], begin: int, spec: str) -> None:
        self.table, self.begin, self._spec = tuple(table), begin, spec
        known = {piece: token for token, piece in reversed(list(enumerate(self.table))) if len(piece) == 1}
        if missing := [byte for byte in range(256) if bytes((byte,)) not in known]:
            raise _unsuited(f"{len(missing)} of the 256 bytes have no token of their own, the first is {missing[0]:#04x}")
        self._of_byte = [known[bytes((byte,))] for byte in range(256)]

    def __len__(self) -> int:
        return len(self.table)

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, begin: int, vocabulary: int | None = None) -> Tokens:
        """Those of a byte-level tokenizer (GPT-2 and its like: llama 3, qwen, and what `train_tokenizer` makes).

        Args:
            vocabulary: tokens of the model, which may be more than the tokenizer has.
        Raises: RecipeError for tokenizers of another kind.
        """
        spec = tokenizer.to_str()
        parts = json.loads(spec)
        if parts["model"]["type"] != "BPE" or "ByteLevel" not in _kinds(parts.get("decoder")):
            raise _unsuited(f"it is {parts['model']['type']} with the decoder {' + '.join(_kinds(parts.get('decoder'))) or 'none'}")
        table = [b""] * max(vocabulary or 0, tokenizer.get_vocab_size(with_added_tokens=True))
        bytes_of = _byte_of_letter()
        for token, number in parts["model"]["vocab"].items():
            table[number] = bytes(bytes_of[letter] for letter in token) if all(letter in bytes_of for letter in token) else b""
        for added in parts.get("added_tokens", ()):
            table[added["id"]] = b"" if added["special"] else added["content"].encode()
        return cls(table, begin, spec)

    def encode(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        """The tokens of each content, int32 [T]; those of an empty one are none."""
        texts: list[str] = []
        places: list[list[tuple[int, bytes]]] = []
        for content in contents:
            places.append([])
            for piece, is_text in _stretches(content):
                places[-1].append((len(texts) if is_text else -1, piece))
                if is_text:
                    texts.append(piece.decode())
        cut = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [
            np.array([token for at, piece in each for token in self._checked(cut[at].ids if at >= 0 else None, piece)], np.int32)
            for each in places
        ]

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The bytes of tokens, which are all below `len(self)`."""
        return b"".join(map(self.table.__getitem__, tokens))

    def _checked(self, tokens: list[int] | None, piece: bytes) -> list[int]:
        if tokens is not None and self.decode(tokens) == piece:
            return tokens
        return [self._of_byte[byte] for byte in piece]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtra("tokenizers", needed_for="encoding with a language model", install="tokenizers") from error
        tokenizer = Tokenizer.from_str(self._spec)
        tokenizer.encode_special_tokens = True  # the name of one within a text is text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything, for a file: `tokens.bytes` uint8 (of all tokens, one behind the other), `tokens.lengths` uint16 [V],
        `tokens.begin` int32 [1], and `tokens.spec` uint8 (the tokenizer.json), which decoding does not need."""
        return {
            "tokens.bytes": np.frombuffer(b"".join(self.table), np.uint8),
            "tokens.lengths": np.array([len(piece) for piece in self.table], np.uint16),
            "tokens.begin": np.array([self.begin], np.int32),
            "tokens.spec": np.frombuffer(self._spec.encode(), np.uint8),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Tokens:
        """What `to_arrays` wrote. Raises: StorageError if it cannot be that."""
        try:
            all_bytes = arrays["tokens.bytes"].tobytes()
            ends = np.cumsum(arrays["tokens.lengths"], dtype=np.int64).tolist()
            spec = arrays["tokens.spec"].tobytes().decode()
            begin = int(arrays["tokens.begin"][0])
        except (KeyError, ValueError, IndexError) as error:
            raise _damaged(str(error)) from error
        if not ends or ends[-1] != len(all_bytes) or not 0 <= begin < len(ends):
            raise _damaged("the lengths of its tokens do not fit their bytes")
        return cls([all_bytes[start:end] for start, end in zip([0, *ends], ends, strict=False)], begin, spec)


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer with so many tokens at most, of which `<|end|>`, number 0, stands before and behind a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return tokenizer


END = "<|end|>"


def _stretches(content: bytes) -> list[tuple[bytes, bool]]:
    """The content in pieces, and of each whether it is UTF-8."""
    text = content.decode("utf-8", "surrogateescape")
    pieces: list[tuple[bytes, bool]] = []
    at = 0
    for found in _NOT_TEXT.finditer(text):
        pieces.append((text[at : found.start()].encode(), True))
        pieces.append((found.group().encode("utf-8", "surrogateescape"), False))
        at = found.end()
    pieces.append((text[at:].encode(), True))
    return [piece for piece in pieces if piece[0]]


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, the others for 256, 257, ... in their order."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _kinds(part: Any) -> list[str]:
    """Types of a part of a tokenizer.json, those of a sequence one by one."""
    if not part:
        return []
    return [kind for each in part.get("decoders", ()) for kind in _kinds(each)] if part["type"] == "Sequence" else [part["type"]]


def _unsuited(why: str) -> RecipeError:
    return RecipeError(
        "the tokenizer of this model cannot be used to encode records",
        why=f"any bytes must come back, which takes a byte-level tokenizer as GPT-2, llama 3 and qwen have: {why}",
        fix="use such a model, or let `pantheraml memory train` make one",
    )


def _damaged(what: str) -> StorageError:
    return StorageError(
        f"the tokens of a model cannot be read: {what}",
        why="without them nothing that it has encoded can be decoded",
        fix="`pantheraml memory verify` names damaged files; restore the model (.nbm) from its copy or a backup",
    )
