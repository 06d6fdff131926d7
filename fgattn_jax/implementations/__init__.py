"""Implementations of masked and dense attention, and what makes them behave under JAX's transforms."""
