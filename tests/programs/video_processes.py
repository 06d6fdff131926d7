"""One of two processes that make a clip together: `video_processes.py PORT NUMBER`; see test_video_sharding.py."""

import sys

import jax

port, number = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(number))

import jax.numpy as jnp  # noqa: E402 (what touches devices comes after the processes know each other)
import numpy as np  # noqa: E402
from sharded_video import ATTENTION, wan_case  # noqa: E402

from fgattn_jax.models import wan  # noqa: E402
from fgattn_jax.models.video.sampling import sample  # noqa: E402
from fgattn_jax.models.video.sharding import VideoSharding, make_mesh  # noqa: E402

model, conditions, settings = wan_case()
sharding = VideoSharding(make_mesh(), split_weights=True)
assert jax.process_count() == 2
assert sharding.num_devices == 4
assert len(jax.local_devices()) == 2
spread = wan.random(model.config, dtype=jnp.float32, seed=1, sharding=sharding.parameter)
noise = jax.random.normal(jax.random.key(0), (1, 16, 2, 8, 8))
settings |= {"steps": 3, "attention": ATTENTION["cached"]}
together = sample(spread, conditions, noise, **settings, sharding=sharding)
alone = sample(model, conditions, noise, **settings)
difference = np.abs(np.asarray(together.latents) - np.asarray(alone.latents)).max()
assert together.masks.stored.bits.addressable_shards[0].data.shape[3] == 1
print(f"process {number}: difference {difference / np.abs(np.asarray(alone.latents)).max():.1e}")
assert difference < 1e-5 * np.abs(np.asarray(alone.latents)).max()
print("same")
