"""Masks of the shipped video DiT, for the cases "DiT, ...": `python -m benchmarks.gpu.dit_masks FILE`.

The model denoises half of a clip densely and makes its masks at the next step, as `fgattn demo` does; the file holds
those of all layers. Minutes on a few CPU cores, once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_STEPS, _DENSE_STEPS = 6, 3
_LABEL = 2  # carphone, as in the demo


def make_masks(path: Path, *, frames: int, query_block: int, order: str, share: float, seed: int) -> str:
    """Write the masks of all layers.

    Args:
        path: File to write, safetensors (docs/mask_format.md).
        frames: Frames of the clip: 16 give 4096 tokens, 32 give 8192.
        query_block: `M`.
        order: Query order, as `fgattn_jax.query_order.resolve` takes it; "raster" for none.
        share: Part of each row's probability mass that is kept.
        seed: Of the noise.

    Returns:
        Shapes and the density per layer, in words.
    """
    import jax
    import numpy as np

    from fgattn_jax import query_order
    from fgattn_jax.cli._demo_run import Denoiser
    from fgattn_jax.masks import save_mask
    from fgattn_jax.models.dit.weights import load_pretrained
    from fgattn_jax.predictors import Budget, ExactPredictor, RefreshPolicy

    model = load_pretrained()
    config = model.config
    grid = config.grid(frames, config.height, config.width_pixels)
    positions = None if order == "raster" else query_order.resolve(order, grid)
    predictor = ExactPredictor(query_block, positions, statistic="mass", budget=Budget(top_p=share))
    noise = jax.random.normal(jax.random.key(seed), (1, frames, config.height, config.width_pixels, 3))
    denoiser = Denoiser(model, predictor, label=_LABEL, guidance=1.0)
    run = denoiser.run(
        noise, RefreshPolicy(every=_STEPS, dense_first=_DENSE_STEPS), num_steps=_STEPS, title="masks"
    )  # fmt: skip
    mask = run.masks[min(run.masks)]
    save_mask(path, mask)
    layers = np.asarray(mask.row_density()).mean(axis=(1, 2, 3))
    return f"bits {mask.bits.shape}, density by layer: {', '.join(f'{density:.3f}' for density in layers)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file and say what it holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.dit_masks", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--frames", type=int, default=32, help="16: 4096 tokens; 32: 8192 (default: %(default)s)")
    parser.add_argument("--query-block", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--query-order", default="cubes_2x8x8", help="default: %(default)s")
    parser.add_argument("--theta", type=float, default=0.95, help="kept probability mass (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    args = parser.parse_args(argv)
    print(
        make_masks(
            args.file,
            frames=args.frames,
            query_block=args.query_block,
            order=args.query_order,
            share=args.theta,
            seed=args.seed,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
