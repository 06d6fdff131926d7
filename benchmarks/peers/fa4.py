"""FlashAttention-4 (CuTe DSL) on Hopper: dense, and its sparse form of whole key blocks.

It knows no single keys, so that its sparse contestants keep random blocks of their own, as many slices as the case.
Lengths are cut to whole blocks: rows name them.
"""

import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("FLASH_ATTENTION_ARCH", "sm_90")
os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

import torch
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import _flash_attn_fwd

from benchmarks.gpu.cases import GpuCase
from benchmarks.gpu.inputs import BLOCK_KEYS, CaseFiles, lengths
from benchmarks.peers.base import Program
from benchmarks.peers.torch_side import AbstractTorchPeer, fetch_queries, load


class Fa4Peer(AbstractTorchPeer):
    """The forward pass behind `flash_attn.cute`."""

    names = ("fa4", *BLOCK_KEYS)
    packages = ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")

    def prepare(self, name: str, case: GpuCase, files: CaseFiles) -> Program:
        """See `AbstractPeer.prepare`."""
        num_queries, num_keys = lengths(case, name)
        query, key, value = self.qkv(case, files)
        query, key, value = query[None, :num_queries], key[None, :num_keys], value[None, :num_keys]
        blocks = None if name == "fa4" else _blocks(load(files, f"blocks_{name}"), num_keys, BLOCK_KEYS[name])

        def call() -> Any:
            return _flash_attn_fwd(
                query, key, value, softmax_scale=case.scale, return_lse=True, block_sparse_tensors=blocks
            )

        return Program(call, lambda arrays, queries: fetch_queries(arrays[0][0], arrays[1][0], queries))


def _blocks(kept: torch.Tensor, num_keys: int, width: int) -> Any:
    """Its lists of whole blocks, from the numbers `[N, R, kept]`; none are masked inside."""
    heads, rows, count = kept.shape
    full = torch.zeros(1, heads, rows, num_keys // width, dtype=torch.int32, device="cuda")
    full[0, :, :, :count] = kept
    counts = torch.full((1, heads, rows), count, dtype=torch.int32, device="cuda")
    return BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(full),
        full_block_cnt=counts,
        full_block_idx=full,
        block_size=(128, width),
    )


def make_peer(_: Mapping[str, Any]) -> Fa4Peer:
    """The peer of this module; it has no options."""
    return Fa4Peer()
