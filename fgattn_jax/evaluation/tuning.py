"""Search for the fastest config of the Pallas kernel on the GPU at hand, and the data rows that keep it."""

import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fgattn_jax import masks
from fgattn_jax.attention import explain
from fgattn_jax.errors import UnsupportedError
from fgattn_jax.evaluation import benchmark, tables
from fgattn_jax.evaluation.cases import AttentionCase, CaseInputs
from fgattn_jax.pallas_kernels import attention
from fgattn_jax.pallas_kernels import config as configs

_KEY = ("device", "head_dim", "query_block")
_SOURCE = ("jax", "date", "command", "commit")
_FIELDS = (*_KEY, "config", "ms", "runner_up_ms", "shape", *_SOURCE)
_SHAPE = ("tokens", "heads", "density", "dtype", "rounds")
_ULPS = 2
"""How far outputs of two configs may be apart, in units of the last place of the largest output."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What became of one config.

    Args:
        config: The config.
        timing: Its times; None if it was left out.
        tflops: Rate of the kept slices; None if it was left out.
        reason: Why it was left out: it does not compile or run, or its output is wrong. None if it was timed.
    """

    config: configs.KernelConfig
    timing: benchmark.Timing | None = None
    tflops: float | None = None
    reason: str | None = None


def make_case(*, head_dim: int, query_block: int, tokens: int, heads: int, density: float, dtype: str) -> AttentionCase:
    """Self-attention of one clip under a random mask."""
    return AttentionCase(
        f"tuning, head_dim={head_dim}, query_block={query_block}",
        "finds the fastest config",
        num_queries=tokens,
        num_keys=tokens,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        query_block=query_block,
        dtype=dtype,
        density=density,
    )


def unsupported_reasons(case: AttentionCase) -> tuple[str, ...]:
    """Why the Pallas kernel cannot run the case on this machine, in words; nothing is computed."""
    query = jax.ShapeDtypeStruct((1, case.num_queries, case.num_heads, case.head_dim), jnp.dtype(case.dtype))
    mask = jax.eval_shape(
        lambda: masks.full(
            batch=1,
            num_heads=case.num_heads,
            num_queries=case.num_queries,
            num_keys=case.num_keys,
            query_block=case.query_block,
        )
    )
    return tuple(explain(query, query, query, mask).reasons.get("pallas", ()))


def make_inputs(case: AttentionCase, seed: int = 0) -> CaseInputs:
    """Normally distributed arrays and a mask that keeps each slice with the case's density, made on the device."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = (case.batch, case.num_queries, case.num_heads, case.head_dim)
    query, key, value = (jax.random.normal(k, shape, jnp.dtype(case.dtype)) for k in keys[:3])
    num_rows = -(-case.num_queries // case.query_block)
    rows = jax.random.bernoulli(keys[3], case.density, (case.batch, case.num_heads, num_rows, case.num_keys))
    mask = masks.from_rows(rows, query_block=case.query_block, num_queries=case.num_queries).with_work_order()
    return CaseInputs(query, key, value, mask, np.asarray(rows), None)


def time_candidates(case: AttentionCase, rounds: int) -> Iterator[Trial]:
    """Time all configs that are candidates for the case; those left out come first, as they are found.

    The first that runs must pass the benchmark's gate against the float64 oracle. The others must agree with it up to
    rounding. All that remain take turns in every round, so that drift of clocks hits all of them.
    """
    inputs = make_inputs(case)
    accepted: list[configs.KernelConfig] = []
    contestants: list[benchmark.Contestant] = []
    first = None
    density = float(inputs.mask.density())
    for config in configs.candidates(head_dim=case.head_dim, query_block=case.query_block):
        # Compilers and launches fail in many ways, and every one of them is an answer here.
        try:
            run = _compile(case, inputs, config)
            output, _ = run()
            if first is None:
                benchmark.gate(case, inputs, output)
            else:
                _compare(output, first)
        except Exception as error:
            yield Trial(config, reason=_describe(error))
            continue
        first = output if first is None else first
        accepted.append(config)
        contestants.append(benchmark.Contestant(str(config), run, density))
    if not contestants:
        return
    flops = 4 * case.batch * case.num_queries * case.num_keys * case.num_heads * case.head_dim * density
    for config, timing in zip(accepted, benchmark.time_rounds(contestants, rounds), strict=True):
        yield Trial(config, timing, flops / timing.ms / 1e9)


def _compile(
    case: AttentionCase, inputs: CaseInputs, config: configs.KernelConfig
) -> Callable[[], tuple[jax.Array, jax.Array]]:
    kernel = functools.partial(attention.forward, scale=case.scale, query_block=case.query_block, config=config)
    mask = inputs.mask
    return benchmark.compile_call(
        kernel, inputs.query, inputs.key, inputs.value, mask.bits, mask.query_order, mask.work_order
    )


def _compare(output, first) -> None:
    wide, expected = (np.asarray(x.astype(jnp.float32)) for x in (output, first))
    # In NumPy: on CPUs XLA's maximum of a large array may pass over NaN (seen with jax 0.12.0.1). NaN must fail.
    error = float(np.abs(wide - expected).max())
    allowed = _ULPS * float(jnp.finfo(first.dtype).eps) * float(np.abs(expected).max())
    assert error <= allowed, f"{error=:.3g} against the first config's output, allowed {allowed:.3g}"


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def best_row(case: AttentionCase, trials: Sequence[Trial], rounds: int, source: Mapping[str, str]) -> tables.Row:
    """The row of the heuristic's config, or of the fastest if that is faster beyond noise.

    Fastest is the lowest median. Beyond noise means that nine in ten of its rounds took less time than nine in ten of
    the heuristic's.

    Args:
        case: What was timed.
        trials: What became of the configs.
        rounds: Timed rounds.
        source: As `tables.provenance` says.

    Raises:
        UnsupportedError: No config was timed.
    """
    timed = [(trial.config, trial.timing) for trial in trials if trial.timing is not None]
    timed.sort(key=lambda pair: pair[1].ms)
    if not timed:
        raise UnsupportedError(
            f"none of the {len(trials)} configs for head_dim={case.head_dim}, query_block={case.query_block} gave "
            "right results on this machine; the lines above say why. No row was written for them"
        )
    config, timing = timed[0]
    usual = configs.heuristic(head_dim=case.head_dim, query_block=case.query_block)
    usual_timing = dict(timed).get(usual)
    if usual_timing is not None and timing.ms_p90 >= usual_timing.ms_p10:
        config, timing = usual, usual_timing
    others = [other.ms for at, other in timed if at != config]
    return {
        "device": source["device"],
        "head_dim": case.head_dim,
        "query_block": case.query_block,
        "config": dataclasses.asdict(config),
        "ms": round(timing.ms, 4),
        "runner_up_ms": round(others[0], 4) if others else None,
        "shape": {
            "tokens": case.num_queries,
            "heads": case.num_heads,
            "density": case.density,
            "dtype": case.dtype,
            "rounds": rounds,
        },
        **{name: source[name] for name in _SOURCE},
    }


def replace_row(rows: Sequence[tables.Row], row: tables.Row) -> list[tables.Row]:
    """The rows with this one in the place of the older one of its device, head width and slice height; in order."""
    kept = [old for old in rows if _key(old) != _key(row)]
    return sorted([*kept, row], key=_key)


def _key(row: tables.Row) -> tuple:
    return tuple(row[name] for name in _KEY)


def read_tuned(path: Path) -> list[tables.Row]:
    """Rows of a file like `pallas_kernels/tuned.json`; an absent file holds none.

    Raises:
        ValueError: The file is none of these, or a row is not as `fgattn tune` writes it; the message says which.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'expected tuned rows, {{"rows": [...]}}, in {path.name!r}, got: {error}') from error
    if not isinstance(content, dict) or set(content) != {"rows"} or not isinstance(content["rows"], list):
        raise ValueError(f'expected tuned rows, {{"rows": [...]}}, in {path.name!r}; got another JSON value')
    rows = content["rows"]
    for i, row in enumerate(rows):
        try:
            check_row(row)
        except ValueError as error:
            raise ValueError(f"row {i} of {path.name!r}: {error}") from error
    if len({_key(row) for row in rows}) < len(rows):
        raise ValueError(f"expected one row per device, head_dim and query_block in {path.name!r}, got more of one")
    return rows


def write_tuned(path: Path, rows: Sequence[tables.Row]) -> None:
    """Write rows for `config.choose`, one per line; the file is replaced in one move."""
    tables.write_text(path, f'{{"rows": {tables.format_rows(rows)}}}\n')
    configs.tuned_rows.cache_clear()


def check_row(row: tables.Row) -> None:
    """Check that the kernel can take a row's config, and that the row says where it comes from.

    Raises:
        ValueError: A field is missing, unknown or wrong; the message names it.
    """
    if not isinstance(row, dict) or set(row) != set(_FIELDS):
        got = sorted(row) if isinstance(row, dict) else row
        raise ValueError(f"expected the fields {', '.join(_FIELDS)}; got {got}")
    head_dim, query_block = _check_numbers(row)
    _check_config(row["config"], head_dim, query_block)
    for name in ("device", *_SOURCE):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"expected `{name}` in words, got {row[name]!r}")
    if not row["command"].startswith("fgattn tune"):
        raise ValueError(f"expected `command` to be a call of `fgattn tune`, got {row['command']!r}")
    try:
        datetime.date.fromisoformat(row["date"])
    except ValueError as error:
        raise ValueError(f"expected `date` as year-month-day, got {row['date']!r}") from error


def _check_numbers(row: tables.Row) -> tuple[int, int]:
    from fgattn_jax.pallas_kernels import support

    head_dim, query_block, shape = row["head_dim"], row["query_block"], row["shape"]
    if not isinstance(shape, dict) or set(shape) != set(_SHAPE):
        raise ValueError(f"expected `shape` with {', '.join(_SHAPE)}; got {shape!r}")
    reasons = support.argument_reasons(head_dim=head_dim, query_block=query_block, dtype=shape["dtype"])
    if reasons:
        raise ValueError("the kernel cannot run this: " + "; ".join(reasons))
    for name in ("tokens", "heads", "density", "rounds"):
        if not _is_positive(shape[name]):
            raise ValueError(f"expected a positive number for `{name}` in `shape`, got {name}={shape[name]!r}")
    for name in ("ms", "runner_up_ms"):
        if not (_is_positive(row[name]) or (name == "runner_up_ms" and row[name] is None)):
            raise ValueError(f"expected a positive number for `{name}`, got {name}={row[name]!r}")
    return head_dim, query_block


def _is_positive(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _check_config(values, head_dim: int, query_block: int) -> None:
    names = [field.name for field in dataclasses.fields(configs.KernelConfig)]
    if not isinstance(values, dict) or set(values) != set(names) or not all(type(v) is int for v in values.values()):
        raise ValueError(f"expected `config` with whole numbers for {', '.join(names)}; got {values!r}")
    config = configs.KernelConfig(**values)
    if config.tile_keys != query_block:
        raise ValueError(f"expected `tile_keys` of query_block={query_block}, got tile_keys={config.tile_keys}")
    needed = config.shared_bytes(head_dim=head_dim, query_block=query_block)
    if needed > configs.SHARED_BYTES:
        raise ValueError(
            f"expected a config that needs at most {configs.SHARED_BYTES} bytes of shared memory, got {needed} from "
            f"stages={config.stages}"
        )
