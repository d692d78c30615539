"""The kinds of device that can be asked for. A new one is one row here, and one file in hardware/."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = str
"""A key of KINDS."""


class Row(NamedTuple):
    """One kind.

    Attributes:
        backend: where it is written, module:class. family: what people call it.
        compiles: torch.compile makes a long run faster. records: so do recorded steps (CUDA graphs).
        own_memory: what does not fit into its memory can wait in the host's.
    """

    backend: str
    family: Literal["tpu", "gpu", "cpu"]
    compiles: bool = False
    records: bool = False
    own_memory: bool = False


KINDS: dict[Kind, Row] = {
    "tpu": Row("pantheraml.hardware.xla:XlaBackend", "tpu"),
    "cuda": Row("pantheraml.hardware.cuda:CudaBackend", "gpu", compiles=True, records=True, own_memory=True),
    "xpu": Row("pantheraml.hardware.xpu:XpuBackend", "gpu", compiles=True, own_memory=True),
    "mps": Row("pantheraml.hardware.mps:MpsBackend", "gpu"),
    "cpu": Row("pantheraml.hardware.cpu:CpuBackend", "cpu"),
}
"""In the order in which `auto` prefers them."""


def in_host_memory(kind: Kind) -> bool:
    """Whether devices of this kind work in the host's memory, so that nothing has to be moved to them."""
    return KINDS[kind].family == "cpu"


def kinds_meant(word: str) -> tuple[Kind, ...]:
    """The kinds that a word stands for, best first: `auto` all, `gpu` every GPU, and each kind itself."""
    if word == "auto":
        return tuple(KINDS)
    return tuple(kind for kind, row in KINDS.items() if kind == word or row.family == word)
