"""Denoising steps of Wan 2.1 and HunyuanVideo with random weights: dense, cached masks, mean queries."""
