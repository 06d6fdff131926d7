"""What the video models share: layers, the attention seam, masks over steps, samplers, checkpoints, sharding."""
