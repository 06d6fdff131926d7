"""Dense attention and the next exact mask in one pass over the keys, by the LSE of the step before."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from fgattn_jax import _validation
from fgattn_jax.implementations import dense
from fgattn_jax.masks import SliceMask
from fgattn_jax.predictors import _hopper, _inputs
from fgattn_jax.predictors.abstract import AbstractPredictor
from fgattn_jax.predictors.exact import PEAK_THRESHOLD, ExactPredictor


class RefreshOutput(NamedTuple):
    """Result of `one_pass_refresh`.

    Args:
        output: `[B, T, N, H]`, dense attention in the dtype of the query.
        lse: `[B, N, T]` float32, the natural logarithm of its sum of exponentials.
        mask: The slices that the predictor keeps by the LSE that was given.
    """

    output: Float[Array, "B T N H"]
    lse: Float32[Array, "B N T"]
    mask: SliceMask


def one_pass_refresh(
    predictor: AbstractPredictor,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    lse: Float32[Array, "B N T"],
    *,
    scale: float | None = None,
) -> RefreshOutput:
    r"""Dense attention, and the mask `predictor(query, key, lse)` of an LSE that was known before.

    .. math:: \mathrm{kept}(r, s) = \max_{i \in r} \exp(\mathrm{scale} \cdot q_i \cdot k_s - \mathrm{lse}_i) > \tau

    The exact mask of a step rests on that step's own LSE, which is known when all its keys have been read. With the
    LSE of the denoising step before, which changes little, a slice is decided while dense attention has its scores at
    hand: on a Hopper GPU a refresh takes one pass over the keys and not one and a half.

    Args:
        predictor: An `ExactPredictor` with `statistic="peak"` whose budget is a threshold alone (its default, or
            `threshold`; `min_keys` 0 or 1; `keep` if wanted).
        query: float32, bfloat16 or float16.
        key: The dtype of the query; `K` divides `N`.
        value: As `key`.
        lse: Natural-log LSE that stands in for that of this call. A query whose LSE is -inf counts as nothing: its row
            may keep too little, so do not hand on the -inf of a row that a mask left empty.
        scale: Factor of the scores, a Python number; None is `1 / sqrt(H)`.

    Returns:
        Output and LSE of this call's dense attention, and the mask. With the LSE of this call it is the mask of the
        predictor itself.

    Raises:
        ValueError: The predictor is another one, its budget ranks keys, or shapes and dtypes do not fit.

    Note:
        Off Hopper GPUs this runs dense attention in chunks, then the predictor, with the same results. Differentiable
        in query, key and value through output and LSE; the mask is not, nor is anything in the LSE that is given.
        Under `jit` with sharded heads or batch, wrap the call in `shard_map`, as for the predictor.

    Example:
        >>> import jax
        >>> from fgattn_jax.predictors import ExactPredictor, one_pass_refresh
        >>> q = jax.random.normal(jax.random.key(0), (1, 128, 2, 32))
        >>> predictor = ExactPredictor(64)
        >>> first = one_pass_refresh(predictor, q, q, q, jax.numpy.full((1, 2, 128), 5.0))
        >>> later = one_pass_refresh(predictor, q, q, q, first.lse)
        >>> bool((later.mask.bits == predictor(q, q, first.lse).bits).all())
        True

    References:
        FG-Attn (arXiv 2509.16518), cached masks.
    """
    check_one_pass(predictor)
    assert isinstance(predictor, ExactPredictor)
    _validation.check_arrays(query, key, value)
    if lse is None:
        raise ValueError("expected `lse` [B, N, T], got None: give that of the step before, or call the predictor")
    _inputs.check_arrays(query, key, lse)
    scale = _validation.check_scale(scale, query.shape[3])
    return _refresh(query, key, value, lse, predictor=predictor, scale=scale)


def check_one_pass(predictor: AbstractPredictor) -> None:
    """Refuse a predictor whose mask cannot be made in one pass.

    Raises:
        ValueError: It is not an exact one of peaks, or its budget is more than a threshold.
    """
    if not isinstance(predictor, ExactPredictor) or predictor.statistic != "peak":
        got = f"statistic={predictor.statistic!r}" if isinstance(predictor, ExactPredictor) else ""
        raise ValueError(
            f"expected an `ExactPredictor` with statistic='peak' for one pass, got {got or type(predictor).__name__}: "
            "other scores are not known score by score; refresh in two passes"
        )
    budget = predictor.budget.with_default(threshold=PEAK_THRESHOLD)
    if _hopper.ranks(budget):
        raise ValueError(
            f"expected a budget that is a threshold alone for one pass, got {predictor.budget}: keys are ranked when "
            "all are known; drop `top_p`, `top_k`, `max_keys`, `head_floor` and `min_keys` above 1, or refresh in two "
            "passes"
        )


# Compiled as a whole where the caller does not: an eager call would otherwise compile its parts every time.
@functools.partial(jax.jit, static_argnames=("predictor", "scale"))
def _refresh(query, key, value, lse, *, predictor: ExactPredictor, scale: float) -> RefreshOutput:
    batch, num_queries, num_heads, _ = query.shape
    num_keys = key.shape[1]
    budget = predictor.budget.with_default(threshold=PEAK_THRESHOLD / num_keys)
    budget.check_fits(num_keys, num_heads)
    order = _inputs.order_operand(predictor.query_order, batch, num_queries, num_heads)
    lse = jax.lax.stop_gradient(lse)

    def two_passes(query, key, value, lse, order):
        del order  # the predictor has its own
        output, new_lse = dense.chunked(query, key, value, scale=scale)
        mask = predictor(*jax.lax.stop_gradient((query, key)), lse, scale=scale)
        return output, new_lse, mask.bits

    kernel = _hopper.one_pass(query, key, budget, predictor.query_block, scale)
    if kernel is None:
        output, new_lse, bits = two_passes(query, key, value, lse, order)
    else:
        operands = (query, key, value, lse, order)
        branches = {"cuda": _with_gradient(kernel, scale), "default": two_passes}
        output, new_lse, bits = jax.lax.platform_dependent(*operands, **branches)
    mask = SliceMask(bits, order, query_block=predictor.query_block, num_keys=num_keys, num_queries=num_queries)
    return RefreshOutput(output, new_lse, mask)


def _with_gradient(kernel, scale: float):
    """The kernel with the backward pass of dense attention in chunks."""

    @jax.custom_vjp
    def run(query, key, value, lse, order):
        return kernel(query, key, value, lse, order)

    def forward(query, key, value, lse, order):
        return kernel(query, key, value, lse, order), (query, key, value)

    def backward(arrays, cotangents):
        _, pull = jax.vjp(functools.partial(dense.chunked, scale=scale), *arrays)
        return *pull((cotangents[0], cotangents[1])), jnp.zeros_like(cotangents[1]), None

    run.defvjp(forward, backward)
    return run
