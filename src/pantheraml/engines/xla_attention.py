"""Attention in JAX, where examples share a row: by its definition, from a cache, and by the kernel that TPUs have for it.

Letters: B rows, T tokens of a row, S places of a cache, H heads, K key heads, G heads of one key head, W width of a head.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

LANES = 128
"""Tokens of a block are a multiple of so many on a TPU."""
BLOCK_TOKENS = 512


def seen_in_rows(positions_BT: Any, window: int | None) -> Any:
    """Which tokens each token sees, bool [B, T, T]: of its own example those up to itself, the last `window` of them."""
    at = jnp.arange(positions_BT.shape[1])
    back = at[:, None] - at[None, :]
    segments_BT = segments_of(positions_BT)
    seen = (back >= 0) & (segments_BT[:, :, None] == segments_BT[:, None, :])
    return seen if window is None else seen & (back < window)


def seen_in_cache(positions_BT: Any, room: int, window: int | None) -> Any:
    """Which places of a cache the token at a position sees, bool [B, T, S]."""
    back = positions_BT[:, :, None] - jnp.arange(room)
    return back >= 0 if window is None else (back >= 0) & (back < window)


def attend(q_BHTW: Any, k_BKSW: Any, v_BKSW: Any, seen_BTS: Any, *, scale: float, softcap: float | None, sinks_H: Any) -> Any:
    """softmax(scale * q k) v over what is seen, [B, T, H, W]; scores and sums in float32.

    sinks_H: a score of each head that takes part in the sum and gives nothing (GPT-OSS); None: there is none.
    """
    rows, heads, tokens, width = q_BHTW.shape
    grouped = q_BHTW.reshape(rows, k_BKSW.shape[1], -1, tokens, width)
    scores = scale * jnp.einsum("bkgtw,bksw->bkgts", grouped, k_BKSW, preferred_element_type=jnp.float32)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen_BTS[:, None, None], scores, -jnp.inf)
    if sinks_H is None:
        weights = jax.nn.softmax(scores, -1)
    else:
        sinks = jnp.broadcast_to(sinks_H.astype(jnp.float32).reshape(1, k_BKSW.shape[1], -1, 1, 1), (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sinks], -1), -1)[..., :-1]
    out = jnp.einsum("bkgts,bksw->btkgw", weights.astype(v_BKSW.dtype), v_BKSW, preferred_element_type=jnp.float32)
    return out.reshape(rows, tokens, heads, -1).astype(q_BHTW.dtype)


def segments_of(positions_BT: Any) -> Any:
    """Which example of its row each token belongs to, int32 [B, T], from 1."""
    return jnp.cumsum(positions_BT == 0, axis=1, dtype=jnp.int32)


def flash_fits(q_BHTW: Any) -> bool:
    """Whether the kernel can take rows of this length."""
    return q_BHTW.shape[2] % LANES == 0


def flash(
    q_BHTW: Any,
    k_BKTW: Any,
    v_BKTW: Any,
    segments_BT: Any,
    mesh: Mesh,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Any:
    """`attend` over rows by JAX's splash attention: no scores of a whole row are ever in memory. [B, T, H, W].

    Args:
        mesh: rows are divided over all its axes but tp, heads over tp.
        interpret: compute the kernel's steps one by one, on any device.
    Source: jax.experimental.pallas.ops.tpu.splash_attention.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, group = q_BHTW.shape[2], q_BHTW.shape[1] // k_BKTW.shape[1]
    seen = masks.CausalMask((tokens, tokens)) if window is None else masks.LocalMask((tokens, tokens), (window - 1, 0), 0)
    size = next(n for n in (BLOCK_TOKENS, 256, LANES) if tokens % n == 0)
    parts = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{part}": size for part in parts}
    kernel: Any = splash.make_splash_mqa(
        mask=masks.MultiHeadMask([seen] * group),
        block_sizes=splash.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )

    def of_row(q_HTW: Any, k_KTW: Any, v_KTW: Any, segments_T: Any) -> Any:
        ids = splash.SegmentIds(q=segments_T, kv=segments_T)
        grouped = q_HTW.reshape(k_KTW.shape[0], group, *q_HTW.shape[1:])
        return jax.vmap(lambda q, k, v: kernel(q, k, v, ids))(grouped, k_KTW, v_KTW).reshape(q_HTW.shape)

    rows = tuple(axis for axis in mesh.axis_names if axis != "tp")
    heads = PartitionSpec(rows, "tp" if "tp" in mesh.axis_names else None)
    spread = jax.shard_map(
        jax.vmap(of_row), mesh=mesh, in_specs=(heads, heads, heads, PartitionSpec(rows)), out_specs=heads, check_vma=False
    )
    scaled = (q_BHTW * jnp.asarray(scale, jnp.float32)).astype(q_BHTW.dtype)
    return jnp.swapaxes(spread(scaled, k_BKTW, v_BKTW, segments_BT), 1, 2)
