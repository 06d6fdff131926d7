"""Masks kept between steps, per layer and branch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgattn_jax.masks import SliceMask
from fgattn_jax.masks._bits import num_words
from fgattn_jax.predictors import MaskCache, RefreshPolicy

SIZES = {"num_layers": 3, "batch": 2, "num_heads": 4, "num_queries": 70, "num_keys": 90, "query_block": 16}
ROWS = 5  # ceil(70 / 16)
SHAPE = (3, 2, 4, ROWS, num_words(90))


def make_cache(**changes):
    return MaskCache.create(**(SIZES | {"num_branches": 2} | changes))


def make_masks(value, shape=SHAPE, **changes):
    sizes = {"query_block": 16, "num_keys": 90, "num_queries": 70} | changes
    order = sizes.pop("query_order", None)
    return SliceMask(jnp.full(shape, value, jnp.uint32), order, **sizes)


def order_of(num_queries=70, seed=0):
    return np.random.default_rng(seed).permutation(num_queries)


def test_starts_empty_and_never_made():
    cache = make_cache()
    assert cache.mask.bits.shape == (3, 2, 2, 4, ROWS, 4)
    assert not cache.mask.bits.any()
    assert cache.age.tolist() == [-1, -1]
    assert (cache.num_layers, cache.num_branches) == (3, 2)
    assert RefreshPolicy(every=100).should_refresh(7, cache.age).all()


def test_counts_its_bytes():
    bits = 3 * 2 * 2 * 4 * ROWS * 4 * 4
    assert make_cache().nbytes == bits + 2 * 4
    assert make_cache(query_order=order_of()).nbytes == bits + 2 * 4 + 70 * 4
    abstract = jax.eval_shape(make_cache)
    assert abstract.nbytes == bits + 2 * 4


def test_creating_allocates_the_bits_only():
    memory = jax.jit(make_cache).lower().compile().memory_analysis()
    assert memory.temp_size_in_bytes == 0
    assert memory.output_size_in_bytes <= make_cache().nbytes + 64  # a table of two pointers


@pytest.mark.parametrize("branch", [0, 1, np.int32(1)])
def test_update_changes_one_branch_and_its_age(branch):
    cache = make_cache().advance().update(0, make_masks(7)).advance().update(branch, make_masks(5))
    number = int(branch)
    assert (cache.branch(number).bits == 5).all()
    assert (cache.branch(1 - number).bits == (7 if number else 0)).all()
    assert cache.age.tolist() == ([1, 0] if number else [0, -1])


def test_a_traced_branch_is_updated_and_read():
    update = jax.jit(lambda cache, branch: cache.update(branch, make_masks(5)))
    cache = update(make_cache(), 1)
    assert cache.age.tolist() == [-1, 0]
    assert (jax.jit(lambda cache, branch: cache.branch(branch).bits)(cache, 1) == 5).all()
    assert not cache.branch(0).bits.any()


def test_advance_ages_only_masks_that_were_made():
    assert make_cache().update(1, make_masks(1)).advance().advance().age.tolist() == [-1, 2]


def test_a_branch_scans_over_layers():
    masks = make_masks(0)
    masks = dataclasses.replace(masks, bits=masks.bits + jnp.arange(3, dtype=jnp.uint32)[:, None, None, None, None])
    cache = make_cache(query_order=order_of()).update(
        1, dataclasses.replace(masks, query_order=jnp.asarray(order_of(), jnp.int32)[None, None, None])
    )
    _, layers = jax.lax.scan(lambda _, mask: (None, (mask.bits, mask.query_order)), None, cache.branch(1))
    np.testing.assert_array_equal(layers[0], masks.bits)
    np.testing.assert_array_equal(layers[1], np.broadcast_to(order_of(), (3, 1, 1, 70)))


def test_masks_shared_by_batch_or_heads_are_repeated():
    cache = make_cache().update(0, make_masks(9, (3, 1, 1, ROWS, 4)))
    assert cache.branch(0).bits.shape == SHAPE
    assert (cache.branch(0).bits == 9).all()


def test_carried_through_a_scan_with_conditional_refresh():
    policy = RefreshPolicy(every=3, dense_first=1)

    @jax.jit
    def run(cache):
        def step(cache, number):
            refresh = policy.should_refresh(number, cache.age[1])
            cache = jax.lax.cond(refresh, lambda cache: cache.update(1, make_masks(number)), lambda cache: cache, cache)
            return cache.advance(), (cache.age, cache.branch(1).bits.max())

        return jax.lax.scan(step, cache, jnp.arange(7))

    cache, (ages, made_at) = run(make_cache())
    assert ages[:, 1].tolist() == [-1, 0, 1, 2, 0, 1, 2]
    assert ages[:, 0].tolist() == [-1] * 7
    assert made_at.tolist() == [0, 1, 1, 1, 4, 4, 4]
    assert isinstance(cache, MaskCache)


def test_a_donated_cache_is_updated_in_place():
    update = jax.jit(lambda cache, mask: cache.update(1, mask), donate_argnums=0)
    cache = make_cache(query_order=order_of())
    order = jnp.asarray(order_of(), jnp.int32)[None, None, None]
    memory = update.lower(cache, make_masks(3, query_order=order)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache.nbytes
    assert memory.temp_size_in_bytes < cache.branch(0).nbytes
    updated = update(cache, make_masks(3, query_order=order))
    assert cache.mask.bits.is_deleted()
    assert (updated.branch(1).bits == 3).all()


def test_is_a_pytree_for_tree_map_and_vmap():
    cache = make_cache(query_order=order_of())
    leaves, structure = jax.tree.flatten(cache)
    assert [leaf.dtype for leaf in leaves] == [jnp.uint32, jnp.int32, jnp.int32]
    assert jax.tree.unflatten(structure, leaves).mask.num_keys == 90
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), cache)
    assert jax.vmap(lambda cache: cache.advance())(stacked).age.shape == (2, 2)


WRONG_SIZES = {
    "no layers": ({"num_layers": 0}, "`num_layers` >= 1, got num_layers=0"),
    "no batch": ({"batch": -2}, "`batch` >= 1, got batch=-2"),
    "half a head": ({"num_heads": 0.5}, "`num_heads` >= 1, got num_heads=0.5"),
    "no queries": ({"num_queries": 0}, "`num_queries` >= 1, got num_queries=0"),
    "no keys": ({"num_keys": 0}, "`num_keys` >= 1, got num_keys=0"),
    "no branches": ({"num_branches": 0}, "`num_branches` >= 1, got num_branches=0"),
    "blocks of 48": ({"query_block": 48}, "`query_block` to be one of .* got query_block=48"),
    "order of another length": ({"query_order": np.arange(64)}, "expected 70 queries in `query_order`.* got 64"),
    "order with repeats": ({"query_order": np.zeros(70, int)}, "each of 0 .. 69 once"),
    "order for three heads": (
        {"query_order": np.tile(np.arange(70), (1, 3, 1))},
        r"1 or heads=4, got shape=\(1, 3, 70\)",
    ),
}


@pytest.mark.parametrize("case", WRONG_SIZES)
def test_create_refuses(case):
    changes, message = WRONG_SIZES[case]
    with pytest.raises(ValueError, match=message):
        make_cache(**changes)


WRONG_MASKS = {
    "other block": (lambda: make_masks(0, (3, 2, 4, 3, 4), query_block=32), "query_block=16 .* got query_block=32"),
    "other keys": (lambda: make_masks(0, num_keys=91), "num_keys=90 .* got num_keys=91"),
    "other queries": (lambda: make_masks(0, num_queries=71), "num_queries=70 .* got num_queries=71"),
    "one layer": (lambda: make_masks(0, SHAPE[1:]), r"\[L, B, N, R, W\]=\(3, 2, 4, 5, 4\), got shape=\(2, 4, 5, 4\)"),
    "two layers": (lambda: make_masks(0, (2, *SHAPE[1:])), r"got shape=\(2, 2, 4, 5, 4\)"),
    "three heads": (lambda: make_masks(0, (3, 2, 3, ROWS, 4)), r"got shape=\(3, 2, 3, 5, 4\)"),
    "an order": (
        lambda: make_masks(0, query_order=jnp.arange(70)[None, None, None]),
        "got mask=an order and cache=no order",
    ),
}


@pytest.mark.parametrize("case", WRONG_MASKS)
def test_update_refuses(case):
    make, message = WRONG_MASKS[case]
    mask = make()
    with pytest.raises(ValueError, match=message):
        make_cache().update(0, mask)


def test_update_refuses_masks_without_the_order_of_the_cache():
    with pytest.raises(ValueError, match="got mask=no order and cache=an order"):
        make_cache(query_order=order_of()).update(0, make_masks(0))


@pytest.mark.parametrize("branch", [2, -1])
def test_refuses_a_branch_that_does_not_exist(branch):
    with pytest.raises(ValueError, match=rf"0 \.\. 1, got branch={branch}"):
        make_cache().branch(branch)
    with pytest.raises(ValueError, match=rf"0 \.\. 1, got branch={branch}"):
        make_cache().update(branch, make_masks(0))
