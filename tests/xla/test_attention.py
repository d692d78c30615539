"""Attention on XLA against its definition in float64, and the TPU's kernel, step by step, against that."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pantheraml.engines.xla_attention import attend, flash, seen_in_rows, segments_of

Case = dict[str, Any]
CASES: dict[str, Case] = {"plain": {}, "window": {"window": 40}, "softcap": {"softcap": 5.0}}


def drawn(rows: int = 2, heads: int = 4, key_heads: int = 2, tokens: int = 256, width: int = 128) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    q = rng.normal(size=(rows, heads, tokens, width)).astype(np.float32)
    k, v = (rng.normal(size=(rows, key_heads, tokens, width)).astype(np.float32) for _ in range(2))
    positions = np.stack([np.concatenate([np.arange(n) for n in lengths]) for lengths in ((100, 30, tokens - 130), (tokens,))])
    return q, k, v, positions.astype(np.int32)


def definition(q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, window: int | None, softcap: float | None) -> np.ndarray:
    """One token and head after the other, in float64."""
    rows, heads, tokens, width = q.shape
    out = np.zeros((rows, tokens, heads, width))
    for b in range(rows):
        for t in range(tokens):
            first = t - min(int(positions[b, t]), tokens if window is None else window - 1)
            for h in range(heads):
                own = h * k.shape[1] // heads
                scores = k[b, own, first : t + 1].astype(np.float64) @ q[b, h, t] / np.sqrt(width)
                scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights @ v[b, own, first : t + 1] / weights.sum()
    return out


def by_definition_in_jax(q: Any, k: Any, v: Any, positions: Any, *, window: int | None = None, softcap: float | None = None) -> Any:
    return attend(q, k, v, seen_in_rows(positions, window), scale=1 / np.sqrt(q.shape[-1]), softcap=softcap, sinks_H=None)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_attention_is_its_definition(case: Case) -> None:
    q, k, v, positions = drawn(tokens=160, width=16)
    expected = definition(q, k, v, positions, case.get("window"), case.get("softcap"))
    assert np.abs(np.asarray(by_definition_in_jax(q, k, v, positions, **case)) - expected).max() < 1e-5


def test_sinks_take_part_in_the_sum() -> None:
    q, k, v, positions = drawn(tokens=160, width=16)
    seen = seen_in_rows(positions, None)
    none = attend(q, k, v, seen, scale=0.25, softcap=None, sinks_H=jnp.full(4, -1e9))
    assert np.allclose(none, attend(q, k, v, seen, scale=0.25, softcap=None, sinks_H=None), atol=1e-6)
    assert np.abs(np.asarray(attend(q, k, v, seen, scale=0.25, softcap=None, sinks_H=jnp.full(4, 50.0)))).max() < 1e-6


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_kernel_of_a_tpu_gives_the_same_values_and_gradients(case: Case) -> None:
    q, k, v, positions = drawn()
    mesh = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("fsdp", "tp"))

    def kernel(q: Any, k: Any, v: Any) -> Any:
        return flash(q, k, v, segments_of(positions), mesh, scale=1 / np.sqrt(q.shape[-1]), interpret=True, **case)

    def plain(q: Any, k: Any, v: Any) -> Any:
        return by_definition_in_jax(q, k, v, positions, **case)

    weights = np.random.default_rng(1).normal(size=(2, 256, 4, 128)).astype(np.float32)
    values, gradients = (
        [f(q, k, v) for f in (kernel, plain)],
        [jax.jit(jax.grad(lambda *a, f=f: (f(*a) * weights).sum(), argnums=(0, 1, 2)))(q, k, v) for f in (kernel, plain)],
    )
    assert np.abs(np.asarray(values[0]) - np.asarray(values[1])).max() < 1e-5
    for mine, theirs in zip(*gradients, strict=True):
        assert np.abs(np.asarray(mine) - np.asarray(theirs)).max() < 1e-4 * np.abs(np.asarray(theirs)).max()
