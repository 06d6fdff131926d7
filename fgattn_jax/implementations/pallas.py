"""The Pallas gather-load kernel with the backward pass of `xla`."""

from fgattn_jax.implementations._hopper import pairs_of
from fgattn_jax.pallas_kernels import attention

NAMED, CHOSEN = pairs_of(attention.forward)
