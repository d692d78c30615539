"""Which operations there are, and which function computes each on which kind of device. Nothing registers itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_ROOM = "pantheraml.kernels."
CPU_ROOM = _ROOM + "cpu:"
"""How the targets begin that call the C++ kernels, which are built on first use (native.py)."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation.

    Attributes:
        signature: as torch writes it.
        reference: module:function in plain torch, right on every device, and what every other implementation is compared with.
        shapes: module:function that gives empty tensors of the result's shapes; None: the reference does, as its shapes depend on no value.
        opaque: torch.compile takes it as one. Else it sees the reference's operations, but where a kernel stands for an operation that
            writes to none of its arguments; such operations have no kernel in Triton.
    """

    signature: str
    reference: str
    shapes: str | None = None
    opaque: bool = True


OPERATIONS: Mapping[str, Operation] = {
    "rms_norm": Operation("(Tensor x, Tensor? weight, float eps, float offset) -> (Tensor, Tensor)", _ROOM + "rms_norm:reference"),
    "rms_norm_backward": Operation(
        "(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float offset, Tensor? add, bool need_weight) -> (Tensor, Tensor)",
        _ROOM + "rms_norm:reference_backward",
    ),
    "gated": Operation("(Tensor gate, Tensor up, str activation) -> Tensor", _ROOM + "gated:reference"),
    "gated_backward": Operation(
        "(Tensor da, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor, Tensor)", _ROOM + "gated:reference_backward"
    ),
    "rope": Operation("(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor", _ROOM + "rope:reference"),
    "attention": Operation(
        "(Tensor q, Tensor k, Tensor v, Tensor starts, SymInt longest, float scale, int window, float softcap) -> (Tensor, Tensor)",
        _ROOM + "attention:reference",
        _ROOM + "attention:shapes",
    ),
    "attention_backward": Operation(
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor starts, SymInt longest, float scale, int window,"
        " float softcap) -> (Tensor, Tensor, Tensor)",
        _ROOM + "attention:reference_backward",
        _ROOM + "attention:shapes_backward",
    ),
    "cross_entropy": Operation(
        "(Tensor(a!) logits, Tensor labels, float scale, float softcap, bool gradient) -> Tensor",
        _ROOM + "cross_entropy:reference",
        _ROOM + "cross_entropy:shapes",
    ),
    "low_rank_add": Operation("(Tensor(a!) y, Tensor low, Tensor b, float scale) -> ()", _ROOM + "low_rank:reference_add", opaque=False),
    "low_rank_backward": Operation(
        "(Tensor grad, Tensor low, Tensor b, float scale) -> (Tensor, Tensor)", _ROOM + "low_rank:reference_backward", opaque=False
    ),
}

DISPATCH: Mapping[str, str] = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}
"""Kind of device -> what torch's dispatcher calls it."""

_HAS_TRITON = find_spec("triton") is not None
KERNELS: Mapping[tuple[str, str], str] = {
    **{(name, "cpu"): f"{CPU_ROOM}{name}" for name in OPERATIONS},
    **{
        (name, kind): f"{_ROOM}{name.removesuffix('_backward')}_triton:{name}"
        for name in OPERATIONS
        for kind in ("cuda", "xpu")
        if _HAS_TRITON and OPERATIONS[name].opaque  # it comes with torch for Linux, and not for Windows
    },
    **{(name, "cuda"): f"{_ROOM}attention_cuda:{name}" for name in ("attention", "attention_backward") if _HAS_TRITON},
}
"""(operation, kind of device) -> module:function, where there is something faster than the reference."""


EIGHT_BIT_PRODUCTS: Mapping[str, str] = {"cpu": _ROOM + "int8:PackedProduct", "others": _ROOM + "int8:Product"}
"""What multiplies whole numbers of eight bits, by kind of device."""

FP8_ROUNDING: Mapping[str, str] = {"others": _ROOM + "fp8:rounded", **({"cuda": _ROOM + "fp8_triton:rounded"} if _HAS_TRITON else {})}
"""What rounds rows to floats of eight bits, by kind of device."""


def load(target: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    module, name = target.split(":")
    return getattr(import_module(module), name)


def installed(kind: str) -> dict[str, str]:
    """Each operation and what computes it on `kind`, for the doctor and the report."""
    return {name: KERNELS.get((name, kind), operation.reference) for name, operation in OPERATIONS.items()}


def only_references(kind: str) -> bool:
    """Whether torch itself computes everything on `kind`."""
    return not any(of == kind for _, of in KERNELS)
