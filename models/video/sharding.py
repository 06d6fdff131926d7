"""Video models over several devices: heads or tokens divided, weights kept in parts."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fgattn_jax.models._leaves import leaf_name
from fgattn_jax.models.video.attention import Attended, TextTail, VideoAttention
from fgattn_jax.models.video.slice_masks import SliceMasks

AXIS = "devices"
"""Name of the one axis of the meshes made here."""

Divide = Literal["heads", "tokens"]

# Parameters whose rows (axis -2) follow the heads or the hidden channels that a device has; see `_by_heads`.
_COLUMNS = ("q", "k", "v", "up", "mlp")
_ROWS = ("out", "down")
_SMALLEST_SPLIT = 4096
"""Parameters of fewer values stay whole: to gather them takes longer than to read them."""


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of one axis over the first `num_devices` devices of all processes; None takes all.

    Raises:
        ValueError: There are fewer devices.
    """
    devices = jax.devices()
    if num_devices is None:
        num_devices = len(devices)
    if not 1 <= num_devices <= len(devices):
        raise ValueError(f"expected 1 to {len(devices)} devices, got num_devices={num_devices}: JAX finds no more here")
    return Mesh(np.asarray(devices[:num_devices]), (AXIS,), axis_types=(AxisType.Auto,))


@dataclasses.dataclass(frozen=True)
class VideoSharding:
    """How one clip is made by several devices.

    With `divide="tokens"` (Ulysses) every device has a part of the tokens, all of the time but in attention: there an
    all-to-all gives it all tokens of some heads, and another one takes them back (if devices do not divide the number
    of tokens, what is not attention runs whole on every device). With `divide="heads"` every device
    has all tokens and a part of the heads and of the hidden channels, and sums are taken over devices after each of
    attention and feed-forward. In both, a device makes, keeps and uses the masks of its own heads only.

    Attributes:
        mesh: of one axis; `make_mesh` makes one.
        divide: "tokens" or "heads". Tokens need less communication at video lengths.
        split_weights: keep every parameter in parts, one a device, and gather those of a layer when it runs (as FSDP
            does). For `divide="tokens"`, whose weights would otherwise stand whole on every device.

    Raises:
        ValueError: The mesh has more than one axis, `divide` is another word, or `split_weights` comes with "heads".

    References:
        DeepSpeed-Ulysses (arXiv 2309.14509); Megatron-LM (arXiv 1909.08053); PyTorch FSDP (arXiv 2304.11277).
    """

    mesh: Mesh
    divide: Divide = "tokens"
    split_weights: bool = False

    def __post_init__(self):
        if not isinstance(self.mesh, Mesh) or len(self.mesh.axis_names) != 1:
            names = getattr(self.mesh, "axis_names", type(self.mesh).__name__)
            raise ValueError(f"expected a mesh of one axis, got {names}: `make_mesh()` makes one")
        if self.divide not in ("heads", "tokens"):
            raise ValueError(f"expected 'heads' or 'tokens' for `divide`, got divide={self.divide!r}")
        if self.split_weights and self.divide == "heads":
            raise ValueError(
                "`split_weights` has no effect with divide='heads', which divides the weights: leave it out"
            )

    @property
    def axis(self) -> str:
        """Name of the mesh axis."""
        return self.mesh.axis_names[0]

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.mesh.size

    def check(self, num_heads: int, attention: Any = None) -> None:
        """Refuse what cannot be divided by heads.

        Raises:
            ValueError: `num_heads` is no multiple of the number of devices; or `attention` is a `SliceMasks` that
                treats heads differently, or keeps its bits on the host.
        """
        if num_heads % self.num_devices:
            fitting = [n for n in range(1, self.num_devices + 1) if num_heads % n == 0]
            raise ValueError(
                f"expected a number of devices that divides num_heads={num_heads}, got {self.num_devices}: take "
                f"{fitting[-1]} of them, `make_mesh({fitting[-1]})`"
            )
        if not isinstance(attention, SliceMasks):
            return
        if attention.on_host:
            raise ValueError(
                "expected masks on the devices with `sharding`, got on_host=True: every device keeps those of its own "
                "heads; leave it out"
            )
        order = getattr(attention.predictor, "query_order", None)
        threshold = getattr(getattr(attention.predictor, "budget", None), "threshold", None)
        if isinstance(threshold, tuple) or (order is not None and order.ndim == 3 and order.shape[1] > 1):
            what = "thresholds" if isinstance(threshold, tuple) else "query orders"
            raise ValueError(f"expected one for all heads with `sharding`, got {what} per head: give one")

    def parameter(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where a parameter of a video model lies.

        Args:
            name: dotted, as `blocks.attn1.q.kernel`.
            shape: with its leading layer axis, if it is stacked.
        """
        if self.divide == "heads":
            spec = _by_heads(name, shape, self.num_devices, self.axis)
        elif self.split_weights:
            spec = _largest_axis(name, shape, self.num_devices, self.axis)
        else:
            spec = P()
        return NamedSharding(self.mesh, spec)

    def gather(self, parameters: Any) -> Any:
        """The parameters of one layer, whole on every device where `split_weights` keeps parts of them."""
        if not self.split_weights:
            return parameters
        whole = NamedSharding(self.mesh, P())
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, whole), parameters)

    def replicate(self, tree: Any) -> Any:
        """The arrays of `tree` on every device of the mesh."""
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def place_parameters(self, parameters: Any) -> Any:
        """The parameters of a model (`nnx.state`) where `parameter` says; those that are there already stay."""

        def put(path, leaf):
            return jax.device_put(leaf, self.parameter(leaf_name(path), leaf.shape))

        return jax.tree_util.tree_map_with_path(put, parameters)

    def place_state(self, state: Any) -> Any:
        """The state of an attention before the first step: masks divided by heads."""
        return jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, NamedSharding(self.mesh, spec)), state, self._specs(state)
        )

    def keep_whole(self, tree: Any) -> Any:
        """While tracing: arrays that are on every device."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, P()))

    def keep_divided(self, state: Any) -> Any:
        """While tracing: the state of an attention as `place_state` places it."""
        return jax.tree.map(
            lambda leaf, spec: jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec)),
            state,
            self._specs(state),
        )

    def attention(self, make: Callable[[Any], VideoAttention], numbers: Any) -> VideoAttention:
        """An attention, each device for its own heads.

        Args:
            make: gives the attention for `numbers`.
            numbers: pytree of traced scalars that it depends on.

        Raises:
            ValueError: When a model is traced: the devices do not divide its heads.

        Note:
            Of the attention's state, arrays of six axes are masks `[C, L, B, N, R, W]`; all others hold numbers over
            heads (densities), and become their means over devices.
        """

        def attend(query, key, value, state, *, layer, text) -> Attended:
            self.check(query.shape[2])
            num_tokens = query.shape[1]
            spec = P(None, self.axis) if self.divide == "tokens" else P(None, None, self.axis)
            if self.divide == "tokens":
                query, key, value = (_pad_tokens(x, self.num_devices) for x in (query, key, value))
            lengths = None if text is None else text.lengths

            def local(query, key, value, state, layer, lengths, numbers):
                if self.divide == "tokens":
                    query, key, value = (self._to_heads(x, num_tokens) for x in (query, key, value))
                tail = None if text is None else TextTail(text.num_tokens, lengths)
                output, state = make(numbers)(query, key, value, state, layer=layer, text=tail)
                state = jax.tree.map(lambda leaf: leaf if leaf.ndim == 6 else jax.lax.pmean(leaf, self.axis), state)
                return (self._to_tokens(output) if self.divide == "tokens" else output), state

            specs = self._specs(state)
            output, state = jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(spec, spec, spec, specs, P(), P(), P()),
                out_specs=(spec, specs),
                check_vma=False,
            )(query, key, value, state, layer, lengths, numbers)
            return Attended(output[:, :num_tokens], state)

        return attend

    def by_tokens(self, attention: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """Attention of video queries to a few keys, such as text: each device for its own tokens or heads."""

        def attend(query, key, value):
            num_tokens = query.shape[1]
            if self.divide == "heads":
                specs = (P(None, None, self.axis),) * 3
            else:
                query, specs = _pad_tokens(query, self.num_devices), (P(None, self.axis), P(), P())
            run = jax.shard_map(attention, mesh=self.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
            return run(query, key, value)[:, :num_tokens]

        return attend

    def _specs(self, state: Any) -> Any:
        return jax.tree.map(lambda leaf: P(None, None, None, self.axis) if leaf.ndim == 6 else P(), state)

    def _to_heads(self, x: jax.Array, num_tokens: int) -> jax.Array:
        """From `[B, T / devices, N, H]` to `[B, T, N / devices, H]`."""
        x = jax.lax.all_to_all(x, self.axis, split_axis=2, concat_axis=1, tiled=True)
        return x[:, :num_tokens]

    def _to_tokens(self, x: jax.Array) -> jax.Array:
        """The inverse of `_to_heads`."""
        return jax.lax.all_to_all(_pad_tokens(x, self.num_devices), self.axis, split_axis=1, concat_axis=2, tiled=True)


def _pad_tokens(x: jax.Array, multiple: int) -> jax.Array:
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def _by_heads(name: str, shape: tuple[int, ...], num_devices: int, axis: str) -> P:
    """Columns of what makes queries, keys, values and hidden channels; rows of what takes them back."""
    *_, layer, leaf = ("", *name.split("."))
    if layer in _COLUMNS and shape[-1] % num_devices == 0:
        return P(*[None] * (len(shape) - 1), axis)
    if layer in _ROWS and leaf == "kernel" and shape[-2] % num_devices == 0:
        return P(*[None] * (len(shape) - 2), axis, None)
    return P()


def _largest_axis(name: str, shape: tuple[int, ...], num_devices: int, axis: str) -> P:
    """The longest axis that divides, but not that of layers: a layer is gathered when it runs."""
    first = 1 if len(shape) > 2 or (len(shape) == 2 and not name.endswith("kernel")) else 0
    places = [i for i in range(first, len(shape)) if shape[i] % num_devices == 0]
    if not places or math.prod(shape) < _SMALLEST_SPLIT:
        return P()
    longest = max(places, key=lambda i: shape[i])
    return P(*[axis if i == longest else None for i in range(len(shape))])
