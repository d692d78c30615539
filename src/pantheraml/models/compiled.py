"""Decoder layers compiled by torch, one graph for all that are alike; on one model instance, and put back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

_MOST_GRAPHS = 64
"""Of one function. torch's own limit, 8, is met by a family with two types of layers that trains and is evaluated."""


def keep_graphs(folder: Path) -> None:
    """What is compiled is kept in a folder for the next run, unless torch's own setting names another."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.expanduser() / "graphs"))  # noqa: TID251 - torch has no other setting


def compiled(compute: Callable[..., Any], *, whole: bool) -> Callable[..., Any]:
    """The function, compiled when it is first called, for rows of any number.

    Args:
        whole: it is an error where torch has to leave the graph.
    """
    import torch

    graph = torch.compile(compute, fullgraph=whole, dynamic=True)

    @wraps(compute)
    def call(*args: Any, **options: Any) -> Any:
        # Numbers like a norm's epsilon are constants of the graph: torch 2.13 cannot hand them to an autograd.Function.
        with torch._dynamo.config.patch(specialize_float=True, recompile_limit=_MOST_GRAPHS):
            return graph(*args, **options)

    return call


@contextmanager
def compiled_layers(model: Any) -> Iterator[int]:
    """Within the block, the layers of a model of transformers are compiled, each in its own forward. Yields: how many."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer) and "forward" not in vars(layer)]
    try:
        for layer in layers:
            layer.forward = compiled(layer.forward, whole=False)
        yield len(layers)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
