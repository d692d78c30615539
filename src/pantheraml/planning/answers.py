"""How many answers are made at once: as many as their keys and values fit into the memory that is free. Needs no torch."""

from __future__ import annotations

from pantheraml.errors import DeviceError
from pantheraml.planning.memory import RUNTIME_BYTES, format_bytes

MOST_ROWS = 256
"""About as many rows as make products bound by arithmetic instead of by reading weights, on the devices where that takes the most: an
H100 multiplies 295 rows in bfloat16 while it reads a matrix. More would only make each answer slower."""
UNTOLD_ROWS = 8
"""Where no driver tells how much memory is free."""
LOGITS_COPIES = 6
"""float32 values that a row's next token takes for each entry of the vocabulary: logits, scaled, sorted, shares, and their order in int64."""


def row_bytes(*, token_bytes: int, tokens: int, vocab: int) -> int:
    """What one answer takes.

    Args:
        token_bytes: of the keys and values of one token in all layers: 2 * layers * key heads * width of a head * bytes of a value.
        tokens: that there is room for in a row. vocab: entries of the logits.
    """
    return tokens * token_bytes + 4 * LOGITS_COPIES * vocab


def working_bytes(*, tokens: int, hidden: int, intermediate: int, vocab: int, compute_bytes_each: int) -> int:
    """What reading so many tokens at once takes: a layer's input, its norm, q, k, v and sum; gate, up and their product; some logits."""
    return tokens * (6 * hidden + 3 * intermediate) * compute_bytes_each + tokens * vocab


def answer_rows(free_bytes: int | None, *, row_bytes: int, working_bytes: int) -> int:
    """Rows that fit: (nine tenths of what is free - what reading takes - what is loaded later) / bytes of a row.

    Args:
        free_bytes: on the device, with the model's weights already there; None: unknown.
    Raises: DeviceError if not even one fits.
    """
    if free_bytes is None:
        return UNTOLD_ROWS
    rows = (free_bytes * 9 // 10 - working_bytes - RUNTIME_BYTES) // row_bytes
    if rows < 1:
        raise DeviceError(
            f"an answer needs {format_bytes(row_bytes)} beside the model, and {format_bytes(free_bytes)} are free",
            why=f"its keys and values stay in memory; reading a prompt takes {format_bytes(working_bytes + RUNTIME_BYTES)} more",
            fix="ask for fewer tokens in a row, or load the model in fewer bits",
        )
    return min(rows, MOST_ROWS)
