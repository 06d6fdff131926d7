"""How far masks of one pass are from those of two, on the shipped video DiT: `python -m benchmarks.one_pass`.

The model denoises one clip dense, with cached masks that two passes make, and with those of one pass, which measures
probabilities by the LSE of the step before (`RefreshPolicy(one_pass=True)`). At every refresh of one pass but the first
the mask is compared with the one that the own LSE of the step gives. Minutes on a few CPU cores.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROWS = Path("benchmarks/results/one_pass.json")
_LABEL = 2  # carphone, as in the demo
_QUERY_BLOCK = 64


class Run(NamedTuple):
    """One denoised clip.

    Attributes:
        video: In about [-1, 1].
        densities: Mean density of the layers at every step under masks.
        refreshes: A row for every refresh that took one pass.
    """

    video: Any
    densities: list[float]
    refreshes: list[dict[str, Any]]


class Denoiser:
    """The shipped model, its attention one step of a cached mask as the layers of `fgattn_jax.nn` take it.

    Args:
        frames: Of the clip: 16 give 4096 tokens.
        steps: Euler steps.
        seed: Of the noise.
    """

    def __init__(self, *, frames: int, steps: int, seed: int):
        import jax

        from fgattn_jax import query_order
        from fgattn_jax.models.dit.weights import load_pretrained

        self.config = load_pretrained().config
        size = (frames, self.config.height, self.config.width_pixels)
        self.steps, self.noise = steps, jax.random.normal(jax.random.key(seed), (1, *size, 3))
        self.order = query_order.resolve("cubes", self.config.grid(*size))

    @property
    def tokens(self) -> int:
        """Queries and keys."""
        return len(self.order)

    def run(self, threshold: float | None, policy: Any) -> Run:
        """Denoise the clip.

        Args:
            threshold: Probability above which a slice is kept; None is dense.
            policy: A `RefreshPolicy`; None is dense.
        """
        import jax
        import jax.numpy as jnp
        import numpy as np
        from flax import nnx

        from fgattn_jax.models.dit.weights import load_pretrained
        from fgattn_jax.predictors import Budget, ExactPredictor

        if policy is None:
            state, options = None, {}
        else:
            predictor = ExactPredictor(_QUERY_BLOCK, self.order, budget=Budget(threshold=threshold))
            state, options = self._empty(predictor, policy), {"attention": _CachedAttention(predictor, policy)}
        graph, params = nnx.split(load_pretrained(dtype=jnp.float32, **options))

        @jax.jit
        def evaluate(params, x, t, state):
            # A seam of our own hands on what it likes through `masks`.
            return tuple(nnx.merge(graph, params)(x, t, jnp.array([_LABEL]), masks=state))

        x, densities, refreshes = self.noise, [], []
        for step in range(self.steps):
            velocity, kept = evaluate(params, x, jnp.array([1.0 - step / self.steps]), state)
            x = x - velocity / self.steps
            if policy is None:
                continue
            state, facts = kept
            if int(state.age[0]) > 0:
                densities.append(float(state.mask.row_density().mean()))
            elif step > 0 and policy.one_pass:
                facts = {name: np.asarray(fact, np.float64) for name, fact in facts._asdict().items()}
                refreshes.append({"step": step} | _cells(facts))
        return Run(np.clip(np.asarray(x), -1, 1), densities, refreshes)

    def _empty(self, predictor, policy):
        import jax
        import jax.numpy as jnp

        from fgattn_jax.nn import _cached_step

        layers, heads = self.config.num_layers, self.config.num_heads
        query = jax.ShapeDtypeStruct((1, self.tokens, heads, self.config.head_dim), jnp.float32)
        mask = _cached_step.mask_structure(predictor, query, query)
        zero = jnp.zeros((), jnp.int32)
        state = _cached_step.MaskState(mask, zero, zero, zero, _cached_step.empty_lse(policy, 1, heads, self.tokens))
        return jax.tree.map(lambda leaf: jnp.zeros((layers, *leaf.shape), leaf.dtype), state)


class _Facts(NamedTuple):
    """Of one layer at a refresh: slices kept by both LSEs, by the last step's, by the step's own; change of the LSE."""

    both: Any
    by_last: Any
    by_own: Any
    lse_change: Any


class _CachedAttention:
    """Attention seam of the model: one step of a layer's `MaskState`; gives the state after it and `_Facts`."""

    def __init__(self, predictor, policy):
        self.predictor, self.policy = predictor, policy

    def __call__(self, query, key, value, mask=None, predictor=None):
        """See the class."""
        import jax
        import jax.numpy as jnp

        from fgattn_jax.nn import _cached_step

        del predictor
        assert mask is not None  # the seam's default
        settings = (self.predictor, self.policy, None)
        state: _cached_step.MaskState
        output, state = _cached_step.attend(query, key, value, mask, settings=settings, dense=False, step=None)
        nothing = _Facts(*[jnp.zeros((), jnp.float32)] * 4)
        if not self.policy.one_pass:
            return output, (state, nothing)

        def count(bits):
            return jnp.sum(jax.lax.population_count(bits).astype(jnp.float32))

        def compare():
            own, bits = self.predictor(query, key, state.lse).bits, state.mask.bits
            return _Facts(count(own & bits), count(bits), count(own), jnp.mean(jnp.abs(state.lse - mask.lse)))

        return output, (state, jax.lax.cond((state.age == 0) & (state.num_refreshes > 1), compare, lambda: nothing))


def _cells(facts: dict[str, Any]) -> dict[str, Any]:
    either = facts["by_last"] + facts["by_own"] - facts["both"]
    jaccard = facts["both"] / either
    return {
        "jaccard": round(float(facts["both"].sum() / either.sum()), 4),
        "jaccard_least": round(float(jaccard.min()), 4),
        "missing": round(float(1 - facts["both"].sum() / facts["by_own"].sum()), 4),
        "kept_by_last": int(facts["by_last"].sum()),
        "kept_by_own": int(facts["by_own"].sum()),
        "lse_change": round(float(facts["lse_change"].mean()), 4),
    }


def measure(
    *, frames: int, steps: int, seed: int, every: Sequence[int], shares: Sequence[float]
) -> list[dict[str, Any]]:
    """Rows of all runs: one for each, and one for each refresh of one pass.

    Args:
        frames: Of the clip.
        steps: Euler steps.
        seed: Of the noise.
        every: Steps between refreshes.
        shares: Thresholds, in units of one over the number of keys.
    """
    import numpy as np

    from fgattn_jax.evaluation import metrics
    from fgattn_jax.predictors import RefreshPolicy

    denoiser = Denoiser(frames=frames, steps=steps, seed=seed)
    dense = denoiser.run(None, None).video
    rows = []
    for share in shares:
        for period in every:
            setting = {
                "threshold_times_keys": share,
                "query_block": _QUERY_BLOCK,
                "order": "cubes",
                "tokens": denoiser.tokens,
                "steps": steps,
                "refresh_every": period,
                "seed": seed,
            }
            videos = {}
            for passes in (2, 1):
                run = denoiser.run(share / denoiser.tokens, RefreshPolicy(every=period, one_pass=passes == 1))
                videos[passes] = run.video
                row = {"what": "run", "passes": passes} | setting
                row["density"] = round(float(np.mean(run.densities)), 4)
                row["psnr"] = round(float(np.asarray(metrics.psnr(run.video, dense)).mean()), 2)
                rows.append(row)
                rows += [{"what": "refresh", "passes": passes} | setting | refresh for refresh in run.refreshes]
                print(row, *run.refreshes, sep="\n  ", file=sys.stderr, flush=True)
            between = round(float(np.asarray(metrics.psnr(videos[1], videos[2])).mean()), 2)
            rows[-1 - len(run.refreshes)]["psnr_to_two_passes"] = between
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as two tables: runs, then refreshes of one pass."""
    from fgattn_jax.evaluation import tables

    parts = []
    for what, names in (
        ("run", "threshold_times_keys refresh_every passes density psnr psnr_to_two_passes"),
        ("refresh", "threshold_times_keys refresh_every step jaccard jaccard_least missing lse_change"),
    ):
        header = names.split()
        parts.append(
            tables.format_text(header, [[row.get(name) for name in header] for row in rows if row["what"] == what])
        )
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_pass", description=__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--frames", type=int, default=16, help="16: 4096 tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="Euler steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--every", type=int, nargs="+", default=[5], help="steps between refreshes (default: 5)")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.5, 2.0], help="thresholds times keys (default: 0.5 2)"
    )
    parser.add_argument("--summary", action="store_true", help="measure nothing, print the tables of the rows")
    args = parser.parse_args(argv)

    from fgattn_jax.evaluation import tables

    if args.summary:
        print(summary(tables.read_rows(args.rows)))
        return 0
    words = ["python -m benchmarks.one_pass", *(sys.argv[1:] if argv is None else argv)]
    source = dict(tables.provenance(" ".join(words)))
    settings = {"frames": args.frames, "steps": args.steps, "seed": args.seed}
    rows = measure(**settings, every=args.every, shares=args.shares)
    tables.write_rows(args.rows, [row | source for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
