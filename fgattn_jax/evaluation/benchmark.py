"""Timing of attention and of mask making: correctness gate first, then medians with spread, as data rows.

All contestants of a case take turns in every round, so that a busy moment hits all of them; ratios between rows of
one run mean something, times of different runs do not.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgattn_jax.attention import attention, attention_with_lse, explain
from fgattn_jax.evaluation.cases import (
    CPU_BENCHMARK_CASES,
    GPU_BENCHMARK_CASES,
    AttentionCase,
    CaseInputs,
    make_inputs,
)
from fgattn_jax.evaluation.oracle import attention_oracle
from fgattn_jax.evaluation.tables import Row
from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor
from fgattn_jax.types import IMPLEMENTATIONS

BENCHES = ("attention", "gradient", "predictors")
"""Names of the benches, in the order in which they run."""

_GATE = {"float32": 5e-5, "bfloat16": 2e-2, "float16": 4e-3}
_GATE_QUERIES = 8


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one contestant: median and the 10th and 90th percentile over the rounds."""

    ms: float
    ms_p10: float
    ms_p90: float


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One program of a case.

    Args:
        name: `implementation` of the row.
        run: Compiled function without arguments; returns arrays.
        density: Share of the slices that it computes; None where that is no property of it.
    """

    name: str
    run: Callable[[], object]
    density: float | None


def default_cases() -> tuple[AttentionCase, ...]:
    """The cases for the device that JAX would use."""
    return CPU_BENCHMARK_CASES if jax.default_backend() == "cpu" else GPU_BENCHMARK_CASES


def time_rounds(contestants: Sequence[Contestant], rounds: int) -> list[Timing]:
    """Let all contestants take turns; the first round warms up and does not count.

    Raises:
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"expected at least one round, got rounds={rounds}")
    taken = np.zeros((rounds + 1, len(contestants)))
    for times in taken:
        for i, contestant in enumerate(contestants):
            start = time.perf_counter()
            jax.block_until_ready(contestant.run())
            times[i] = 1e3 * (time.perf_counter() - start)
    low, median, high = np.percentile(taken[1:], [10, 50, 90], axis=0)
    return [Timing(float(m), float(a), float(b)) for m, a, b in zip(median, low, high, strict=True)]


def gate(case: AttentionCase, inputs: CaseInputs, output) -> float:
    """Largest error of a few queries against the float64 oracle.

    Raises:
        AssertionError: The error is above the dtype's bound: such a program must not be timed.
    """
    queries = np.unique(np.linspace(0, case.num_queries - 1, _GATE_QUERIES).astype(int))
    query, key, value = (np.asarray(x.astype(jnp.float32)) for x in (inputs.query, inputs.key, inputs.value))
    expected, _ = attention_oracle(
        query,
        key,
        value,
        inputs.rows,
        query_block=case.query_block,
        scale=case.scale,
        order=inputs.order,
        queries=queries,
    )
    got = np.asarray(output.astype(jnp.float32), np.float64)
    error = float(np.abs(got[:, queries] - expected[:, queries]).max())
    assert error <= _GATE[case.dtype], (
        f"case {case.name!r}: {error=:.3g} against the oracle, allowed {_GATE[case.dtype]}"
    )
    return error


def _row(bench: str, case: AttentionCase, contestant: Contestant, timing: Timing, **more) -> Row:
    flops = 4 * case.batch * case.num_heads * case.num_queries * case.num_keys * case.head_dim
    tflops = None if contestant.density is None else flops * contestant.density / timing.ms / 1e9
    return {
        "bench": bench,
        "implementation": contestant.name,
        "case": case.name,
        "batch": case.batch,
        "heads": case.num_heads,
        "kv_heads": case.num_kv_heads,
        "queries": case.num_queries,
        "keys": case.num_keys,
        "head_dim": case.head_dim,
        "query_block": case.query_block,
        "dtype": case.dtype,
        "mask": case.mask,
        "density": contestant.density,
        "ms": round(timing.ms, 4),
        "ms_p10": round(timing.ms_p10, 4),
        "ms_p90": round(timing.ms_p90, 4),
        "tflops": tflops,
        **more,
    }


def compile_call(function, *arrays) -> Callable[[], Any]:
    """The compiled program of `function(*arrays)`, with these arrays: a function without arguments."""
    program = jax.jit(function).lower(*arrays).compile()
    return lambda: program(*arrays)


_JAX_NN_SCORES = 2**31  # `jax.nn`'s own form holds all scores: more of them do not fit a GPU


def _dense_peers(arrays) -> list[Contestant]:
    """Dense attention: `jax.nn`'s own where its scores fit, and ours without a mask (cuDNN on a GPU)."""
    query, key, _ = arrays
    peers = [Contestant("dense" if jax.default_backend() == "cpu" else "cudnn", compile_call(attention, *arrays), 1.0)]
    if query.shape[0] * query.shape[2] * query.shape[1] * key.shape[1] <= _JAX_NN_SCORES:
        peers.append(Contestant("jax_nn", compile_call(jax.nn.dot_product_attention, *arrays), 1.0))
    return peers


def bench_attention(case: AttentionCase, rounds: int) -> Iterator[Row]:
    """Forward under the case's mask, by all that can run it but `reference`, against dense attention."""
    inputs = make_inputs(case)
    arrays = (inputs.query, inputs.key, inputs.value)
    density = float(inputs.mask.density())
    contestants, errors = [], {}
    for name in IMPLEMENTATIONS:
        if name == "reference" or explain(*arrays, inputs.mask, implementation=name).implementation is None:
            continue
        masked = functools.partial(attention, implementation=name)
        contestants.append(Contestant(name, compile_call(masked, *arrays, inputs.mask), density))
        errors[name] = gate(case, inputs, contestants[-1].run())
    contestants += _dense_peers(arrays)
    for contestant, timing in zip(contestants, time_rounds(contestants, rounds), strict=True):
        yield _row("attention", case, contestant, timing, error=errors.get(contestant.name))


def bench_gradient(case: AttentionCase, rounds: int) -> Iterator[Row]:
    """Forward and backward under the case's mask against dense attention."""
    inputs = make_inputs(case)
    arrays = (inputs.query, inputs.key, inputs.value)

    def pull_back(function):
        def run(query, key, value, *mask):
            output, vjp = jax.vjp(lambda *a: function(*a, *mask), query, key, value)
            return vjp(output)

        return run

    runs = explain(*arrays, inputs.mask).implementation
    assert runs is not None, "some implementation runs every call"
    contestants = [
        Contestant(runs, compile_call(pull_back(attention), *arrays, inputs.mask), None),
        Contestant("dense", compile_call(pull_back(attention), *arrays), None),
    ]
    for contestant, timing in zip(contestants, time_rounds(contestants, rounds), strict=True):
        yield _row("gradient", case, contestant, timing)


def bench_predictors(case: AttentionCase, rounds: int) -> Iterator[Row]:
    """Mask making by every predictor against one dense attention."""
    inputs = make_inputs(case)
    query, key, value = inputs.query, inputs.key, inputs.value
    block = case.query_block
    lse = jax.jit(attention_with_lse)(query, key, value).lse
    mean, exact = functools.partial(MeanQueryPredictor, block), functools.partial(ExactPredictor, block)
    predictors = {
        "mean query, threshold": mean(),
        "mean query, top-k": mean(budget=Budget(top_k=case.num_keys // 5)),
        "mean query, top-p": mean(budget=Budget(top_p=0.9, min_keys=64)),
        "exact peak": exact(statistic="peak"),
        "exact mass 0.95": exact(statistic="mass", budget=Budget(top_p=0.95)),
    }
    contestants = [
        Contestant(
            name, compile_call(lambda *a, p=predictor: p(*a).bits, query, key, *(lse,) * predictor.needs_lse), None
        )
        for name, predictor in predictors.items()
    ]
    contestants += _dense_peers((query, key, value))
    for contestant, timing in zip(contestants, time_rounds(contestants, rounds), strict=True):
        yield _row("predictors", case, contestant, timing)


def run_benches(names: Sequence[str], cases: Sequence[AttentionCase], rounds: int) -> Iterator[Row]:
    """Rows of the named benches.

    `gradient` and `predictors` take one case each: the first of density 0.2, or else the first.

    Raises:
        ValueError: A name is unknown, or there are no cases.
    """
    if not cases:
        raise ValueError("expected at least one case, got none; see `fgattn bench --list`")
    for name in names:
        if name not in BENCHES:
            raise ValueError(f"expected benches among {', '.join(BENCHES)}, got {name!r}")
    one = next((case for case in cases if case.density == 0.2), cases[0])
    for name in names:
        if name == "attention":
            for case in cases:
                yield from bench_attention(case, rounds)
        else:
            yield from (bench_gradient if name == "gradient" else bench_predictors)(one, rounds)
