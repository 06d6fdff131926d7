"""The Pallas kernel is lowered on a machine that has neither a GPU nor JAX's CUDA plugin."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import export

from fgattn_jax.pallas_kernels import support

REASONS = support.version_reasons()
pytestmark = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))

B, T, S, N, K = 2, 300, 500, 4, 2


def export_for_cuda(*, head_dim: int, query_block: int, dtype: str, ordered: bool) -> export.Exported:
    from fgattn_jax.pallas_kernels.attention import forward

    num_rows, num_words = -(-T // query_block), 4 * -(-S // 128)
    keys = jax.ShapeDtypeStruct((B, S, K, head_dim), jnp.dtype(dtype))
    arguments = (
        jax.ShapeDtypeStruct((B, T, N, head_dim), jnp.dtype(dtype)),
        keys,
        keys,
        jax.ShapeDtypeStruct((B, N, num_rows, num_words), jnp.uint32),
        jax.ShapeDtypeStruct((B, N, T), jnp.int32) if ordered else None,
        jax.ShapeDtypeStruct((B, N, num_rows, 2), jnp.int32),
    )
    run = functools.partial(forward, scale=head_dim**-0.5, query_block=query_block)
    return export.export(jax.jit(run), platforms=["cuda"])(*arguments)


@pytest.mark.parametrize(
    ("head_dim", "query_block", "dtype", "ordered"),
    [(128, 128, "bfloat16", False), (64, 64, "float16", True)],
    ids=["H128-M128", "H64-M64, ordered"],
)
def test_the_kernel_is_exported_for_cuda_and_read_again(head_dim, query_block, dtype, ordered):
    written = export_for_cuda(head_dim=head_dim, query_block=query_block, dtype=dtype, ordered=ordered)
    read = export.deserialize(written.serialize())
    assert read.platforms == ("cuda",)
    output, lse = read.out_avals
    assert (output.shape, output.dtype) == ((B, T, N, head_dim), jnp.dtype(dtype))
    assert (lse.shape, lse.dtype) == ((B, N, T), jnp.float32)
    assert len(re.findall(r"custom_call @mosaic_gpu", read.mlir_module())) == 1


def test_the_exported_kernel_does_not_run_on_a_cpu():
    exported = export_for_cuda(head_dim=128, query_block=128, dtype="bfloat16", ordered=False)
    arguments = jax.tree.unflatten(exported.in_tree, [jnp.zeros(x.shape, x.dtype) for x in exported.in_avals])[0]
    with pytest.raises(ValueError, match=r"exported for platforms .*cuda.* but it is used on .*cpu"):
        exported.call(*arguments)
