"""Makes a clip on emulated devices and on one, and prints one JSON line; see test_video_sharding.py."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fgattn_jax.models import hunyuan_video, wan
from fgattn_jax.models.video import sampling
from fgattn_jax.models.video.attention import dense
from fgattn_jax.models.video.sampling import sample
from fgattn_jax.models.video.schedulers import FlowEuler, UniPC
from fgattn_jax.models.video.sharding import VideoSharding, make_mesh
from fgattn_jax.models.video.slice_masks import SliceMasks
from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor, RefreshPolicy

GRID = {"even": (2, 8, 8), "odd": (3, 6, 10)}  # of latents; patches halve rows and columns: 32 and 45 tokens


def wan_case():
    config = wan.WanConfig(num_layers=2, num_heads=4, head_dim=16, hidden_dim=96, text_dim=12, time_features=32)
    model = wan.random(config, dtype=jnp.float32, seed=1)
    text = jax.random.normal(jax.random.key(2), (2, 1, 7, 12))
    return model, [wan.WanCondition(each) for each in text], {"scheduler": UniPC(3.0), "guidance": 4.0}


def hunyuan_case():
    config = hunyuan_video.HunyuanVideoConfig(
        num_heads=4, head_dim=16, num_dual_layers=1, num_single_layers=2, num_refiner_layers=1, text_dim=12,
        pooled_dim=6, rope_dims=(4, 6, 6),
    )  # fmt: skip
    model = hunyuan_video.random(config, dtype=jnp.float32, seed=1)
    keys = jax.random.split(jax.random.key(2), 2)
    text, pooled = jax.random.normal(keys[0], (1, 6, 12)), jax.random.normal(keys[1], (1, 6))
    condition = hunyuan_video.HunyuanVideoCondition(text, jnp.asarray([4]), pooled, jnp.asarray([6.0]))
    return model, [condition], {"scheduler": FlowEuler(7.0)}


ATTENTION = {
    "dense": "dense",
    "cached": SliceMasks(ExactPredictor(16, budget=Budget(top_k=9)), RefreshPolicy(every=3)),
    "mean": SliceMasks(MeanQueryPredictor(16, budget=Budget(top_k=9)), RefreshPolicy(every=1)),
}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")


def forward_text(model, condition, noise, sharding) -> str:
    """One compiled dense forward."""
    graph, state = nnx.split(model)

    def forward(state, latents, timestep, condition):
        whole = nnx.merge(graph, state)
        whole.parallel = sharding
        return whole(latents, timestep, condition, attention=sharding.attention(lambda _: dense, ())).velocity

    arrays = sharding.replicate((noise, jnp.ones((1,)), condition))
    text = jax.jit(forward).lower(sharding.place_parameters(state), *arrays).compile().as_text()
    assert text is not None
    return text


def collectives(text: str) -> dict[str, int]:
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}


def linear_rows(text: str, hidden: tuple[int, ...] = (24, 64, 96, 128, 256)) -> int:
    """Most rows of a product of tokens and a kernel on one device."""
    return max(
        int(rows)
        for rows, columns in re.findall(r"= f32\[(\d+),(\d+)\]\S* (?:dot|custom-call)\(", text)
        if int(columns) in hidden
    )


def main(family: str, attention: str, divide: str, grid: str, split_weights: str) -> None:
    model, conditions, settings = {"wan": wan_case, "hunyuan": hunyuan_case}[family]()
    noise = jax.random.normal(jax.random.key(0), (1, model.config.in_channels, *GRID[grid]))
    sharding = VideoSharding(make_mesh(4), divide=divide, split_weights=split_weights == "split")
    settings |= {"steps": 4, "attention": ATTENTION[attention]}
    alone = sample(model, conditions, noise, **settings)
    together = sample(model, conditions, noise, **settings, sharding=sharding)
    before = sampling._run._cache_size()
    if (family, attention) == ("hunyuan", "cached"):  # step by step: all steps are one program
        settings["progress"] = lambda *_: None
        together = sample(model, conditions, noise, **settings, sharding=sharding)
    difference = np.abs(np.asarray(together.latents) - np.asarray(alone.latents)).max()
    masks = together.masks
    bits = None if masks is None or masks.stored is None else masks.stored.bits
    text = forward_text(model, conditions[0], noise, sharding)
    placed = sharding.place_parameters(nnx.state(model))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(placed))
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    print(
        json.dumps(
            {
                "difference": float(difference / np.abs(np.asarray(alone.latents)).max()),
                "density": float(np.abs(np.asarray(together.density) - np.asarray(alone.density)).max()),
                "own_mask_share": None if bits is None else bits.addressable_shards[0].data.nbytes / bits.nbytes,
                "own_weights_share": own / whole,
                "compilations": sampling._run._cache_size() - before,
                "collectives": collectives(text),
                "linear_rows": linear_rows(text),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
