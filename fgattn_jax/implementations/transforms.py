"""What makes a bare kernel behave under JAX's transforms: custom_vjp > custom_vmap > custom_partitioning > kernel.

- `custom_vjp`: kernels have no derivative; the backward pass is a second kernel that starts from the saved LSE.
- `custom_vmap`: the mapped axis is folded into the batch axis; what is not mapped is only repeated if it must be.
- `custom_partitioning`: batch and heads are independent. Without the rule, `jit` over sharded heads would silently
  gather every operand on every device.
- On meshes with explicit axes the partitioner does not run; there `shard_map` does the same.

Inside, heads are `[K, G]` (key/value heads, query heads of each), so that one rule serves grouped heads too, and mask
axes of size 1 stay of size 1.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from fgattn_jax.implementations._gather import varying_axes

Kernel = Callable[..., tuple[Array, ...]]


class KernelPair(NamedTuple):
    """A forward kernel `(q, k, v, bits, order) -> (output, lse)` and the backward kernel that belongs to it.

    Both take `scale` and `query_block` as keywords; the backward kernel takes output, LSE and their cotangents after
    the forward arguments and returns the cotangents of query, key and value. With `takes_work_order`, the forward
    kernel (never the backward one) takes the mask's work order, or None, as a sixth array.
    """

    forward: Kernel
    backward: Kernel
    takes_work_order: bool = False


# Axes of each argument; the mask's batch, head and group axes may be 1. Order: factors of a sharding rule.
_QUERY, _KEY, _LSE = ("b", "t", "k", "g", "h"), ("b", "s", "k", "h"), ("b", "k", "g", "t")
_BITS, _ORDER, _WORK = ("b", "k", "g", "r", "w"), ("b", "k", "g", "t"), ("b", "k", "g", "r", "two")
_OF_MASK = (_BITS, _ORDER, _WORK)
_SHARDED = ("b", "k")


class _Signature(NamedTuple):
    """Axes of every operand and result of one kernel, and the places of its arguments that are None."""

    operands: tuple[tuple[str, ...], ...]
    results: tuple[tuple[str, ...], ...]
    missing: tuple[int, ...]


class _Given(NamedTuple):
    """Which optional arrays of the mask a call has, and whether its forward kernel takes a work order at all."""

    order: bool
    work: bool
    takes_work: bool


def _signatures(given: _Given) -> tuple[_Signature, _Signature]:
    inputs = (_QUERY, _KEY, _KEY, _BITS) + ((_ORDER,) if given.order else ())
    no_order = () if given.order else (4,)
    no_work = (5,) if given.takes_work and not given.work else ()
    forward = _Signature(inputs + ((_WORK,) if given.work else ()), (_QUERY, _LSE), no_order + no_work)
    backward = _Signature((*inputs, _QUERY, _LSE, _QUERY, _LSE), (_QUERY, _KEY, _KEY), no_order)
    return forward, backward


def _split_heads(x: Array, axes: tuple[str, ...], num_kv_heads: int) -> Array:
    """`N` -> `K, G` where the axes name both; a mask's single head becomes `1, 1`."""
    if "g" not in axes:
        return x
    at = axes.index("k")
    heads = x.shape[at]
    split = (1, 1) if heads == 1 else (num_kv_heads, heads // num_kv_heads)
    return x.reshape(*x.shape[:at], *split, *x.shape[at + 1 :])


def _join_heads(x: Array, axes: tuple[str, ...]) -> Array:
    if "g" not in axes:
        return x
    at = axes.index("k")
    return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])


def _on_joined_heads(kernel: Kernel, signature: _Signature, num_kv_heads: Callable) -> Kernel:
    """Wrap a kernel that knows `[B, T, N, H]` so that it takes and returns arrays with split heads."""

    def run(*operands):
        joined: list[Array | None] = [
            _join_heads(x, axes) for x, axes in zip(operands, signature.operands, strict=True)
        ]
        for place in signature.missing:
            joined.insert(place, None)
        results = kernel(*joined)
        heads = num_kv_heads(operands)
        return tuple(_split_heads(x, axes, heads) for x, axes in zip(results, signature.results, strict=True))

    return run


def _partitioned(kernel: Kernel, signature: _Signature, single: tuple[tuple[bool, ...], ...]) -> Kernel:
    """Tell the partitioner that batch and key/value heads are independent; `single` marks axes of size 1."""
    partitioned = custom_partitioning(kernel)
    replicated: list[str] = []

    def factors(index: int, axes: tuple[str, ...], ones: tuple[bool, ...]) -> str:
        names = [f"{axis}{index}one" if one and axis in "bkg" else axis for axis, one in zip(axes, ones, strict=True)]
        replicated.extend(n for n in names if n not in _SHARDED and n not in replicated)
        return " ".join(names)

    operands = ", ".join(
        factors(i, axes, ones) for i, (axes, ones) in enumerate(zip(signature.operands, single, strict=True))
    )
    results = ", ".join(factors(0, axes, (False,) * len(axes)) for axes in signature.results)

    def specs(all_axes, ones, batch, heads):
        place = {"b": batch, "k": heads}
        return [
            PartitionSpec(*(None if one else place.get(axis) for axis, one in zip(axes, marks, strict=True)))
            for axes, marks in zip(all_axes, ones, strict=True)
        ]

    def partition(mesh, operand_shapes, result_shapes):
        query = tuple(operand_shapes[0].sharding.spec) + (None,) * 5
        batch, heads = query[0], query[2]
        nothing = [(False,) * len(axes) for axes in signature.results]
        operands = specs(signature.operands, single, batch, heads)
        results = specs(signature.results, nothing, batch, heads)
        shard = functools.partial(NamedSharding, mesh)
        return mesh, kernel, tuple(map(shard, results)), tuple(map(shard, operands))

    partitioned.def_partition(
        partition=partition,
        sharding_rule=f"{operands} -> {results}",
        need_replication_factors=tuple(replicated),
    )
    return partitioned


def _batched(kernel: Kernel, signature: _Signature) -> Kernel:
    """Fold a mapped axis into the batch axis."""
    mapped = custom_vmap(kernel)

    @mapped.def_vmap
    def rule(size, is_batched, *operands):
        query = operands[0]
        batch = query.shape[1] if is_batched[0] else query.shape[0]

        def fold(x, has_axis, axes):
            own = x.shape[1] if has_axis else x.shape[0]
            if not has_axis and own == 1 and axes in _OF_MASK:
                return x  # serves every example as it is
            if not has_axis:
                x = jnp.broadcast_to(x[None], (size, *x.shape))
            if own == 1 < batch:
                x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
            return x.reshape(-1, *x.shape[2:])

        folded = [fold(*each) for each in zip(operands, is_batched, signature.operands, strict=True)]
        results = mapped(*folded)
        return tuple(x.reshape(size, batch, *x.shape[1:]) for x in results), (True,) * len(results)

    return mapped


@functools.lru_cache(maxsize=256)
def _core(
    pair: KernelPair, given: _Given, scale: float, query_block: int, single: tuple[tuple[bool, ...], ...]
) -> Kernel:
    """The differentiable, batchable, partitionable operation on arrays with split heads."""
    signatures = _signatures(given)
    residuals = ((False,) * 5, (False,) * 4) * 2
    num_saved = 5 if given.order else 4  # what the backward kernel takes of the operands

    def build(kernel, signature, ones):
        bound = functools.partial(kernel, scale=scale, query_block=query_block)
        on_heads = _on_joined_heads(bound, signature, lambda operands: operands[1].shape[2])
        return _batched(_partitioned(on_heads, signature, ones), signature)

    forward = build(pair.forward, signatures[0], single)
    backward = build(pair.backward, signatures[1], single[:num_saved] + residuals)

    @jax.custom_vjp
    def core(*operands):
        return forward(*operands)

    def save(*operands):
        output, lse = forward(*operands)
        return (output, lse), (operands[:num_saved], output, lse)

    def pull_back(saved, cotangents):
        operands, output, lse = saved
        d_output, d_lse = cotangents
        d_query, d_key, d_value = backward(*operands, output, lse, d_output.astype(output.dtype), d_lse)
        return d_query, d_key, d_value, *(None,) * (len(single) - 3)

    core.defvjp(save, pull_back)
    return core


def _local(pair: KernelPair, given: _Given, scale: float, query_block: int, *operands: Array) -> tuple[Array, Array]:
    forward, _ = _signatures(given)
    num_kv_heads = operands[1].shape[2]
    # Inside shard_map every operand must vary over the same axes; the transpose of this cast sums the gradients.
    axes = frozenset().union(*map(varying_axes, operands))
    operands = tuple(
        jax.lax.pcast(x, tuple(axes - varying_axes(x)), to="varying") if axes - varying_axes(x) else x for x in operands
    )
    split = [_split_heads(x, names, num_kv_heads) for x, names in zip(operands, forward.operands, strict=True)]
    single = tuple(
        tuple(names in _OF_MASK and name in "bkg" and size == 1 for name, size in zip(names, x.shape, strict=True))
        for names, x in zip(forward.operands, split, strict=True)
    )
    output, lse = _core(pair, given, scale, query_block, single)(*split)
    return _join_heads(output, _QUERY), _join_heads(lse, _LSE)


def apply(
    pair: KernelPair,
    query: Array,
    key: Array,
    value: Array,
    bits: Array,
    query_order: Array | None,
    work_order: Array | None = None,
    *,
    scale: float,
    query_block: int,
) -> tuple[Array, Array]:
    """Run a kernel pair under every transform of JAX; see the module's text.

    The work order goes to pairs that take one; for others it is nothing to compute with, and dropped.
    """
    if not pair.takes_work_order:
        work_order = None
    given = _Given(query_order is not None, work_order is not None, pair.takes_work_order)
    operands = (query, key, value, bits, *(x for x in (query_order, work_order) if x is not None))
    local = functools.partial(_local, pair, given, scale, query_block)
    mesh = jax.typeof(query).sharding.mesh
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return local(*operands)
    batch, _, heads, _ = (tuple(jax.typeof(query).sharding.spec) + (None,) * 4)[:4]
    shards = 1 if heads is None else _num_shards(mesh, heads)
    if key.shape[2] % shards:
        heads = None
    of_batch = lambda x: None if x.shape[0] == 1 else batch  # noqa: E731
    of_heads = lambda x: None if x.shape[1] == 1 else heads  # noqa: E731
    inputs = (PartitionSpec(batch, None, heads),) * 3 + tuple(
        PartitionSpec(of_batch(x), of_heads(x)) for x in operands[3:]
    )
    outputs = (PartitionSpec(batch, None, heads), PartitionSpec(batch, heads))
    operands = tuple(jax.reshard(x, spec) for x, spec in zip(operands, inputs, strict=True))
    return jax.shard_map(local, in_specs=inputs, out_specs=outputs)(*operands)


def _num_shards(mesh, axes: str | tuple[str, ...]) -> int:
    names = (axes,) if isinstance(axes, str) else axes
    size = 1
    for name in names:
        size *= mesh.shape[name]
    return size
