"""The operations as torch sees them: each is registered once, with an implementation for each kind of device.

So torch.compile takes an operation as one (see Operation.opaque), selective checkpointing can name it, and the dispatcher finds the
implementation by the device of its tensors. Nothing is built or imported before an operation is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from pantheraml.kernels.table import DISPATCH, KERNELS, OPERATIONS, load

_library = library.Library("pantheraml", "DEF")
ops: Any = torch.ops.pantheraml
"""ops.NAME(...) is the operation of that name in the table; the signatures stand there."""


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which sums over a tensor are computed: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _late(target: str) -> Callable[..., Any]:
    """A function that is imported when it is first called."""
    found: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not found:
            found.append(load(target))
        return found[0](*args)

    return call


def _register() -> None:
    for name, operation in OPERATIONS.items():
        _library.define(name + operation.signature, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, _late(operation.reference), "CompositeExplicitAutograd" if operation.opaque else "CompositeImplicitAutograd")
        if operation.opaque:
            library.register_fake(f"pantheraml::{name}", _late(operation.shapes or operation.reference), lib=_library)
    for (name, kind), target in KERNELS.items():
        _library.impl(name, _late(target), DISPATCH[kind])


_register()
