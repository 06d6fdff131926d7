"""What the video models share: layers, the attention seam, cached masks, step tables, the sampler, checkpoints, sharding."""
