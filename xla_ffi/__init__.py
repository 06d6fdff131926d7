"""CUDA kernels behind the XLA FFI: a leaf that knows arrays and integers only.

`support` says in words which calls the kernel can run, `library` finds and registers the compiled library, `attention`
calls it. Importing any of them loads nothing.
"""
