"""Predictors make masks from queries and keys; a policy and a cache say how long masks are kept."""

from fgattn_jax.predictors.abstract import AbstractPredictor
from fgattn_jax.predictors.budget import Budget
from fgattn_jax.predictors.cache import MaskCache
from fgattn_jax.predictors.exact import ExactPredictor
from fgattn_jax.predictors.mean_query import MeanQueryPredictor
from fgattn_jax.predictors.one_pass import RefreshOutput, one_pass_refresh
from fgattn_jax.predictors.refresh import RefreshPolicy

__all__ = [
    "AbstractPredictor",
    "Budget",
    "ExactPredictor",
    "MaskCache",
    "MeanQueryPredictor",
    "RefreshOutput",
    "RefreshPolicy",
    "one_pass_refresh",
]
