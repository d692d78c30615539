"""The kinds of device that can be asked for. A new one is one row here, and one file in hardware/."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = str
"""A key of KINDS."""


class Row(NamedTuple):
    """One kind.

    Attributes:
        backend: where it is written, module:class. family: what people call it; on a "tpu" each new shape costs a compilation.
        engine: what computes training steps on it, as its backend says. "xla" takes all chips for one, and the CPU can stand in for them.
        compiles: torch.compile makes a long run faster. records: so do recorded steps (CUDA graphs).
        own_memory: what does not fit into its memory can wait in the host's.
        torch_type: what torch calls such a device, where that is not the kind.
        yields_to: reaches the same chips, which serve one library at a time: where that kind has answered, this one is asked by name only.
        unproven: nothing of ours has run on one, which its label says.
    """

    backend: str
    family: Literal["tpu", "gpu", "cpu"]
    engine: Literal["torch", "xla"] = "torch"
    compiles: bool = False
    records: bool = False
    own_memory: bool = False
    torch_type: str | None = None
    yields_to: Kind | None = None
    unproven: bool = False


KINDS: dict[Kind, Row] = {
    "tpu": Row("pantheraml.hardware.xla:XlaBackend", "tpu", engine="xla"),
    "torch_tpu": Row("pantheraml.hardware.torch_tpu:TorchTpuBackend", "tpu", torch_type="tpu", yields_to="tpu", unproven=True),
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
    """The kinds that a word stands for, best first: `auto` all, `gpu` every GPU, and each kind itself alone (`tpu` is one)."""
    if word == "auto":
        return tuple(KINDS)
    return (word,) if word in KINDS else tuple(kind for kind, row in KINDS.items() if row.family == word)


def torch_type(kind: Kind) -> str:
    """What torch calls a device of this kind, where it has tensors there."""
    return KINDS[kind].torch_type or kind


def kind_of(type: str) -> Kind | None:
    """The kind of a device that torch calls so; None: none of ours."""
    return next((kind for kind, row in KINDS.items() if row.torch_type == type), type if type in KINDS else None)
