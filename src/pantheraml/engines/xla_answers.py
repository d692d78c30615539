"""Answers: the likeliest token behind each prompt, one after the other, in one compiled loop.

Letters: B rows, P tokens of the longest prompt, N tokens that are added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pantheraml.engines.xla_arrays import Arrays

if TYPE_CHECKING:
    from pantheraml.engines.xla_model import TracedModel


def continued(traced: TracedModel, arrays: Arrays, ids_BP: Any, lengths_B: Any, stops: Any, real: Any, *, new: int, caches: bool) -> Any:
    """The likeliest tokens [B, new] behind each prompt; what follows a stop token means nothing.

    Args:
        ids_BP: prompts from the left, with anything behind them. lengths_B: their tokens, at least one.
        stops: tokens that end an answer. real: the first so many rows are prompts; it ends when all of them have stopped.
        caches: keys and values of each layer are kept from token to token. Otherwise everything is computed again for each token,
            as for layers that hand on a state.
    """
    rows, width = ids_BP.shape
    ids_BS = jnp.pad(ids_BP, ((0, 0), (0, new)))
    positions_BS = jnp.broadcast_to(jnp.arange(width + new), ids_BS.shape)

    def first() -> tuple[Any, Any]:
        if not caches:
            return traced.logits(arrays, ids_BS, positions_BS, lengths_B - 1, None)[0], ids_BS
        logits, given = traced.logits(arrays, ids_BP, positions_BS[:, :width], lengths_B - 1, None)
        return logits, jax.tree.map(lambda cache: jnp.pad(cache, ((0, 0),) * (cache.ndim - 2) + ((0, new), (0, 0))), given)

    def then(token_B: Any, i: Any, kept: Any) -> tuple[Any, Any]:
        at_B = lengths_B + i
        if not caches:
            kept = kept.at[jnp.arange(rows), at_B].set(token_B)
            return traced.logits(arrays, kept, positions_BS, at_B, None)[0], kept
        return traced.logits(arrays, token_B[:, None], at_B[:, None], jnp.zeros_like(at_B), kept)

    def more(state: tuple[Any, ...]) -> Any:
        i, _, _, done_B, _ = state
        return (i < new) & ~done_B.all()

    def add(state: tuple[Any, ...]) -> tuple[Any, ...]:
        i, written_BN, logits, done_B, kept = state
        token_B = jnp.argmax(logits, -1).astype(jnp.int32)
        written_BN = written_BN.at[:, i].set(token_B)
        done_B |= (token_B[:, None] == stops).any(-1)
        logits, kept = then(token_B, i, kept)
        return i + 1, written_BN, logits, done_B, kept

    logits, kept = first()
    start = (jnp.zeros((), jnp.int32), jnp.zeros((rows, new), jnp.int32), logits, jnp.arange(rows) >= real, kept)
    return jax.lax.while_loop(more, add, start)[1]
