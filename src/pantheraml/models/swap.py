"""Modules of one model instance replaced by faster ones of the same meaning, and put back.

Nothing is registered and no class is touched: another instance of the same model is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def swapped(model: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None]) -> Iterator[tuple[str, ...]]:
    """Within the block, the modules for which `replace(name, module)` gives another one are that other one.

    The replacement must hold the same parameters under the same names, so that checkpoints do not change.
    Yields: the names of what was replaced.
    Raises: ValueError for a replacement with other parameters.
    """
    before: dict[str, nn.Module] = {}
    try:
        for name, module in list(model.named_modules()):
            other = replace(name, module) if name else None
            if other is None:
                continue
            theirs, ours = dict(module.named_parameters()), dict(other.named_parameters())
            if theirs.keys() != ours.keys() or any(theirs[key] is not ours[key] for key in theirs):
                raise ValueError(f"the replacement of {name} holds other parameters: {sorted(ours)} instead of {sorted(theirs)}")
            before[name] = module
            model.set_submodule(name, other)
        yield tuple(before)
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def called(module: Any, compute: Callable[..., Any], *arguments: Any) -> Any:
    """compute(*arguments) in the place of the module's forward, so that its hooks run around it; within, the forward is its own again."""
    from torch import nn

    def run(*given: Any) -> Any:
        del module.forward
        return compute(*given)

    module.forward = run
    try:
        return nn.Module.__call__(module, *arguments)  # transformers' layers would compute it a second time when they are called
    finally:
        vars(module).pop("forward", None)
