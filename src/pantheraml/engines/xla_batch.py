"""Rows of a cache on XLA's devices, for models/batch.py: two functions that are compiled once, a piece of a prompt and the next token.

Letters: B rows, N prompts that are read at once, T tokens of a piece, S places of a row, K key heads, W width of a head, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from pantheraml.engines.xla_arrays import Arrays, Spread, Store, fetched
from pantheraml.errors import DeviceError

if TYPE_CHECKING:
    from pantheraml.engines.xla_model import TracedModel
    from pantheraml.models.rows import Part


class XlaRows:
    """See `models.rows.Rows`. All rows are computed at each step, so that nothing is compiled twice.

    Args:
        arrays: gives the arrays of the model as they are now.
        count: of rows; it is rounded up to a multiple of the devices that share them.
        tokens: of a row. chunk: tokens of a prompt that are read at once.
    Raises: DeviceError for a model whose layers keep more than keys and values.
    """

    fallback: str | None = None
    block: int | None

    def __init__(
        self, traced: TracedModel, spread: Spread, store: Store, arrays: Callable[[], Arrays], *, count: int, tokens: int, chunk: int
    ) -> None:
        if not traced.caches:
            raise DeviceError(
                "rows of a cache cannot be kept for this model by XLA",
                why="its layers hand on a state from token to token",
                fix="answer with XlaEngine.generate, or choose another device",
            )
        self._traced, self._spread, self._store, self._arrays = traced, spread, store, arrays
        self.count, self.tokens, self.chunk, self.block = spread.full_rows(count), tokens, chunk, chunk
        self.widths = (self.count,)
        self.compilations: Counter[str] = Counter()
        self._read = [0] * self.count
        # What fills up the last piece of a prompt is written behind it, and overwritten before anybody may look at it.
        places = tokens + chunk
        piece, last = jnp.zeros((1, chunk), jnp.int32), jnp.zeros(1, jnp.int32)
        like = jax.eval_shape(lambda those: traced.logits(those, piece, piece, last, None)[1], arrays())

        def made(like: Any) -> Any:
            *turns, _, heads, _, width = like.shape
            sharding = spread.over(*(None,) * len(turns), *spread.heads.spec)
            return jnp.zeros((*turns, self.count, heads, places, width), like.dtype, device=sharding)

        self._caches = jax.tree.map(made, like)
        where = jax.tree.map(lambda cache: cache.sharding, self._caches)
        one, rows = spread.everywhere, spread.rows
        self._piece = self._compiled("piece", self._compute_piece, (None, where, one, rows, rows, rows), (one, where))
        self._token = self._compiled("token", self._compute_token, (None, where, rows, rows), (one, where))
        self._copy = self._compiled("copy", self._compute_copy, (None, where, one, one), (one, where))

    def _compiled(self, name: str, compute: Callable[..., Any], given: Any, gives: Any) -> Any:
        def counted(*args: Any) -> Any:
            self.compilations[name] += 1  # JAX calls it when it traces, and never again
            return compute(*args)

        counted.__name__ = f"answers_{name}"
        return jax.jit(counted, in_shardings=given, out_shardings=gives, donate_argnums=1)

    def _compute_piece(self, arrays: Arrays, caches: Any, slots_N: Any, ids_NT: Any, positions_NT: Any, at_N: Any) -> Any:
        those = jax.tree.map(lambda cache: jnp.take(cache, slots_N, cache.ndim - 4), caches)
        logits, those = self._traced.logits(arrays, ids_NT, positions_NT, at_N, those)
        return logits, jax.tree.map(lambda cache, part: _with_rows(cache, slots_N, part), caches, those)

    def _compute_token(self, arrays: Arrays, caches: Any, ids_B1: Any, positions_B1: Any) -> Any:
        return self._traced.logits(arrays, ids_B1, positions_B1, jnp.zeros_like(ids_B1[:, 0]), caches)

    def _compute_copy(self, arrays: Arrays, caches: Any, source: Any, target: Any) -> Any:
        def copied(cache: Any) -> Any:
            return _with_rows(cache, target[None], jnp.take(cache, source[None], cache.ndim - 4))

        return jnp.zeros(()), jax.tree.map(copied, caches)

    def ready(self) -> AbstractContextManager[Any]:
        """See `Rows.ready`."""
        return nullcontext()

    def adapter(self, name: str | None) -> int:
        """See `Rows.adapter`. None can be chosen here."""
        if name is not None:
            raise ValueError(f"there is no adapter {name!r}; XLA computes the model as it is")
        return 0

    def most(self, width: int) -> int:
        """See `Rows.most`: one for each of the devices that share the rows."""
        return self._spread.shares

    def read(self, parts: Sequence[Part], width: int) -> Tensor:
        """See `Rows.read`."""
        for part in parts:
            self._read[part.slot] = part.start + len(part.tokens)
        if width == 1:
            ids = np.zeros((self.count, 1), np.int32)
            # A row that rests writes where its next token would be.
            positions = np.asarray([[min(read, self.tokens - 1)] for read in self._read], np.int32)
            for part in parts:
                ids[part.slot], positions[part.slot] = part.tokens[0], part.start
            logits = self._call(self._token, self._rows(ids), self._rows(positions))
            return torch.from_numpy(logits[[part.slot for part in parts]])
        # Lines that only fill the shape are the first one again.
        lines = [*parts, *[parts[0]] * (self.most(width) - len(parts))]
        ids = np.asarray([[*part.tokens, *[0] * (self.chunk - len(part.tokens))] for part in lines], np.int32)
        positions = np.asarray([range(part.start, part.start + self.chunk) for part in lines], np.int32)
        positions = np.minimum(positions, self.tokens - 1)  # what only fills the shape may have no position of its own
        at = np.asarray([len(part.tokens) - 1 for part in lines], np.int32)
        slots = self._store.from_host(np.asarray([part.slot for part in lines], np.int32), self._spread.everywhere)
        return torch.from_numpy(self._call(self._piece, slots, self._rows(ids), self._rows(positions), self._rows(at))[: len(parts)])

    def _rows(self, array: np.ndarray) -> Any:
        return self._store.from_host(array, self._spread.rows)

    def _call(self, function: Any, *given: Any) -> np.ndarray:
        logits, self._caches = function(self._arrays(), self._caches, *given)
        return np.array(fetched(logits))

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """See `Rows.copy`. The whole row is copied: up to `start` both hold the same, and behind `end` nobody looks."""
        self._call(self._copy, *(self._store.from_host(np.asarray(slot, np.int32), self._spread.everywhere) for slot in (source, target)))
        self._read[target] = end

    def clear(self, slot: int) -> None:
        """See `Rows.clear`."""
        self._read[slot] = 0


def _with_rows(cache: Any, slots_N: Any, part: Any) -> Any:
    """A cache [.., B, K, S, W] with some of its rows."""
    return cache.at[(slice(None),) * (cache.ndim - 4) + (slots_N,)].set(part)
