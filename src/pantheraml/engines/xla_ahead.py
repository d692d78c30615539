"""What XLA tells of a function that it compiled, also for devices that are not here."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax

_COLLECTIVE = re.compile(r"[)\]}] (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What XLA tells of a function that it compiled, for each device.

    Attributes:
        phase: "gradients" or "update".
        arguments_bytes, results_bytes: what goes in; and what comes out and is not in the place of an argument.
        temporary_bytes: what is needed in between.
        waiting_bytes: what is on the device meanwhile and takes no part.
        collectives: how often its text has an exchange between devices, by kind; those in a loop count once, those that XLA fused with arithmetic not at all.
    """

    phase: str
    arguments_bytes: int
    results_bytes: int
    temporary_bytes: int
    waiting_bytes: int
    collectives: dict[str, int]
    compile_s: float

    @property
    def peak_bytes(self) -> int:
        """All that is on a device at once."""
        return self.arguments_bytes + self.results_bytes + self.temporary_bytes + self.waiting_bytes


def told(phase: str, lowered: Any, beside: Any) -> Compiled:
    """Compile what JAX has lowered, and read what there is to read. beside: arrays, or their shapes, that wait on the devices meanwhile.

    Raises: JAX's RuntimeError if it does not fit.
    """
    start = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    waiting = sum(math.prod(each.sharding.shard_shape(each.shape)) * each.dtype.itemsize for each in jax.tree.leaves(beside))
    return Compiled(
        phase=phase,
        arguments_bytes=memory.argument_size_in_bytes,
        results_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        waiting_bytes=waiting,
        collectives=collectives(compiled.as_text()),
        compile_s=time.perf_counter() - start,
    )


def collectives(text: str) -> dict[str, int]:
    """How often XLA's text has an exchange between devices, by kind."""
    return dict(Counter(_COLLECTIVE.findall(text)))
