"""`python -m benchmarks.gpu`: attention under slice masks on one GPU, this project's kernels and peers in turns."""
