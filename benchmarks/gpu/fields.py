"""Queries and keys that are smooth over a video's tokens, so that masks made from them have densities as in models."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

_NOISE = 0.5
_REACH, _REACH_SPREAD = 0.15, 0.5
_PEAKS = (8.0, 16.0)


class Fields(NamedTuple):
    """Queries and keys.

    Attributes:
        query: `[T, N, H]`.
        key: `[S, K, H]`, `S = T`.
    """

    query: Float32[np.ndarray, "T N H"]
    key: Float32[np.ndarray, "S K H"]


def video_fields(grid: tuple[int, int, int], num_heads: int, num_kv_heads: int, head_dim: int, seed: int) -> Fields:
    """Queries that look for keys near their own place in space and time, each head in its own way.

    Cosines and sines of random frequencies give a product that falls with the distance between two places, as rotary
    embedding does; a part of independent noise makes single tokens differ from their neighbours. Heads of one group
    share the places, as they share the keys.

    Args:
        grid: Tokens per axis: (frames, height, width).
        num_heads: `N`.
        num_kv_heads: `K`, a divisor of `N`.
        head_dim: `H`, even.
        seed: Every head draws with its own number beside it.

    Note:
        With `H = 128` and `M = 128`, a mask of the exact peak above `0.5 / S` keeps between a quarter and
        two fifths of all slices at the token counts of 480p and 720p.
    """
    tokens = int(np.prod(grid))
    places = np.stack(np.unravel_index(np.arange(tokens), grid), axis=1).astype(np.float32)
    query = np.empty((tokens, num_heads, head_dim), np.float32)
    key = np.empty((tokens, num_kv_heads, head_dim), np.float32)

    def fill(group: int) -> None:
        rng = np.random.default_rng([seed, group])
        reach = _REACH * np.exp(rng.normal(0, _REACH_SPREAD, 3)) * np.array(grid)
        angles = places @ (rng.standard_normal((head_dim // 2, 3)) / reach).astype(np.float32).T  # [T, H / 2]
        waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        # Logit of a query at its own place, without the noise.
        peak = rng.uniform(*_PEAKS)
        gain = np.float32(np.sqrt(2 * peak / np.sqrt(head_dim)))

        def noisy() -> np.ndarray:
            return gain * (waves + np.float32(_NOISE) * rng.standard_normal(waves.shape, np.float32))

        key[:, group] = noisy()
        for head in range(group * num_heads // num_kv_heads, (group + 1) * num_heads // num_kv_heads):
            query[:, head] = noisy()

    _in_threads(fill, num_kv_heads)
    return Fields(query, key)


def _in_threads(fill: Callable[[int], None], number: int) -> None:
    with ThreadPoolExecutor(min(number, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(number)))
