"""Looking at data before training on it: what a file holds, what is learned of it, and other ways to write it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pantheraml.data.chat import Encoder, ensure_chat_template, read_chat_template
from pantheraml.data.load import (
    BadRow,
    BadRows,
    Conversation,
    Detected,
    PromptCompletion,
    Row,
    Text,
    UnusableRow,
    detect_format,
    normalize,
    read_rows,
    write_jsonl,
)
from pantheraml.data.pack import efficiency
from pantheraml.data.source import Counts, Examples, content_key, overlap, split, tokenize
from pantheraml.errors import DataError
from pantheraml.planning.batch import row_lengths
from pantheraml.planning.rows import PACKED_ROW_EXAMPLES
from pantheraml.recipe.types import DataSpec, Format

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text as RichText
    from transformers import PreTrainedTokenizerBase

PEEKED_ROWS = 100
Target = Literal["messages", "sharegpt", "alpaca", "prompt-completion"]


def open_rows(paths: Sequence[str], format: Format, *, on_bad: Callable[[BadRow], None]) -> tuple[Iterator[Row], Detected]:
    """The rows, and their format: as asked, or detected from the first 100."""
    rows = read_rows(paths, on_bad=on_bad)
    if format != "auto":
        return rows, Detected(format, "as asked")
    first = list(islice(rows, PEEKED_ROWS))
    return chain(first, rows), detect_format(first)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What `data check` found. Fields that need a tokenizer are None without one.

    Attributes:
        duplicates: rows whose content stood in an earlier row.
        lengths: (longest of the bin in tokens, examples) for each bin of the histogram, after data.too_long.
        learned_share: learned tokens over all tokens.
        packing_efficiency: real tokens over computed tokens.
        overlap: (place in eval, place in train) of equal examples.
        notes: sentences to announce.
    """

    format: Format
    format_why: str
    rows: int
    duplicates: int
    bad: tuple[BadRow, ...]
    bad_table: str
    counts: Counts | None = None
    lengths: tuple[tuple[int, int], ...] | None = None
    learned_share: float | None = None
    packing_efficiency: float | None = None
    overlap: tuple[tuple[str, str], ...] | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def render(self) -> RenderableType:
        """For a terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text as RichText

        facts = Table.grid(padding=(0, 2))
        facts.add_row("format", f"{self.format} ({self.format_why})")
        facts.add_row("rows", f"{self.rows}, of these {self.duplicates} repeated and {len(self.bad)} unusable")
        if self.counts:
            cut = f"{self.counts.truncated} truncated, {self.counts.dropped} dropped, {self.counts.split} split"
            facts.add_row("too long", cut)
            facts.add_row("tokens", f"{self.counts.tokens}, of these {self.learned_share or 0:.1%} learned")
        if self.packing_efficiency is not None:
            facts.add_row("packing", f"{self.packing_efficiency:.1%} of the computed tokens are real")
        if self.overlap is not None:
            shown = "; ".join(f"{held} = {seen}" for held, seen in self.overlap[:3])
            facts.add_row("in train and eval", f"{len(self.overlap)} examples" + (f": {shown}" if shown else ""))
        parts: list[RenderableType] = [facts]
        if self.lengths:
            most = max(count for _, count in self.lengths)
            histogram = Table("up to tokens", "examples", "", box=None)
            for top, count in self.lengths:
                histogram.add_row(str(top), str(count), "█" * round(30 * count / most))
            parts.append(histogram)
        if self.bad:
            parts.append(RichText("unusable rows\n" + self.bad_table, style="red"))
        return Group(*parts, *(RichText(note, style="yellow") for note in self.notes))


def check(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    spec: DataSpec,
    max_tokens: int,
    *,
    loss_on: Literal["assistant", "last", "all"] = "assistant",
    batch_size: int = 16,
    row_tokens: tuple[int, ...] | None = None,
    micro_tokens: int | None = None,
    packing: bool = True,
) -> CheckReport:
    """Reads all rows as training would, but goes on after bad ones and reports them.

    Args:
        tokenizer: without one, only formats and rows are checked.
        row_tokens, micro_tokens: the shape that packing efficiency is for. Default: what a run would take where memory is plenty.
    Raises: DataError for what concerns whole files, or if no row can be used.
    """
    # Every bad row shall be reported, so the limit is one that is not reached.
    bad = BadRows("skip", limit=2**31)
    rows, detected = open_rows(paths, spec.format, on_bad=bad)
    seen: set[bytes] = set()
    counted = 0

    def watched() -> Iterator[Row]:
        nonlocal counted
        for row in rows:
            counted += 1
            seen.add(content_key(row))
            yield row

    if tokenizer is None:
        for row in watched():
            try:
                normalize(row, detected.format)
            except UnusableRow as error:
                bad(BadRow.of(row, str(error)))
        return _report(detected, counted, len(seen), bad)

    template = read_chat_template(spec.chat_template) if spec.chat_template else None
    talks = detected.format in ("messages", "sharegpt", "alpaca")
    note = ensure_chat_template(tokenizer) if talks and template is None else None
    encoder = Encoder(tokenizer, loss_on, detected.format, template)
    lenient = spec.model_copy(update={"too_long": "truncate"}) if spec.too_long == "error" else spec
    examples = tokenize(watched(), encoder, lenient, max_tokens, bad)
    lengths = examples.lengths.tolist()
    shape = row_tokens or row_lengths(max_tokens, int(examples.lengths.max()) * (PACKED_ROW_EXAMPLES if packing else 1))
    held: Examples | None = None
    if spec.eval:
        held_rows, held_format = open_rows(spec.eval, spec.format, on_bad=bad)
        held = tokenize(held_rows, Encoder(tokenizer, loss_on, held_format.format, template), lenient, max_tokens, bad)
    return _report(
        detected,
        counted,
        len(seen),
        bad,
        counts=examples.counts,
        lengths=_histogram(examples.lengths),
        learned_share=examples.counts.label_tokens / max(1, examples.counts.tokens),
        packing_efficiency=efficiency(
            lengths,
            batch_size=batch_size,
            row_tokens=shape,
            micro_tokens=micro_tokens or shape[-1],
            packing=packing,
            trim=row_tokens is None,
        ),
        overlap=None if held is None else tuple(overlap(examples, held)),
        notes=(note,) if note else (),
    )


def _report(detected: Detected, rows: int, distinct: int, bad: BadRows, **found: Any) -> CheckReport:
    return CheckReport(
        format=detected.format,
        format_why=detected.why,
        rows=rows,
        duplicates=rows - distinct,
        bad=tuple(bad.rows),
        bad_table=bad.table(),
        **found,
    )


def _histogram(lengths: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Bins that double: up to 16, 32, 64 ... tokens, as far as there are examples."""
    tops = np.maximum(4, np.ceil(np.log2(lengths))).astype(int)
    return tuple((2**top, int((tops == top).sum())) for top in range(int(tops.min()), int(tops.max()) + 1))


def show(rows: Iterable[Row], encoder: Encoder, n: int) -> RichText:
    """The first n rows as the model reads them; learned tokens are green."""
    from rich.text import Text as RichText

    shown = RichText()
    for row in islice(rows, n):
        shown.append(f"{row.where}\n", style="bold")
        try:
            example = encoder.encode(row)
        except UnusableRow as error:
            shown.append(f"unusable: {error}\n\n", style="red")
            continue
        # Runs are decoded together: one token alone may be half a character.
        edges = [0, *(np.flatnonzero(np.diff(example.loss)) + 1).tolist(), len(example.tokens)]
        for start, end in pairwise(edges):
            text = str(encoder.tokenizer.decode(example.tokens[start:end].tolist()))
            shown.append(text, style="green" if example.loss[start] else "dim")
        shown.append(f"\n{len(example.tokens)} tokens, {int(np.count_nonzero(example.loss))} learned\n\n", style="italic")
    return shown


def convert(paths: Sequence[str], out: str, to: Target = "messages", format: Format = "auto") -> int:
    """Writes all rows in another format, as JSONL, and returns how many.

    Raises: DataError at the first row that cannot be used, or that the other format cannot hold without loss.
    """
    rows, detected = open_rows(paths, format, on_bad=BadRows("fail", limit=0))

    def converted() -> Iterator[dict[str, Any]]:
        for row in rows:
            try:
                yield _written(normalize(row, detected.format), to)
            except UnusableRow as error:
                raise DataError(
                    f"{row.where} cannot be written as {to}: {error}",
                    why="nothing that a row says may be lost on the way",
                    fix="correct the row or leave it out, or choose another format",
                ) from error

    return write_jsonl(out, converted())


_SPEAKER = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}


def _written(said: Conversation | PromptCompletion | Text, to: Target) -> dict[str, Any]:
    """A record in the format `to`. Raises: UnusableRow if something would be lost."""
    if isinstance(said, Text):
        raise UnusableRow(f"a plain text has no question and no answer, which {to} needs")
    if isinstance(said, PromptCompletion):
        if to == "prompt-completion":
            return {"prompt": said.prompt, "completion": said.completion}
        said = Conversation([{"role": "user", "content": said.prompt}, {"role": "assistant", "content": said.completion}])
    messages = said.messages
    tools = {"tools": said.tools} if said.tools else {}
    plain = all(set(message) == {"role", "content"} for message in messages)
    if to != "prompt-completion" and any(message["role"] == "assistant" for message in messages[: said.learn_from]):
        raise UnusableRow(f"only the completion is learned, which {to} cannot say")
    match to:
        case "messages":
            return {"messages": messages, **tools}
        case "sharegpt":
            if not plain:
                raise UnusableRow("sharegpt holds only who says what, and a turn has more, such as tool calls")
            return {"conversations": [{"from": _SPEAKER[m["role"]], "value": m["content"]} for m in messages], **tools}
        case "alpaca":
            if tools or not plain or [message["role"] for message in messages] != ["user", "assistant"]:
                raise UnusableRow("alpaca holds one question and one answer, and nothing else")
            return {"instruction": messages[0]["content"], "input": "", "output": messages[1]["content"]}
        case "prompt-completion":
            start = said.learn_from or next(i for i, message in enumerate(messages) if message["role"] == "assistant")
            if not said.learn_from and (start == 0 or start != len(messages) - 1):
                raise UnusableRow("prompt-completion holds one answer, at the end, after a prompt")
            return {"prompt": messages[:start], "completion": messages[start:], **tools}


def split_file(path: str, out_train: str, out_eval: str, fraction: float, seed: int) -> tuple[int, int]:
    """Writes the rows of one file into two, as JSONL, and returns how many went into each. Equal rows stay together.

    Raises: DataError if a row cannot be read, or nothing would be held out.
    """
    rows = list(read_rows([path], on_bad=BadRows("fail", limit=0)))
    train, held = split(rows, fraction, len(rows), seed)
    if not held:
        raise DataError(
            f"{path} has {len(rows)} rows, and {fraction:g} of them is none",
            why="there would be nothing to evaluate on",
            fix="raise the fraction",
        )
    return write_jsonl(out_train, (row.record for row in train)), write_jsonl(out_eval, (row.record for row in held))
