"""A mask's work order on its way through the transforms: to kernels that take one, and to no other."""

import chex
import jax
import jax.numpy as jnp
import pytest

from fgattn_jax.attention import attention_with_lse
from fgattn_jax.evaluation.cases import SMALL_CASES, make_inputs
from fgattn_jax.implementations import transforms

NAMED = {case.name: case for case in SMALL_CASES}


def summed(query, key, value, bits, order, work, *, scale, query_block):
    """A kernel whose output tells which arrays it was given, per batch entry and head."""
    del key, value, scale, query_block
    batch, num_queries, heads, _ = query.shape
    lse = jnp.zeros((batch, heads, num_queries), jnp.float32)
    for x in (bits, order, work):
        if x is not None:
            lse += 10 * lse + jnp.broadcast_to(x.astype(jnp.float32).sum(range(2, x.ndim)), (batch, heads))[..., None]
    return query, lse


def backward(query, key, value, bits, order, output, lse, d_output, d_lse, *, scale, query_block):
    """Fails on any further array."""
    return query + d_output, key, value


PAIR = transforms.KernelPair(summed, backward, takes_work_order=True)


@pytest.mark.parametrize("with_work", [False, True], ids=["no_work_order", "work_order"])
@pytest.mark.parametrize("name", ["query order", "shared mask", "plain"])
def test_the_kernel_gets_the_mask_arrays_in_their_places(name, with_work):
    case = NAMED[name]
    inputs = make_inputs(case)
    mask = inputs.mask.with_work_order() if with_work else inputs.mask
    arrays = (inputs.query, inputs.key, inputs.value, mask.bits, mask.query_order, mask.work_order)

    def run(*arrays):
        return transforms.apply(PAIR, *arrays, scale=1.0, query_block=case.query_block)

    _, lse = jax.jit(run)(*arrays)
    chex.assert_trees_all_close(lse, summed(*arrays, scale=1.0, query_block=case.query_block)[1])
    d_query = jax.grad(lambda query: run(query, *arrays[1:])[0].sum())(inputs.query)
    chex.assert_trees_all_close(d_query, inputs.query + 1)


@pytest.mark.parametrize("mapped", ["mask", "query", "both"])
def test_vmap_maps_the_work_order_with_its_mask(mapped):
    case = NAMED["query order"]
    every = [make_inputs(case, seed) for seed in range(3)]
    queries = jnp.stack([i.query for i in every])
    masks = jax.tree.map(lambda *x: jnp.stack(x), *[i.mask.with_work_order() for i in every])

    def run(query, mask):
        arrays = (query, every[0].key, every[0].value, mask.bits, mask.query_order, mask.work_order)
        return transforms.apply(PAIR, *arrays, scale=1.0, query_block=case.query_block)

    one = (every[0].query, every[0].mask.with_work_order())
    in_axes = (None if mapped == "mask" else 0, None if mapped == "query" else 0)
    given = (one[0] if in_axes[0] is None else queries, one[1] if in_axes[1] is None else masks)
    got = jax.vmap(run, in_axes=in_axes)(*given)

    def take(number):
        return (
            one[0] if in_axes[0] is None else queries[number],
            one[1] if in_axes[1] is None else pick(masks, number),
        )

    def pick(tree, number):
        return jax.tree.map(lambda x: x[number], tree)

    expected = [run(*take(number)) for number in range(3)]
    chex.assert_trees_all_close(got, jax.tree.map(lambda *x: jnp.stack(x), *expected))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_other_implementations_take_such_masks_and_never_see_the_order(implementation):
    inputs = make_inputs(NAMED["plain"])
    ordered = inputs.mask.with_work_order()
    wrong = jax.tree.map(jnp.zeros_like, ordered.work_order)
    mask = jax.tree_util.tree_unflatten(jax.tree.structure(ordered), [ordered.bits, wrong])
    arrays = (inputs.query, inputs.key, inputs.value)
    expected = attention_with_lse(*arrays, inputs.mask, implementation=implementation)
    got = attention_with_lse(*arrays, mask, implementation=implementation)
    chex.assert_trees_all_equal(got, expected)
