"""The two runs of `fgattn demo`: a step loop on the host, so that masks, times and progress of every step are seen.

`fgattn_jax.models.dit.sample` is the same loop as one compiled program.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fgattn_jax
from fgattn_jax.masks import SliceMask
from fgattn_jax.predictors import RefreshPolicy
from fgattn_jax.predictors.refresh import StepKind

Progress = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class DemoRun:
    """What one run gave.

    Attributes:
        video: `[F, Y, X, 3]` float32, about [-1, 1].
        kinds: What every step was.
        masks: Masks by the step that made them; their bits lead with layers, `[L, B, N, R, W]`.
        density: `[steps, L]`, share of slices that attention computed; 1 at dense and refresh steps.
        compile_seconds: Compiling the step programs that no earlier run had compiled.
        step_seconds: Wall-clock time of every step.
    """

    video: np.ndarray
    kinds: tuple[StepKind, ...]
    masks: dict[int, SliceMask]
    density: np.ndarray
    compile_seconds: float
    step_seconds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Time of all steps, without compiling."""
        return sum(self.step_seconds)

    def mask_of_step(self, step: int) -> SliceMask | None:
        """The masks that a step ran under, or made; None at dense steps."""
        if self.kinds[step] == "dense":
            return None
        return self.masks[max(made for made in self.masks if made <= step)]


class Denoiser:
    """Euler steps of a model, compiled once per kind of step.

    Args:
        model: A `DiT`.
        predictor: Makes masks at refresh steps.
        label: Class of the clip.
        guidance: Weight of classifier-free guidance; 1 runs without it, else every step runs both branches.
    """

    def __init__(self, model: Any, predictor: Any, *, label: int, guidance: float):
        self._graph, self._state = nnx.split(model)
        self._predictor, self._guidance = predictor, guidance
        labels = [label] if guidance == 1 else [label, model.config.null_label]
        self._labels = jnp.asarray(labels, jnp.int32)
        self._compiled: dict[StepKind, Any] = {}

    @property
    def branches(self) -> int:
        """Batch of a step: 1, or 2 with guidance."""
        return len(self._labels)

    def run(self, noise: jax.Array, policy: RefreshPolicy | None, *, num_steps: int, title: str) -> DemoRun:
        """Denoise `[1, F, Y, X, 3]`; a policy of None is dense at every step.

        Args:
            noise: Start of the run, unit normal.
            policy: When masks are made.
            num_steps: Euler steps.
            title: Name of the run on the progress bar.
        """
        kinds: tuple[StepKind, ...] = ("dense",) * num_steps if policy is None else policy.schedule(num_steps)
        compile_seconds = self._compile(noise, kinds, title)
        x, masks, made, seconds = noise, None, {}, []
        density = []
        with progress(title, num_steps) as advance:
            for step, kind in enumerate(kinds):
                start = time.perf_counter()
                t = jnp.asarray(1.0 - step / num_steps, jnp.float32)
                size = jnp.asarray(1.0 / num_steps, jnp.float32)
                x, new = self._compiled[kind](self._state, x, t, size, masks if kind == "cached" else None)
                jax.block_until_ready(x)
                seconds.append(time.perf_counter() - start)
                if kind == "refresh":
                    masks = made[step] = new
                layers = None if masks is None else np.asarray(jnp.mean(masks.row_density(), axis=(1, 2, 3)))
                density.append(layers if kind == "cached" else np.ones(self._num_layers))
                advance(f"{kind:<7} {density[-1].mean():.2f}")
        video = np.asarray(x[0])
        return DemoRun(video, kinds, made, np.stack(density), compile_seconds, tuple(seconds))

    @property
    def _num_layers(self) -> int:
        return nnx.merge(self._graph, self._state).config.num_layers

    def _compile(self, noise: jax.Array, kinds: tuple[StepKind, ...], title: str) -> float:
        start = time.perf_counter()
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        missing: list[StepKind] = [kind for kind in dict.fromkeys(kinds) if kind not in self._compiled]
        if missing:
            print(f"{title}: compiling {', '.join(missing)} step ...", file=sys.stderr, flush=True)
        for kind in missing:
            masks = None
            if kind == "cached":
                masks = jax.eval_shape(self._step("refresh"), self._state, noise, scalar, scalar, None)[1]
            lowered = jax.jit(self._step(kind)).lower(self._state, noise, scalar, scalar, masks)
            self._compiled[kind] = lowered.compile()
        return time.perf_counter() - start

    def _step(self, kind: StepKind) -> Callable[..., tuple[jax.Array, Any]]:
        def step(state: Any, x: jax.Array, t: jax.Array, size: jax.Array, masks: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(self._graph, state)
            both = jnp.broadcast_to(x, (self.branches, *x.shape[1:]))
            times = jnp.full((self.branches,), t, jnp.float32)
            predictor = self._predictor if kind == "refresh" else None
            velocity, predicted = model(both, times, self._labels, masks=masks, predictor=predictor)
            if self.branches == 2:
                with_label, without = velocity[:1], velocity[1:]
                velocity = without + self._guidance * (with_label - without)
            return x - size * velocity, predicted

        return step


@dataclasses.dataclass(frozen=True)
class AttentionTimes:
    """Seconds of attention of a whole run, from calls timed alone.

    Attributes:
        dense: Attention of the dense run.
        sparse: Attention of the run with masks, without making them.
        predict: Making the masks.
    """

    dense: float
    sparse: float
    predict: float


def time_attention(run: DemoRun, predictor: Any, *, config: Any, dtype: Any) -> AttentionTimes:
    """Time attention alone, on the shapes and masks of a run, and multiply by the calls of the run.

    Queries, keys and values are random: the time depends on shapes and masks, not on values.

    Args:
        run: The run with masks.
        predictor: The one of the run.
        config: The model's.
        dtype: Of queries, keys and values.
    """
    some = next(iter(run.masks.values()))
    batch, num_tokens = some.bits.shape[1], some.num_queries
    shape = (3, batch, num_tokens, config.num_heads, config.head_dim)
    query, key, value = jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)
    dense_call = jax.jit(lambda q, k, v: fgattn_jax.attention(q, k, v))
    lse_call = jax.jit(fgattn_jax.attention_with_lse)
    masked_call = jax.jit(lambda q, k, v, mask: fgattn_jax.attention(q, k, v, mask))
    predict_call = jax.jit(lambda q, k, lse: predictor(q, k, lse))

    dense = _seconds(dense_call, query, key, value)
    lse = lse_call(query, key, value).lse if predictor.needs_lse else None
    refresh = _seconds(lse_call, query, key, value) if predictor.needs_lse else dense
    predict = _seconds(predict_call, query, key, lse)

    layers = config.num_layers
    masked: dict[int, float] = {}
    for step, mask in run.masks.items():
        by_layer = [jax.tree.map(lambda leaf, n=number: leaf[n], mask) for number in range(layers)]
        masked[step] = sum(_seconds(masked_call, query, key, value, layer) for layer in by_layer)
    sparse, made = 0.0, 0
    for step, kind in enumerate(run.kinds):
        if kind == "dense":
            sparse += layers * dense
        elif kind == "refresh":
            sparse += layers * refresh
            made = step
        else:
            sparse += masked[made]
    return AttentionTimes(len(run.kinds) * layers * dense, sparse, len(run.masks) * layers * predict)


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """The faster one of two calls after a call that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Progress]:
    """A progress bar on standard error, or a line every few steps where that is no terminal.

    Args:
        title: Name of the run.
        total: Steps.

    Yields:
        A function to call after every step, with a few words on it.
    """
    if sys.stderr.isatty():
        from rich import progress as bars
        from rich.console import Console

        columns = (
            bars.TextColumn(f"{title:<6}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[note]}"),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda note: bar.update(task, advance=1, note=note)
        return

    done, start = 0, time.perf_counter()
    stride = max(1, total // 5)

    def advance(note: str) -> None:
        nonlocal done
        done += 1
        if done % stride == 0 or done == total:
            elapsed = time.perf_counter() - start
            print(f"{title}: step {done} of {total}, {note}, {elapsed:.1f} s", file=sys.stderr, flush=True)

    yield advance
