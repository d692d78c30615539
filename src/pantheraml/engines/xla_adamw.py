"""The update of a step in JAX: clipping and AdamW, as adamw.py has them in torch."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pantheraml.engines.xla_arrays import Arrays
from pantheraml.recipe.types import OptimSpec

MOMENTS = ("exp_avg", "exp_avg_sq")


def update(
    weights: Arrays,
    moments: dict[str, Arrays],
    done: Any,
    halted: Any,
    gradients: Arrays,
    total: Any,
    labels: Any,
    lr: Any,
    *,
    optim: OptimSpec,
    decayed: frozenset[str],
) -> tuple[Arrays, dict[str, Arrays], Any, Any, Any, Any]:
    """One step; nothing changes where loss or gradient are not finite, or were not in a step before.

    Args:
        moments: by their names in MOMENTS. done: steps that were taken. halted: whether one was not finite.
        gradients: of the mean loss. total: sum of the losses. labels: how many. decayed: weights that decay.
    Returns: weights, moments, done, halted, mean loss, norm of the gradients.
    """
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(gradient)) for gradient in gradients.values()))
    mean = total / labels
    halted = halted | ~(jnp.isfinite(norm) & jnp.isfinite(mean))
    done = jnp.where(halted, done, done + 1)
    factor = 1.0 / jnp.maximum(1.0, (norm + 1e-6) / optim.clip_norm) if optim.clip_norm else 1.0
    # 1 - beta^k; the logarithm is taken in float64, as 1 - 0.999 in float32 is off by 3e-5 of itself.
    first_correction, second_correction = (-jnp.expm1(done * math.log(beta)) for beta in (optim.beta1, optim.beta2))

    def updated(name: str) -> tuple[Any, Any, Any]:
        weight, gradient = weights[name], gradients[name] * factor
        first = optim.beta1 * moments["exp_avg"][name] + (1 - optim.beta1) * gradient
        second = optim.beta2 * moments["exp_avg_sq"][name] + (1 - optim.beta2) * jnp.square(gradient)
        decay = optim.weight_decay if name in decayed else 0.0
        change = first / first_correction / (jnp.sqrt(second / second_correction) + optim.eps)
        before = (weight, moments["exp_avg"][name], moments["exp_avg_sq"][name])
        after = (weight - lr * (decay * weight + change), first, second)
        return jax.tree.map(lambda old, new: jnp.where(halted, old, new), before, after)

    new = {name: updated(name) for name in weights}
    parts = [{name: each[i] for name, each in new.items()} for i in range(3)]
    return parts[0], dict(zip(MOMENTS, parts[1:], strict=True)), done, halted, mean, norm
