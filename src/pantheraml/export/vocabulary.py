"""A Hugging Face tokenizer, said in GGUF's words, so that llama.cpp cuts text into the same tokens.

llama.cpp knows two kinds of BPE: over bytes ("gpt2", with a named rule for cutting words) and SentencePiece's, over
characters with bytes for the unknown ("llama", where scores stand for the order of merges).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.errors import PantheraError

if TYPE_CHECKING:
    from gguf import GGUFWriter

SPACE = "▁"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_BYTES, _BYTES_AND_WORDS, _DIGITS = "bytes", "bytes and words", "digits"

# How a tokenizer cuts text before merging, and whether a whole word in the vocabulary skips the merges
# -> llama.cpp's name for exactly that. Steps are the pre-tokenizers of tokenizer.json in order.
_PRE: dict[tuple[tuple[str, ...], bool], str] = {
    ((_BYTES_AND_WORDS,), False): "gpt-2",
    ((_DIGITS, _BYTES_AND_WORDS), False): "refact",
    ((rf"{_SUFFIXES}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", _BYTES), True): "llama-bpe",
    ((rf"{_SUFFIXES}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", _BYTES), False): "dbrx",
    ((rf"{_SUFFIXES}|{_LETTERS}|\p{{N}}|{_REST}", _BYTES), False): "qwen2",
    ((rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_REST_SLASH}", _BYTES), True): "tekken",
    ((rf"{_CASED[0]}{_SUFFIXES}?|{_CASED[1]}{_SUFFIXES}?|\p{{N}}{{1,3}}|{_REST_SLASH}", _BYTES), False): "gpt-4o",
}


def write_vocabulary(writer: GGUFWriter, folder: Path, rows: int) -> list[str]:
    """Write the name and the tokenizer of `folder`, padded to the `rows` of the embedding. Returns what may differ, in sentences.

    Raises: PantheraError for a tokenizer that GGUF has no words for.
    """
    import gguf
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    stored = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    model = stored["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"its tokenizer is of the kind {model['type']}", "BPE, over bytes or with byte fallback")
    added = {token["id"]: token for token in stored["added_tokens"]}
    names = {index: text for text, index in model["vocab"].items()} | {index: token["content"] for index, token in added.items()}
    if max(names) >= rows:
        raise _unsupported(f"its tokenizer has ids up to {max(names)} and its embedding {rows} rows", "an embedding row for every token")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    sentencepiece = bool(model.get("byte_fallback"))

    types = [_token_type(names.get(index), added.get(index), model, sentencepiece) for index in range(rows)]
    writer.add_name(_model_name(folder, set(names.values()), added))
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(rows)])
    notes = _sentencepiece(writer, stored, names, merges, rows) if sentencepiece else _byte_level(writer, stored, merges, names)
    writer.add_token_types(types)

    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    ends = _end_of_turn(folder, tokenizer.eos_token_id)
    if ends is not None:
        writer.add_eot_token_id(ends)
    # What the tokenizer does, not what its configuration says: templates and post-processors overrule each other.
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(plain_template(tokenizer.chat_template))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return notes


def plain_template(template: str) -> str:
    """The chat template without `{% generation %}`, which marks the loss for training and is unknown to llama.cpp."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def _model_name(folder: Path, texts: set[str], added: dict[int, dict[str, Any]]) -> str:
    """The folder's name, but "phi-3" in it means something: llama.cpp then drops the spaces after special tokens.

    GGUF has no other word for this (`rstrip` in tokenizer.json), and llama.cpp fails where one of these tokens is missing.
    """
    name = folder.resolve().name
    has_all = {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= texts
    if has_all and any(token["rstrip"] and token["special"] for token in added.values()):
        return f"phi-3 {name}"
    return re.sub("phi-?3", "phi_3", name, flags=re.IGNORECASE)


def _token_type(text: str | None, added: dict[str, Any] | None, model: dict[str, Any], sentencepiece: bool) -> int:
    from gguf import TokenType

    if text is None:
        return TokenType.UNUSED
    if text == model.get("unk_token"):
        return TokenType.UNKNOWN
    if added is not None and added["special"]:
        return TokenType.CONTROL
    # llama.cpp looks for user-defined tokens in the text with spaces; HF looks for this one in the text with "▁".
    if added is not None and not (sentencepiece and SPACE in text and text in model["vocab"]):
        return TokenType.USER_DEFINED
    return TokenType.BYTE if sentencepiece and re.fullmatch(r"<0x[0-9A-F]{2}>", text) else TokenType.NORMAL


def _byte_level(writer: GGUFWriter, stored: dict[str, Any], merges: list[tuple[str, ...]], names: dict[int, str]) -> list[str]:
    writer.add_tokenizer_model("gpt2")
    pre = _PRE.get((_steps(stored["pre_tokenizer"]), bool(stored["model"].get("ignore_merges"))))
    writer.add_tokenizer_pre(pre or "default")
    # llama.cpp refuses a file without merges. A token with itself, both longer than a character, never meets in text
    # where nothing merges.
    longest = max(names.values(), key=len)
    writer.add_token_merges([" ".join(merge) for merge in merges] or [f"{longest} {longest}"])
    if pre is None:
        return ["llama.cpp has no name for how this tokenizer cuts words: its default is used, and some words may be cut otherwise"]
    return []


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The pre-tokenizer as a key of _PRE; a step we cannot say makes a key that is not there."""
    if pre_tokenizer is None:
        return ("none",)
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    said: list[str] = []
    for step in steps:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": words}:
                said.append(_BYTES_AND_WORDS if words else _BYTES)
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                said.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                said.append(_DIGITS)
            case other:
                said.append(json.dumps(other))
    return tuple(said)


def _sentencepiece(
    writer: GGUFWriter, stored: dict[str, Any], names: dict[int, str], merges: list[tuple[str, ...]], rows: int
) -> list[str]:
    """Scores from the order of merges: SentencePiece joins the pair with the best score, BPE the pair that comes first."""
    order: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        order.setdefault("".join(pair), rank)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(order.get(names.get(index, ""), len(merges))) for index in range(rows)])
    prefix = _space_prefix(stored)
    writer.add_add_space_prefix(prefix is not None)
    notes = []
    if prefix == "first":
        notes.append("llama.cpp puts a space after every special token where this tokenizer puts one at the start only")
    allowed = set(merges)
    # SentencePiece may join any two pieces whose sum is a token; BPE only pairs that are listed.
    free = sum(
        (word[:cut], word[cut:]) not in allowed and word[:cut] in stored["model"]["vocab"] and word[cut:] in stored["model"]["vocab"]
        for word in order
        for cut in range(1, len(word))
    )
    if free:
        notes.append(f"{free} pairs of tokens may be joined by llama.cpp and not by this tokenizer: some words may be cut otherwise")
    return notes


def _space_prefix(stored: dict[str, Any]) -> str | None:
    """ "always", "first", or None: where the tokenizer puts a space before text."""
    normalizer, pre = stored["normalizer"] or {}, stored["pre_tokenizer"] or {}
    if any(step.get("type") == "Prepend" for step in normalizer.get("normalizers", [normalizer])):
        return "always"
    scheme = pre.get("prepend_scheme", "never") if pre.get("type") == "Metaspace" else "never"
    return None if scheme == "never" else scheme


def _end_of_turn(folder: Path, eos: int | None) -> int | None:
    """A second token that ends generation, as in Llama 3's `<|eot_id|>`; GGUF has room for one besides eos."""
    try:
        ends = json.loads((folder / "generation_config.json").read_text("utf-8")).get("eos_token_id")
    except FileNotFoundError:
        return None
    return next((end for end in ends if end != eos), None) if isinstance(ends, list) else None


def _unsupported(what: str, known: str) -> PantheraError:
    return PantheraError(
        f"this model cannot be written as GGUF: {what}",
        why=f"llama.cpp would cut text into other tokens than the model was trained on; known is {known}",
        fix="serve the merged folder with transformers instead",
    )
