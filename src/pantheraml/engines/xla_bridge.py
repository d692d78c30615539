"""Torch's functions on arrays of JAX, so that XLA can compile them. The only file that imports torchax: six of its functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
from torchax.tensor import Environment, OperatorNotFound

from pantheraml.errors import PantheraError


class Bridge:
    """Within `computing`, torch's functions take what `tensor` gave, and JAX traces what they compute."""

    def __init__(self) -> None:
        self._env = Environment()

    def define(self, operation: Any, compute: Callable[..., Any]) -> None:
        """What computes one of torch's operations, or a function of ours that asks torch for its like."""
        self._env.override_op_definition(operation, compute)

    @contextmanager
    def computing(self, key: Any, refused: Callable[[str], Exception]) -> Iterator[None]:
        """Within the block torch computes with arrays; random numbers come from the key.

        Args:
            refused: the error for what cannot be traced, from the reason.
        """
        try:
            with self._env, self.drawing(key):
                yield
        except PantheraError:
            raise
        except (OperatorNotFound, TypeError, ValueError, AttributeError, LookupError, NotImplementedError, AssertionError) as error:
            # What was written for torch alone fails in any of these ways when its tensors have no values; the cause stays chained.
            raise refused((str(error).strip() or type(error).__name__).splitlines()[0]) from error

    def tensor(self, arrays: Any) -> Any:
        """Arrays, in whatever they are nested, as tensors that are traced; nothing is copied."""
        return self._env.j2t_iso(arrays)

    def array(self, tensors: Any) -> Any:
        """What `tensor` gave, as arrays."""
        return self._env.t2j_iso(tensors)

    def drawing(self, key: Any) -> AbstractContextManager[None]:
        """Within the block, random numbers come from this key."""
        return self._env.override_property(prng=key)

    def split_key(self, count: int) -> Any:
        """So many keys, made of the next one."""
        return jax.random.split(self._env.get_and_rotate_prng_key(), count)
