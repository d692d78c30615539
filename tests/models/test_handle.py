"""Who asked is told when the answer is there, before or after it came."""

from __future__ import annotations

import threading
from typing import Any

from pantheraml.models.batch import Batcher
from pantheraml.models.request import Request


def test_every_answer_says_once_that_it_is_done(small: Any, tokenizer: Any) -> None:
    told: list[int] = []
    all_told = threading.Event()

    def tell(number: int) -> None:
        told.append(number)
        if len(told) == 6:
            all_told.set()

    with Batcher(small("llama"), tokenizer, rows=2, tokens=32) as batcher:
        handles = [batcher.submit(Request(prompt=(7, 8 + i), max_new_tokens=4)) for i in range(6)]
        for i, handle in enumerate(handles):
            handle.when_done(lambda i=i: tell(i))
        assert all_told.wait(60)
    assert sorted(told) == list(range(6)) and all(handle.done for handle in handles)
    handles[0].when_done(lambda: told.append(100))  # it is there already
    assert told[-1] == 100 and len(told) == 7


def test_one_that_is_cancelled_or_lost_says_so_as_well(small: Any, tokenizer: Any) -> None:
    batcher = Batcher(small("llama"), tokenizer, rows=1, tokens=400)
    assert not batcher.at_work
    ended: list[str] = []
    with batcher:
        assert batcher.at_work
        long, waiting = (batcher.submit(Request(prompt=(7,), max_new_tokens=390)) for _ in range(2))
        waiting.when_done(lambda: ended.append("waiting"))
        long.when_done(lambda: ended.append("long"))
        waiting.cancel()
        assert waiting.result(60).finished == "cancelled"
    assert sorted(ended) == ["long", "waiting"]
    assert not batcher.at_work
