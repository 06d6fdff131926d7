"""Benchmarks that need other projects beside this one; `fgattn bench` measures this project alone."""
