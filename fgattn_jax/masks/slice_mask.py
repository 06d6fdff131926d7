"""The mask container: one bit per slice (`M` neighbouring queries x 1 key)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SliceMask:
    """Which keys every row (a block of `M` queries) attends to, as bits."""

    bits: UInt32[Array, "B N R W"]
    query_order: Int32[Array, "B N T"] | None = None
    query_block: int = dataclasses.field(default=128, metadata={"static": True})
    num_keys: int = dataclasses.field(default=0, metadata={"static": True})
    num_queries: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def num_rows(self) -> int:
        """Rows (query blocks) per head: `ceil(num_queries / query_block)`."""
        return -(-self.num_queries // self.query_block)

    def counts(self) -> Int32[Array, "B N R"]:
        """Kept keys of every row."""
        return jnp.sum(jax.lax.population_count(self.bits), axis=-1, dtype=jnp.int32)
