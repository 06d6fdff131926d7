"""How far an implementation may be from the float64 oracle: never far from what naive code of that dtype reaches."""

import jax
import jax.numpy as jnp
import numpy as np

from fgattn_jax.evaluation.cases import AttentionCase, CaseInputs
from fgattn_jax.evaluation.oracle import kept_keys

# Largest allowed |output - oracle| for normally distributed inputs, whatever the naive code does.
CEILING = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
LSE_CEILING = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}


def naive_attention(case: AttentionCase, inputs: CaseInputs) -> np.ndarray:
    """Softmax attention all in the inputs' dtype with a dense boolean mask."""
    groups = case.num_heads // case.num_kv_heads
    heads = (case.batch, case.num_heads)
    rows = np.broadcast_to(inputs.rows, (*heads, *inputs.rows.shape[2:]))
    order = None if inputs.order is None else np.broadcast_to(inputs.order, (*heads, case.num_queries))
    kept = np.stack(
        [
            [
                kept_keys(rows[b, n], case.query_block, None if order is None else order[b, n], case.num_queries)
                for n in range(heads[1])
            ]
            for b in range(heads[0])
        ]
    )
    query, key, value = inputs.query, jnp.repeat(inputs.key, groups, 2), jnp.repeat(inputs.value, groups, 2)
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * jnp.asarray(case.scale, query.dtype)
    weights = jax.nn.softmax(jnp.where(kept, scores, jnp.finfo(query.dtype).min), axis=-1)
    weights = jnp.where(kept.any(-1, keepdims=True), weights, 0)
    return np.asarray(jnp.einsum("bnts,bsnh->btnh", weights, value).astype(jnp.float32))


def output_bound(case: AttentionCase, inputs: CaseInputs, expected: np.ndarray) -> float:
    """Twice the error of naive code plus a few units in the last place, below the ceiling."""
    naive = float(np.abs(naive_attention(case, inputs) - expected).max())
    few_ulp = 4 * float(jnp.finfo(case.dtype).eps) * max(1.0, float(np.abs(expected).max()))
    return min(2 * naive + few_ulp, CEILING[case.dtype])
