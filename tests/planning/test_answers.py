"""How many answers fit: the arithmetic by hand."""

from __future__ import annotations

import pytest

from pantheraml.errors import DeviceError
from pantheraml.planning.answers import LOGITS_COPIES, MOST_ROWS, UNTOLD_ROWS, answer_rows, row_bytes, working_bytes
from pantheraml.planning.memory import RUNTIME_BYTES

GIB = 1 << 30


def test_a_row_of_an_8b_llama() -> None:
    """32 layers, 8 key heads of 128, bfloat16: 128 KiB a token, so 8192 tokens are 1 GiB."""
    token_bytes = 2 * 32 * 8 * 128 * 2
    row = row_bytes(token_bytes=token_bytes, tokens=8192, vocab=128_256)
    assert row == GIB + 4 * LOGITS_COPIES * 128_256
    working = working_bytes(tokens=512, hidden=4096, intermediate=14_336, vocab=128_256, compute_bytes_each=2)
    assert 80e6 < working < 160e6
    # 60 GiB of an H100 are free beside its weights: 54 - 0.6 GiB for rows.
    assert answer_rows(60 * GIB, row_bytes=row, working_bytes=working) == 53


def test_limits() -> None:
    assert answer_rows(None, row_bytes=1, working_bytes=0) == UNTOLD_ROWS
    assert answer_rows(1 << 50, row_bytes=1, working_bytes=0) == MOST_ROWS
    exactly_one = -(-(RUNTIME_BYTES + 1000 + 500) * 10 // 9)
    assert answer_rows(exactly_one, row_bytes=1000, working_bytes=500) == 1
    with pytest.raises(DeviceError) as said:
        answer_rows(exactly_one - 10, row_bytes=1000, working_bytes=500)
    assert said.value.fix == "ask for fewer tokens in a row, or load the model in fewer bits"
