"""Which function computes an operation on which kind of device. Nothing registers itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

REFERENCE: Mapping[str, str] = {
    "linear_cross_entropy": "pantheraml.kernels.linear_cross_entropy:linear_cross_entropy",
    "lora_linear": "pantheraml.kernels.lora_linear:lora_linear",
}
"""In plain torch: right on every device, and what every other implementation is compared with."""

KERNELS: Mapping[tuple[str, str], str] = {}
"""(operation, kind of device) -> module:function, where something faster than the reference exists."""


def kernel(operation: str, kind: str) -> Callable[..., Any]:
    """The function for `operation` on a device of `kind`; its reference where there is no special one.

    Raises: KeyError for an operation that is not in the table.
    """
    module, name = KERNELS.get((operation, kind), REFERENCE[operation]).split(":")
    return getattr(import_module(module), name)


def installed(kind: str) -> dict[str, str]:
    """Each operation and what would compute it on `kind`, for the doctor and the report."""
    return {operation: KERNELS.get((operation, kind), reference) for operation, reference in REFERENCE.items()}
