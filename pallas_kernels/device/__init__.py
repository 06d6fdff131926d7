"""What the kernels ask of the GPU below Pallas: every unstable or private touch of JAX is in this folder."""
