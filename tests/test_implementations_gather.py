"""Bits to key numbers, and the order of work."""

import jax.numpy as jnp
import numpy as np
import pytest

from fgattn_jax.implementations._gather import RowLayout, running_counts, schedule, select_keys
from fgattn_jax.implementations.xla_config import XlaConfig, default_config
from fgattn_jax.masks._bits import pack_rows


@pytest.mark.parametrize("num_keys", [1, 31, 32, 33, 128, 129, 700])
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_selected_keys_are_the_kept_keys_in_order(num_keys: int, density: float):
    rows = np.random.default_rng(num_keys).random((5, num_keys)) < density
    words = pack_rows(jnp.asarray(rows))
    got = np.asarray(select_keys(words, running_counts(words), jnp.arange(num_keys)))
    for row, keys in zip(rows, got, strict=True):
        expected = np.flatnonzero(row)
        np.testing.assert_array_equal(keys[: len(expected)], expected)
    assert (got >= 0).all()
    assert (got < words.shape[1] * 32).all()


def test_schedule_is_longest_first_and_names_every_row_once():
    counts = jnp.array([3, 0, 9, 9, 1, 4, 7])
    steps, slots = schedule(counts, 3)
    assert steps.tolist() == [[2, 3, 6], [5, 0, 4], [1, 7, 7]]
    assert [int(steps.reshape(-1)[s]) for s in slots] == list(range(7))


def test_layout_places_queries_where_the_order_put_them():
    layout = RowLayout(batch=1, num_queries=5, num_keys=3, num_heads=1, num_kv_heads=1, query_block=2)
    order = jnp.array([[[4, 0, 3, 1, 2]]])
    index, exists = layout.query_index(jnp.arange(3), order)
    assert index.tolist() == [[4, 0], [3, 1], [2, 2]]
    assert exists.tolist() == [[True, True], [True, True], [True, False]]
    assert layout.place(jnp.arange(3), order).tolist() == [[[1, 3, 4, 2, 0]]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_per_step": 0}, "`rows_per_step` must be at least 1, got rows_per_step=0"),
        ({"keys_per_step": -64}, "`keys_per_step` must be at least 1, got keys_per_step=-64"),
    ],
)
def test_a_config_checks_itself(changes, message):
    values = {
        "rows_per_step": 8,
        "keys_per_step": 256,
        "dense_scores_per_step": 2**20,
        "upcast": True,
    }
    with pytest.raises(ValueError, match=message):
        XlaConfig(**(values | changes))


@pytest.mark.parametrize("query_block", [16, 32, 64, 128])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_default_configs_are_valid(platform, query_block):
    assert default_config(platform, query_block).rows_per_step >= 1
