"""The adapter of the Pallas kernel: what it checks, what it makes of a mask, and that it lowers through everything."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgattn_jax.errors import UnsupportedError
from fgattn_jax.implementations import pallas, transforms
from fgattn_jax.masks import from_rows, full
from fgattn_jax.pallas_kernels import attention as adapter
from fgattn_jax.pallas_kernels import config as configs
from fgattn_jax.pallas_kernels import support

Shape = jax.ShapeDtypeStruct
REASONS = support.version_reasons()
needs_pallas = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS) or "nothing")


def arrays(*, heads=2, kv_heads=1, num_queries=300, num_keys=500, width=128, block=128, dtype=jnp.bfloat16, front=()):
    """Shapes of a call: query, key, value, bits."""
    rows, words = -(-num_queries // block), 4 * -(-num_keys // 128)
    return [
        Shape((*front, 1, num_queries, heads, width), dtype),
        Shape((*front, 1, num_keys, kv_heads, width), dtype),
        Shape((*front, 1, num_keys, kv_heads, width), dtype),
        Shape((*front, 1, 1, rows, words), jnp.uint32),
    ]


@pytest.mark.parametrize("num_keys", [1, 31, 32, 127, 128, 129, 300, 1000])
def test_group_starts_count_the_keys_before_every_group(num_keys):
    rng = np.random.default_rng(num_keys)
    rows = rng.random((2, 3, 5, num_keys)) < 0.4
    mask = from_rows(jnp.asarray(rows), query_block=64, num_queries=5 * 64)
    stray = mask.bits | ~from_rows(jnp.ones_like(rows), query_block=64, num_queries=5 * 64).bits
    padded = np.zeros((*rows.shape[:-1], 32 * mask.bits.shape[-1]), int)
    padded[..., :num_keys] = rows
    expected = padded.reshape(*rows.shape[:-1], -1, 128).sum(-1).cumsum(-1)
    for bits in (mask.bits, stray):
        starts = jax.jit(functools.partial(adapter.group_starts, num_keys=num_keys))(bits)
        assert starts.dtype == jnp.int32
        chex.assert_trees_all_equal(starts[..., 1:], expected.astype(np.int32))
        assert not starts[..., 0].any()


def test_rows_are_ordered_as_a_mask_orders_them():
    rows = np.random.default_rng(0).random((2, 2, 40, 300)) < np.random.default_rng(1).integers(0, 4, (2, 2, 40, 1)) / 3
    mask = from_rows(jnp.asarray(rows), query_block=64, num_queries=40 * 64)
    order = adapter._order_rows(adapter.group_starts(mask.bits, num_keys=300))
    chex.assert_trees_all_equal(order, mask.with_work_order().work_order)


@needs_pallas
@pytest.mark.parametrize("pair", ["NAMED", "CHOSEN"])
@pytest.mark.parametrize("ordered", [False, True], ids=["raster", "query order"])
def test_it_lowers_for_cuda_with_gradients_under_vmap_and_alone(pair, ordered):
    order = jnp.arange(300, dtype=jnp.int32)[None, None] if ordered else None

    def call(query, key, value, bits):
        pairs = getattr(pallas, pair)
        return transforms.apply(pairs, query, key, value, bits, order, None, scale=0.1, query_block=128)

    def gradients(query, key, value, bits):
        return jax.vjp(lambda *x: call(*x, bits)[0], query, key, value)[0]

    def program(function, *shapes):
        return jax.export.export(jax.jit(function), platforms=["cuda"])(*shapes).mlir_module()

    shapes = arrays()
    assert program(call, *shapes).count("custom_call @mosaic_gpu") == 1
    assert "mosaic_gpu" in program(gradients, *shapes)
    mapped = [Shape((3, *x.shape), x.dtype) for x in shapes[:3]]
    assert program(jax.vmap(call, in_axes=(0, 0, 0, None)), *mapped, shapes[3]).count("custom_call @mosaic_gpu") == 1


@needs_pallas
def test_a_call_that_names_it_has_no_other_branch_and_a_call_that_does_not_has_xla():
    shapes = arrays()
    static = {"scale": 0.1, "query_block": 128}

    def on_cpu(pair):
        return jax.jit(lambda *x: transforms.apply(pair, *x, None, None, **static)).lower(*shapes).as_text()

    assert "mosaic_gpu" not in on_cpu(pallas.CHOSEN)
    with pytest.raises(ValueError, match="interpret mode"):
        on_cpu(pallas.NAMED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 80}, "head_dim=80"),
        ({"block": 32}, "query_block=32"),
        ({"dtype": jnp.float32}, "dtype='float32'"),
        ({"heads": 3, "kv_heads": 2}, "multiple of 2 key/value heads, got 3"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda *x: adapter.forward(*x, None, None, scale=0.1, query_block=change.get("block", 128)),
            *arrays(**change),
        )


@pytest.mark.parametrize(
    ("place", "name", "shape", "dtype"),
    [
        (1, "key", (1, 500, 1, 64), jnp.bfloat16),
        (2, "value", (1, 500, 1, 128), jnp.float16),
        (3, "bits", (1, 1, 3, 12), jnp.uint32),
        (3, "bits", (1, 1, 3, 16), jnp.int32),
        (4, "query_order", (1, 3, 300), jnp.int32),
        (5, "work_order", (1, 2, 4, 2), jnp.int32),
    ],
)
def test_arrays_that_do_not_fit_are_named(place, name, shape, dtype):
    shapes = [*arrays(), Shape((1, 1, 300), jnp.int32), Shape((1, 2, 3, 2), jnp.int32)]
    shapes[place] = Shape(shape, dtype)
    with pytest.raises(ValueError, match=f"expected `{name}`"):
        jax.eval_shape(lambda *x: adapter.forward(*x, scale=0.1, query_block=128), *shapes)


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 1e39])
def test_a_scale_that_float32_does_not_hold_is_refused(scale):
    with pytest.raises(ValueError, match=r"expected `scale` that float32 holds"):
        jax.eval_shape(lambda *x: adapter.forward(*x, None, None, scale=scale, query_block=128), *arrays())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (configs.KernelConfig(64, 3), "expected `tile_keys` of query_block=128, got tile_keys=64"),
        (configs.KernelConfig(128, 4), "shared memory, got 296961 from stages=4"),
    ],
)
def test_a_config_that_does_not_fit_the_call_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *x: adapter.forward(*x, None, None, scale=0.1, query_block=128, config=config), *arrays())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tile_keys": 96}, "tile_keys=96"),
        ({"stages": 1}, "stages=1"),
        ({"compute_registers": 209}, "compute_registers=209"),
        ({"copy_registers": 16}, "copy_registers=16"),
        ({"compute_registers": 240, "copy_registers": 48}, "got 73728 from"),
    ],
)
def test_a_config_checks_itself(values, message):
    with pytest.raises(ValueError, match=message):
        configs.KernelConfig(**({"tile_keys": 128, "stages": 3} | values))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("query_block", [64, 128])
def test_the_heuristic_fills_shared_memory_and_no_more(head_dim, query_block):
    config = configs.heuristic(head_dim=head_dim, query_block=query_block)
    sizes = {"head_dim": head_dim, "query_block": query_block}
    assert config.tile_keys == query_block
    assert config.stages >= 3
    assert config.shared_bytes(**sizes) <= configs.SHARED_BYTES
    more = configs.KernelConfig(config.tile_keys, config.stages + 1)
    assert config.stages == 6 or more.shared_bytes(**sizes) > configs.SHARED_BYTES


def test_support_says_every_reason_in_words_and_loads_no_pallas(run_python):
    code = """
import sys
from fgattn_jax.pallas_kernels.support import unsupported_reasons
print(*unsupported_reasons(head_dim=48, query_block=16, dtype="float32", platform="cpu"), sep="\\n")
print(*unsupported_reasons(head_dim=64, query_block=64, dtype="bfloat16", platform="gpu", compute_capability="8.0"))
print(any(name.startswith("jax.experimental.pallas") for name in sys.modules))
"""
    *reasons, on_ampere, loaded = run_python(code).splitlines()
    for value in ("platform='cpu'", "dtype='float32'", "head_dim=48", "query_block=16"):
        assert sum(value in reason for reason in reasons) == 1
    assert "compute_capability='8.0'" in on_ampere
    assert loaded == "False"


@pytest.mark.parametrize("version", ["0.10.2", "0.11.1", "0.9"])
def test_an_older_jax_is_a_reason(monkeypatch, version):
    monkeypatch.setattr(jax, "__version__", version)
    (reason,) = support.version_reasons()
    assert f"jax {version} is installed" in reason
    assert "0.11.2 or newer" in reason


@pytest.mark.parametrize("version", ["0.11.2", "0.12.0.1", "0.11.2.dev20260901", "1.0"])
def test_newer_ones_are_not(monkeypatch, version):
    monkeypatch.setattr(jax, "__version__", version)
    assert support.version_reasons() == ()


def test_naming_it_where_it_cannot_run_raises_with_what_would_work():
    from fgattn_jax.attention import attention

    query = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    with pytest.raises(UnsupportedError, match=r"implementation='pallas' cannot run this call.*platform='cpu'"):
        attention(query, query, query, full(num_queries=64, num_keys=64, query_block=64), implementation="pallas")
