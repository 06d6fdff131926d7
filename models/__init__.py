"""Models that call fgattn_jax: the small trained video DiT, and hosts for public weights."""
