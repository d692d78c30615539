"""What XLA tells of a function that it compiled, also for devices that are not here."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax

from pantheraml.errors import DeviceError
from pantheraml.hardware.failures import classify

_COLLECTIVE = re.compile(r"[)\]}] (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_BETWEEN_SLICES = re.compile(r"= \((\w+)\[([\d,]*)\][^=\n]*? send\([^\n]*_xla_megascale_transfer_type=\"(\w+)\"")
"""What a device gives to the network between slices: type, dimensions, and the kind of exchange that it is part of."""


class NoRoom(RuntimeError):
    """The compiler found no room on the devices; its words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What XLA tells of a function that it compiled, for each device.

    Attributes:
        phase: "gradients" or "update".
        arguments_bytes, results_bytes: what goes in; and what comes out and is not in the place of an argument.
        temporary_bytes: what is needed in between.
        waiting_bytes: what is on the device meanwhile and takes no part.
        collectives: how often its text has an exchange between devices, by kind; those in a loop count once, those that XLA fused with arithmetic not at all.
        between_slices: the same for exchanges over the slower network. between_slices_bytes: what each device gives to them.
    """

    phase: str
    arguments_bytes: int
    results_bytes: int
    temporary_bytes: int
    waiting_bytes: int
    collectives: dict[str, int]
    between_slices: dict[str, int]
    between_slices_bytes: int
    compile_s: float

    @property
    def peak_bytes(self) -> int:
        """All that is on a device at once."""
        return self.arguments_bytes + self.results_bytes + self.temporary_bytes + self.waiting_bytes


def told(phase: str, lowered: Any, beside: Any) -> Compiled:
    """Compile what JAX has lowered, and read what there is to read. beside: arrays, or their shapes, that wait on the devices meanwhile.

    Raises: NoRoom if it does not fit; DeviceError if there is no such program for these devices.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except Exception as error:  # JAX's own kinds, and those of Pallas, which are not public
        said, kind = str(error).strip().splitlines()[0].removesuffix("."), classify(error)
        if kind == "compilation":
            raise DeviceError(
                "the compiler of TPUs makes no program of a step for these devices",
                why=said,
                fix="choose a slice of another generation: v4, v5e, v5p, v6e or tpu7x",
            ) from error
        if kind == "out of memory" or said.startswith("RESOURCE_EXHAUSTED"):  # nothing was allocated: what ran out is room in the plan
            raise NoRoom(said) from error
        raise
    memory, text = compiled.memory_analysis(), compiled.as_text()
    waiting = sum(math.prod(each.sharding.shard_shape(each.shape)) * each.dtype.itemsize for each in jax.tree.leaves(beside))
    return Compiled(
        phase=phase,
        arguments_bytes=memory.argument_size_in_bytes,
        results_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        waiting_bytes=waiting,
        collectives=collectives(text),
        between_slices=between_slices(text)[0],
        between_slices_bytes=between_slices(text)[1],
        compile_s=time.perf_counter() - start,
    )


def collectives(text: str) -> dict[str, int]:
    """How often XLA's text has an exchange between devices, by kind."""
    return dict(Counter(_COLLECTIVE.findall(text)))


def between_slices(text: str) -> tuple[dict[str, int], int]:
    """How often XLA's text has an exchange over the network between slices, by kind, and the bytes that each device gives to them."""
    counts: Counter[str] = Counter()
    size_bytes = 0
    for dtype, dimensions, kind in _BETWEEN_SLICES.findall(text):
        counts[kind.lower().replace("_", "-")] += 1
        bits = re.search(r"\d+", dtype)  # pred has none, and takes a byte
        size_bytes += math.prod(int(each) for each in dimensions.split(",") if each) * (int(bits[0]) if bits else 8) // 8
    return dict(counts), size_bytes
