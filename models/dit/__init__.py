"""A small video diffusion transformer that denoises with cached slice masks."""
