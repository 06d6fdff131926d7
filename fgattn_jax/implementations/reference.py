"""Masked attention row by row with a dense score matrix: the plainest code that is right, for small sizes.

Skipped keys and values are replaced by zeros before the products, so that whatever they hold cannot matter, in the
output and in the gradients alike.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from fgattn_jax.implementations.spec import CallSpec
from fgattn_jax.masks._bits import unpack_words

MAX_SCORES = 2**28
"""Largest `B * N * T * S` that is accepted: 1 GiB of float32 scores."""


def unsupported_reasons(spec: CallSpec) -> tuple[str, ...]:
    """Why this implementation cannot run the call; empty if it can."""
    scores = spec.batch * spec.num_heads * spec.num_queries * spec.num_keys
    if scores > MAX_SCORES:
        return (f"it computes all scores, {scores=} here, and stops at {MAX_SCORES}; `xla` has no such limit",)
    return ()


def _softmax_output(scores: Array, value: Array, kept: Array) -> tuple[Array, Array]:
    """Output and LSE of scores `[..., m, S]`, of which `kept [..., 1, S]` count."""
    scores = jnp.where(kept, scores, -jnp.inf)
    some = jnp.any(kept, axis=-1, keepdims=True)
    # Rows without keys get zeros here, so that no NaN enters the gradients, and their results are set below.
    lse = jax.nn.logsumexp(jnp.where(some, scores, 0.0), axis=-1, keepdims=True)
    weights = jnp.where(kept, jnp.exp(scores - lse), 0.0)
    output = jnp.einsum("...ms,...sh->...mh", weights, value, precision="highest")
    return output, jnp.where(some, lse, -jnp.inf)[..., 0]


def masked(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    bits: UInt32[Array, "b n R W"],
    query_order: Int32[Array, "b n T"] | None,
    *,
    scale: float,
    query_block: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Masked attention and its LSE; differentiable by JAX itself."""
    batch, num_queries, num_heads, _ = query.shape
    num_keys, groups = key.shape[1], num_heads // key.shape[2]
    rows_per_head = bits.shape[2]
    heads_first = [x.astype(jnp.float32).transpose(0, 2, 1, 3) for x in (query, key, value)]
    q, k, v = heads_first[0], *(jnp.repeat(x, groups, axis=1) for x in heads_first[1:])
    order = None if query_order is None else jnp.broadcast_to(query_order, (batch, num_heads, num_queries))
    if order is not None:
        q = jnp.take_along_axis(q, order[..., None], axis=2)
    missing = rows_per_head * query_block - num_queries
    q = jnp.pad(q, ((0, 0), (0, 0), (0, missing), (0, 0))).reshape(batch, num_heads, rows_per_head, query_block, -1)
    kept = jnp.broadcast_to(unpack_words(bits, num_keys), (batch, num_heads, rows_per_head, num_keys))

    def row(arguments):
        row_query, row_kept = arguments  # [B, N, M, H], [B, N, S]
        row_key = jnp.where(row_kept[..., None], k, 0.0)
        row_value = jnp.where(row_kept[..., None], v, 0.0)
        scores = jnp.einsum("bnmh,bnsh->bnms", row_query, row_key, precision="highest") * scale
        return _softmax_output(scores, row_value, row_kept[:, :, None])

    output, lse = jax.lax.map(row, (jnp.moveaxis(q, 2, 0), jnp.moveaxis(kept, 2, 0)))
    output = jnp.moveaxis(output, 0, 2).reshape(batch, num_heads, -1, q.shape[-1])[:, :, :num_queries]
    lse = jnp.moveaxis(lse, 0, 2).reshape(batch, num_heads, -1)[:, :, :num_queries]
    if order is not None:
        inverse = jnp.argsort(order, axis=-1)
        output = jnp.take_along_axis(output, inverse[..., None], axis=2)
        lse = jnp.take_along_axis(lse, inverse, axis=2)
    return output.transpose(0, 2, 1, 3).astype(query.dtype), lse


def dense(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], *, scale: float
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention over all keys and its LSE."""
    groups = query.shape[2] // key.shape[2]
    q, k, v = (x.astype(jnp.float32).transpose(0, 2, 1, 3) for x in (query, key, value))
    k, v = jnp.repeat(k, groups, axis=1), jnp.repeat(v, groups, axis=1)
    scores = jnp.einsum("bnth,bnsh->bnts", q, k, precision="highest") * scale
    output, lse = _softmax_output(scores, v, jnp.ones((1, 1, 1, key.shape[1]), bool))
    return output.transpose(0, 2, 1, 3).astype(query.dtype), lse
