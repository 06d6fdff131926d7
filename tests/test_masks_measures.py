"""Agreement of masks, histograms of rows, and the probability mass that a mask keeps."""

import chex
import jax
import jax.numpy as jnp
import masks_oracle as oracle
import numpy as np
import pytest

from fgattn_jax import masks

SMALL = oracle.CASES["odd lengths, smallest slices"]


def make(case, seed, density=0.3, order=None):
    rows = oracle.random_rows(case, seed, density)
    return masks.from_rows(rows, query_block=case.block, num_queries=case.queries, query_order=order), rows


def shares(mask, reference, axes):
    both = (mask & reference).sum(axes)
    return both / (mask | reference).sum(axes), both / reference.sum(axes), both / mask.sum(axes)


def test_agreement_over_all_and_per_head():
    (mask, rows), (reference, reference_rows) = make(SMALL, 0), make(SMALL, 1, density=0.5)
    result = jax.jit(masks.agreement)(mask, reference)
    chex.assert_trees_all_close(result[:3], shares(rows, reference_rows, (0, 1, 2, 3)), rtol=1e-6)
    chex.assert_trees_all_close(result[3:], shares(rows, reference_rows, (2, 3)), rtol=1e-6)
    assert result.recall != result.precision
    chex.assert_shape(result[:3], ())
    chex.assert_shape(result[3:], (2, 2))


def test_agreement_with_a_shared_reference():
    mask, rows = make(SMALL, 0)
    reference = masks.from_rows(rows[:1, :1], query_block=16, num_queries=71)
    result = masks.agreement(mask, reference)
    chex.assert_trees_all_close(result[3:], shares(rows, np.broadcast_to(rows[:1, :1], rows.shape), (2, 3)), rtol=1e-6)
    assert result.head_iou[0, 0] == 1.0


def test_a_share_of_nothing_is_one():
    mask, _ = make(SMALL, 0)
    empty = masks.empty(**SMALL.sizes)
    assert [float(share) for share in masks.agreement(empty, empty)[:3]] == [1.0, 1.0, 1.0]
    assert [float(share) for share in masks.agreement(empty, mask)[:3]] == [0.0, 0.0, 1.0]
    assert [float(share) for share in masks.agreement(mask, empty)[:3]] == [0.0, 1.0, 0.0]


def test_agreement_counts_more_slices_than_int32_holds():
    # 2**31 slices a head. Made under jit from one word each, so that no mask of that size is stored.
    sizes = {"query_block": 16, "num_queries": 2**19, "num_keys": 2**16}

    @jax.jit
    def half_of_all(word):
        half = masks.SliceMask(jnp.broadcast_to(word, (1, 1, 2**15, 2**11)), **sizes)
        return masks.agreement(half, masks.full(**sizes))

    result = half_of_all(jnp.uint32(0x55555555))
    chex.assert_trees_all_close(result[:3], (jnp.float32(0.5), jnp.float32(0.5), jnp.float32(1.0)), rtol=1e-6)


def test_agreement_refuses_masks_that_do_not_fit():
    mask, _ = make(SMALL, 0)
    with pytest.raises(ValueError, match="got num_keys=133 and 132"):
        masks.agreement(mask, masks.full(**(SMALL.sizes | {"num_keys": 132})))


@pytest.mark.parametrize("num_bins", [1, 3, 20, 133, 200])
def test_histograms_count_rows_by_share_of_kept_keys(num_bins):
    mask, rows = make(SMALL, 0)
    histogram = jax.jit(masks.row_histogram, static_argnums=1)(mask, num_bins)
    assert histogram.shape == (2, 2, num_bins)
    for place in np.ndindex(2, 2):
        bins = [min(int(count) * num_bins // 133, num_bins - 1) for count in rows[place].sum(-1)]
        np.testing.assert_array_equal(histogram[place], np.bincount(bins, minlength=num_bins))


def test_histograms_put_a_count_on_a_border_into_the_upper_bin():
    rows = np.arange(10) < np.arange(11)[:, None]
    mask = masks.from_rows(rows, query_block=16, num_queries=11 * 16)
    assert masks.row_histogram(mask, 10)[0, 0].tolist() == [1] * 9 + [2]


def test_histograms_refuse_no_bin():
    with pytest.raises(ValueError, match="`num_bins` to be at least 1, got num_bins=0"):
        masks.row_histogram(make(SMALL, 0)[0], 0)


# Probability mass.


def dense_recall(query, key, dense, scale):
    """Share of probability on kept keys [B, N, T] and LSE, float64."""
    key = np.repeat(key.astype(np.float64), query.shape[2] // key.shape[2], axis=2)
    scores = scale * np.einsum("btnh,bsnh->bnts", query.astype(np.float64), key)
    lse = np.log(np.exp(scores).sum(-1))
    return (np.exp(scores - lse[..., None]) * dense).sum(-1), lse


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        oracle.Case(2, 4, 1100, 70, 128, "own"),
        oracle.Case(1, 2, 600, 33, 64, "shared"),
        oracle.Case(1, 1, 1, 1, 16, "raster"),
    ],
    ids=["odd", "several chunks", "shared order", "one query"],
)
@pytest.mark.parametrize("given", ["lse given", "lse computed"])
def test_recall_of_mass(case, given):
    generator = np.random.default_rng(0)
    query = generator.normal(size=(case.batch, case.queries, case.heads, 8)).astype(np.float32)
    key = generator.normal(size=(case.batch, case.keys, max(1, case.heads // 2), 8)).astype(np.float32)
    order = oracle.random_order(case)
    mask, rows = make(case, 0, order=order)
    expected, lse = dense_recall(query, key, oracle.dense_of_rows(case, rows, order), 0.7)
    lse = lse.astype(np.float32) if given == "lse given" else None
    recall = jax.jit(lambda *args: masks.mass_recall(*args, scale=0.7))(mask, query, key, lse)
    assert recall.dtype == jnp.float32
    chex.assert_trees_all_close(recall, expected.astype(np.float32), atol=2e-6)


def test_recall_uses_the_usual_scale_and_shared_masks():
    generator = np.random.default_rng(0)
    query, key = (generator.normal(size=(2, 40, 3, 16)).astype(np.float32) for _ in range(2))
    rows = generator.random((3, 40)) < 0.4
    mask = masks.from_rows(rows, query_block=16, num_queries=40)
    expected, _ = dense_recall(query, key, rows.repeat(16, axis=0)[:40], 0.25)
    chex.assert_trees_all_close(masks.mass_recall(mask, query, key), expected.astype(np.float32), atol=2e-6)


def test_recall_of_full_and_empty_masks_at_large_scores():
    query = 100 * np.random.default_rng(0).normal(size=(1, 40, 1, 8)).astype(np.float32)
    sizes = {"query_block": 16, "num_queries": 40, "num_keys": 40}
    chex.assert_trees_all_close(masks.mass_recall(masks.full(**sizes), query, query), jnp.ones((1, 1, 40)), atol=1e-6)
    chex.assert_trees_all_equal(masks.mass_recall(masks.empty(**sizes), query, query), jnp.zeros((1, 1, 40)))


def test_recall_makes_no_array_of_all_scores():
    sizes = {"query_block": 128, "num_queries": 8192, "num_keys": 8192}
    shape = jax.ShapeDtypeStruct((1, 8192, 1, 16), jnp.float32)
    compiled = jax.jit(masks.mass_recall).lower(masks.full(**sizes), shape, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8192 * 8192 * 4 / 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (40, 2, 8)}, r"`query` of rank 4 \[B, T, N, H\], got shape=\(40, 2, 8\)"),
        ({"key": (50, 2, 8)}, r"`key` of rank 4 \[B, S, K, H\], got shape=\(50, 2, 8\)"),
        ({"query": (3, 41, 4, 8)}, "T=41 queries and S=50 keys, got num_queries=40 and num_keys=50"),
        ({"key": (3, 51, 2, 8)}, "T=40 queries and S=51 keys"),
        ({"key": (2, 50, 2, 8)}, r"`key` with B=3, H=8 .*got shape=\(2, 50, 2, 8\)"),
        ({"key": (3, 50, 3, 8)}, r"divides N=4, got shape=\(3, 50, 3, 8\)"),
        ({"key": (3, 50, 2, 9)}, r"H=8 .*got shape=\(3, 50, 2, 9\)"),
        ({"query": (3, 40, 6, 8)}, r"with B=3 and N=6, got shape=\(3, 4, 3, 4\)"),
        ({"lse": (3, 40, 4)}, r"`lse` of shape=\(3, 4, 40\) \[B, N, T\], got shape=\(3, 40, 4\)"),
    ],
    ids=str,
)
def test_recall_refuses_what_does_not_fit(change, message):
    shapes = {"query": (3, 40, 4, 8), "key": (3, 50, 2, 8), "lse": (3, 4, 40)} | change
    arrays = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    mask = masks.full(query_block=16, num_queries=40, num_keys=50, batch=3, num_heads=4)
    with pytest.raises(ValueError, match=message):
        masks.mass_recall(mask, **arrays)
