"""What the tests of Flax modules share: a predictor that is cheap to compile and easy to foresee, and sizes."""

import dataclasses

import jax
import jax.numpy as jnp

from fgattn_jax import AttentionOutput, masks
from fgattn_jax.nn import _cached_step
from fgattn_jax.predictors import AbstractPredictor

BATCH, LENGTH, HEADS, WIDTH = 2, 40, 2, 16  # the last row of 16 queries is ragged
FEATURES = HEADS * WIDTH


@dataclasses.dataclass(frozen=True, eq=False)
class PositiveKeys(AbstractPredictor):
    """Keeps key 0 and the keys whose first channel is positive; with an LSE, it must be that of dense attention."""

    wants_lse: bool = True
    query_block: int = 16
    reverse: bool = False

    @property
    def needs_lse(self):
        return self.wants_lse

    def __call__(self, query, key, lse=None, *, scale=None):
        assert (lse is not None) == self.wants_lse
        num_queries, groups = query.shape[1], query.shape[2] // key.shape[2]
        kept = (jnp.repeat(key, groups, axis=2)[..., 0] > 0).at[:, 0].set(True)  # [B, S, N]
        rows = jnp.swapaxes(kept, 1, 2)[:, :, None]
        rows = jnp.broadcast_to(rows, (*rows.shape[:2], -(-num_queries // self.query_block), rows.shape[-1]))
        order = jnp.arange(num_queries - 1, -1, -1) if self.reverse else None
        return masks.from_rows(rows, query_block=self.query_block, num_queries=num_queries, query_order=order)


def inputs(seed=0, shape=(BATCH, LENGTH, FEATURES)):
    """Random inputs; another seed keeps other keys."""
    return jax.random.normal(jax.random.key(seed), shape)


def policy_log(policy, num_steps):
    """What `num_refreshes` and `age` are after every step, by the policy's own schedule."""
    log, made, age = [], 0, -1
    for kind in policy.schedule(num_steps):
        if kind == "refresh":
            made, age = made + 1, 0
        elif age >= 0:
            age += 1
        log.append((made, age))
    return log


PATHS = {"dense": 1.0, "cached": 2.0, "refresh": 3.0}
"""What the output is filled with after `show_paths`."""


def show_paths(monkeypatch):
    """Replaces attention by numbers that say what ran. Jit new functions after it: traces are kept."""

    def attention(query, key, value, mask=None, *, implementation=None):
        return jnp.full_like(query, PATHS["dense" if mask is None else "cached"])

    def attention_with_lse(query, key, value):
        batch, num_queries, num_heads, _ = query.shape
        return AttentionOutput(jnp.full_like(query, PATHS["refresh"]), jnp.zeros((batch, num_heads, num_queries)))

    monkeypatch.setattr(_cached_step, "attention", attention)
    monkeypatch.setattr(_cached_step, "attention_with_lse", attention_with_lse)
