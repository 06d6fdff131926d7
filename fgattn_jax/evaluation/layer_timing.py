"""Timing of one attention layer, phase by phase: dense, dense with LSE, mask making, order of work, sparse.

Each phase is a compiled program of its own; all of them take turns in every round. Where the CUDA kernel runs, its
order of work is timed alone and the sparse call is given one, so that nothing counts twice; every other implementation
sorts inside the sparse call.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fgattn_jax import masks
from fgattn_jax.attention import attention, attention_with_lse, explain
from fgattn_jax.errors import UnsupportedError
from fgattn_jax.evaluation import benchmark, layer_inputs
from fgattn_jax.evaluation.cases import AttentionCase, CaseInputs
from fgattn_jax.evaluation.layer import (
    LayerSetup,
    PhaseTimes,
    Rule,
    break_even_uses,
    find_gain,
    make_predictor,
    resolve_order,
    step_parts,
)
from fgattn_jax.evaluation.tables import Row
from fgattn_jax.masks import SliceMask
from fgattn_jax.predictors import MaskCache, RefreshPolicy
from fgattn_jax.xla_ffi import library
from fgattn_jax.xla_ffi.attention import work_order

_GATE_HEADS = 2


class _Program(NamedTuple):
    """A compiled program and the bytes of its arguments, results and temporaries; None where JAX does not say."""

    call: jax.stages.Compiled
    nbytes: int | None

    def holds_mask_kernel(self) -> bool:
        """Whether one of the kernels that make masks is in the program."""
        text = self.call.as_text() or ""
        return any(
            name in text for name in (library.EXACT_MASK_TARGET, library.EXACT_MASS_TARGET, library.MEAN_MASK_TARGET)
        )


def _compile(function: Callable[..., Any], *arguments: Any) -> _Program:
    program = jax.jit(function).lower(*arguments).compile()
    memory = program.memory_analysis()
    if memory is None:
        return _Program(program, None)
    parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    return _Program(program, int(sum(parts) - memory.alias_size_in_bytes))


class _Candidate(NamedTuple):
    """A predictor on inputs that give its masks one density, and what runs on them."""

    name: str
    rule: Rule
    target: float | None
    gain: float
    density: float
    error: float
    needs_lse: bool
    making: _Program
    ordering: _Program | None
    sparse: _Program
    runs: tuple[benchmark.Contestant, ...]


@jax.jit
def _scale(query, gain):
    return (query.astype(jnp.float32) * gain).astype(query.dtype)


@jax.jit
def _density(mask: SliceMask):
    return mask.density()


def check(setup: LayerSetup) -> str:
    """Name of the implementation that runs under masks; nothing is computed.

    Raises:
        ValueError: Sizes, rule or order do not fit each other.
        UnsupportedError: The implementation that is asked for cannot run the layer here.
    """
    shape = setup.shape
    array = jax.ShapeDtypeStruct((1, shape.num_tokens, setup.heads, shape.head_dim), jnp.dtype(setup.dtype))
    predictor = None
    for name in setup.predictors:
        predictor, _ = make_predictor(name, setup)
    assert predictor is not None, "at least one predictor"
    mask = jax.eval_shape(predictor, array, array)
    explanation = explain(array, array, array, mask, implementation=setup.implementation)
    if explanation.implementation is None:
        why = "; ".join(explanation.reasons[setup.implementation or ""])
        raise UnsupportedError(f"`--implementation` {setup.implementation} cannot run this layer here: {why}")
    return explanation.implementation


def measure(setup: LayerSetup, report: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Rows of the setup, one per predictor and density; without where they come from.

    Attention, dense and sparse, is compared with the float64 oracle on a few queries of two heads before it is timed.

    Args:
        setup: What to measure.
        report: Takes a line of progress.

    Raises:
        ValueError: See `check` and `find_gain`.
        UnsupportedError: See `check`.
        AssertionError: A program gives wrong results.
    """
    name = check(setup)
    shape = setup.shape
    report(f"{shape.title}: {_sizes(setup)}; masks run on {name}")
    query, key, value = layer_inputs.make_inputs(shape, num_heads=setup.heads, dtype=setup.dtype)
    dense = _compile(attention, query, key, value)
    needs_lse = any(make_predictor(each, setup)[0].needs_lse for each in setup.predictors)
    lse = _compile(attention_with_lse, query, key, value) if needs_lse else None
    common = [benchmark.Contestant("dense", lambda: dense.call(query, key, value), None)]
    if lse is not None:
        common.append(benchmark.Contestant("lse", lambda: lse.call(query, key, value), None))
    tokens = shape.num_tokens
    everything = masks.full(num_queries=tokens, num_keys=tokens, query_block=setup.query_block)
    for program in (dense, lse):
        if program is not None:
            output = program.call(query, key, value)
            _gate(setup, (query, key, value), everything, output if program is dense else output.output)
    peer = _cudnn_peer(query, key, value, report)
    if peer is not None:
        common.append(benchmark.Contestant("jax_nn_cudnn", peer, None))

    candidates: list[_Candidate] = []
    sparse = None
    for each in setup.predictors:
        predictor, rule = make_predictor(each, setup)
        making = None
        targets = (None,) if rule.kind == "top_k" or not setup.densities else setup.densities
        for target in targets:
            report(f"  {each} ({rule}): " + ("mask" if target is None else f"searching inputs of density {target:g}"))
            prepared = _prepare(setup, each, predictor, rule, target, (query, key, value), lse, making, sparse, name)
            making, sparse = prepared.making, prepared.sparse
            candidates.append(prepared)
            report(
                f"    density {prepared.density:.3f} at scores x {prepared.gain:.3g}, largest error "
                f"{prepared.error:.1e}"
            )
    contestants = [*common, *(run for candidate in candidates for run in candidate.runs)]
    report(f"  timing {len(contestants)} programs, {setup.rounds} rounds")
    timings = iter(benchmark.time_rounds(contestants, setup.rounds))
    shared = {contestant.name: next(timings) for contestant in common}
    rows = []
    for candidate in candidates:
        own = {contestant.name: next(timings) for contestant in candidate.runs}
        rows.append(_row(setup, candidate, name, {**shared, **own}, dense, lse if candidate.needs_lse else None))
    stats = jax.local_devices()[0].memory_stats()
    peak = None if stats is None else stats.get("peak_bytes_in_use")
    return [{**row, "device_peak_bytes": peak} for row in rows]


def _prepare(setup, name, predictor, rule, target, arrays, lse, making, sparse, implementation) -> _Candidate:
    """Search the inputs, make the mask, compile what is missing, compare with the oracle."""
    query, key, value = arrays

    def operands_of(scaled):
        return (scaled, key, lse.call(scaled, key, value).lse) if predictor.needs_lse else (scaled, key)

    if making is None:
        making = _compile(lambda *operands: predictor(*operands), *operands_of(query))

    def density_of(gain: float) -> float:
        return float(_density(making.call(*operands_of(_scale(query, gain)))))

    gain, density = (1.0, density_of(1.0)) if target is None else find_gain(density_of, target)
    query = _scale(query, gain)
    operands = operands_of(query)
    mask = making.call(*operands)
    runs = [benchmark.Contestant("mask", lambda: making.call(*operands), None)]
    ordering = None
    if implementation == "cuda":
        ordering = _compile(functools.partial(work_order, num_keys=mask.num_keys), mask.bits)
        bits = mask.bits
        runs.append(benchmark.Contestant("order", lambda: ordering.call(bits), None))
        mask = dataclasses.replace(mask, work_order=ordering.call(bits))
    if sparse is None:
        masked = functools.partial(attention, implementation=setup.implementation)
        sparse = _compile(masked, query, key, value, mask)
    runs.append(benchmark.Contestant("sparse", lambda: sparse.call(query, key, value, mask), density))
    error = _gate(setup, (query, key, value), mask, sparse.call(query, key, value, mask))
    return _Candidate(
        name, rule, target, gain, density, error, predictor.needs_lse, making, ordering, sparse, tuple(runs)
    )


def _gate(setup: LayerSetup, arrays, mask: SliceMask, output) -> float:
    """Largest error of a few queries of the first heads against the oracle; see `benchmark.gate`."""
    heads = min(_GATE_HEADS, setup.heads)
    some = SliceMask(
        mask.bits[:, :heads],
        mask.query_order,
        query_block=mask.query_block,
        num_keys=mask.num_keys,
        num_queries=mask.num_queries,
    )
    order = None if mask.query_order is None else np.asarray(mask.query_order)
    query, key, value = (x[:, :, :heads] for x in arrays)
    case = AttentionCase(
        setup.shape.title,
        "a layer of a model",
        num_queries=mask.num_queries,
        num_keys=mask.num_keys,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=setup.shape.head_dim,
        query_block=mask.query_block,
        dtype=setup.dtype,
    )
    inputs = CaseInputs(query, key, value, some, np.asarray(some.to_rows()), order)
    return benchmark.gate(case, inputs, output[:, :, :heads])


def _cudnn_peer(query, key, value, report: Callable[[str], None]) -> Callable[[], Any] | None:
    """`jax.nn`'s own call of cuDNN, for comparison; None off GPUs and where it does not run, with the reason said."""
    if jax.default_backend() != "gpu":
        return None
    cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        run = benchmark.compile_call(cudnn, query, key, value)
        jax.block_until_ready(run())
    except Exception as error:  # whatever cuDNN does not take is an answer here
        report(f"  jax.nn with cuDNN does not run: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
        return None
    return run


def _sizes(setup: LayerSetup) -> str:
    shape = setup.shape
    heads = f"{setup.heads} heads" if setup.heads == shape.num_heads else f"{setup.heads} of {shape.num_heads} heads"
    return f"{shape.num_tokens} tokens, {heads} of width {shape.head_dim}, {setup.dtype}, M={setup.query_block}"


def _cache_bytes(setup: LayerSetup, layers: int, branches: int) -> int:
    """Bytes of the masks of all heads that the cache holds, with the query order."""
    create = functools.partial(
        MaskCache.create,
        num_layers=layers,
        batch=1,
        num_heads=setup.shape.num_heads,
        num_queries=setup.shape.num_tokens,
        num_keys=setup.shape.num_tokens,
        query_block=setup.query_block,
        num_branches=branches,
        query_order=resolve_order(setup),
    )
    return jax.eval_shape(create).nbytes


def _row(
    setup: LayerSetup,
    candidate: _Candidate,
    implementation: str,
    timings: dict[str, benchmark.Timing],
    dense: _Program,
    lse: _Program | None,
) -> Row:
    shape = setup.shape
    nothing = benchmark.Timing(0.0, 0.0, 0.0)
    used = {name: timings.get(name, nothing) for name in ("dense", "lse", "mask", "order", "sparse")}
    times = PhaseTimes(
        dense=used["dense"].ms,
        lse=None if lse is None else used["lse"].ms,
        mask=used["mask"].ms,
        order=used["order"].ms,
        sparse=used["sparse"].ms,
    )
    kinds = RefreshPolicy(every=setup.refresh_every).schedule(setup.steps)
    parts = step_parts(times, kinds)
    step_ms = sum(parts)
    # Heads are independent and fill the device alike, layers and branches follow each other.
    whole = shape.num_heads / setup.heads * shape.num_layers * shape.num_branches
    order = candidate.ordering
    uses = break_even_uses(times)
    spreads = {
        f"{name}_{cell}": round(getattr(timing, cell), 4)
        for name, timing in used.items()
        if (name != "lse" or lse is not None) and (name != "order" or order is not None)
        for cell in ("ms", "ms_p10", "ms_p90")
    }
    peer = timings.get("jax_nn_cudnn")
    return {
        "bench": "layer",
        "implementation": implementation,
        "model": shape.name,
        "case": shape.title,
        "grid": "x".join(map(str, shape.grid)),
        "text_tokens": shape.text_tokens,
        "queries": shape.num_tokens,
        "keys": shape.num_tokens,
        "heads": shape.num_heads,
        "heads_measured": setup.heads,
        "head_dim": shape.head_dim,
        "layers": shape.num_layers,
        "branches": shape.num_branches,
        "dtype": setup.dtype,
        "query_block": setup.query_block,
        "query_order": setup.query_order,
        "predictor": candidate.name,
        "rule": str(candidate.rule),
        "target_density": candidate.target,
        "density": candidate.density,
        "gain": candidate.gain,
        "error": candidate.error,
        "steps": setup.steps,
        "refresh_every": setup.refresh_every,
        "refreshes": kinds.count("refresh"),
        "mask_made": "a CUDA kernel" if candidate.making.holds_mask_kernel() else "XLA",
        "order_made": "work order kernel" if order is not None else "inside the sparse call",
        **spreads,
        "jax_nn_cudnn_ms": None if peer is None else round(peer.ms, 4),
        **{f"step_{name}_ms": round(value, 4) for name, value in parts._asdict().items()},
        "step_ms": round(step_ms, 4),
        "speed": times.dense / step_ms,
        "model_dense_ms": round(times.dense * whole, 4),
        "model_step_ms": round(step_ms * whole, 4),
        "making_ms": round(times.making, 4),
        "break_even_uses": None if uses is None else round(uses, 3),
        "dense_bytes": dense.nbytes,
        "lse_bytes": None if lse is None else lse.nbytes,
        "mask_bytes": candidate.making.nbytes,
        "order_bytes": None if order is None else order.nbytes,
        "sparse_bytes": candidate.sparse.nbytes,
        "cached_layer_bytes": _cache_bytes(setup, 1, 1),
        "cached_model_bytes": _cache_bytes(setup, shape.num_layers, shape.num_branches),
    }
