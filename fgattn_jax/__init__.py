"""fgattn_jax: fine-grained sparse attention for JAX."""
