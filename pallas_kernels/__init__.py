"""Pallas Mosaic GPU kernels: a leaf that knows arrays and integers only.

This release ships no kernel here yet; `support.unsupported_reasons` says so in words.
"""
