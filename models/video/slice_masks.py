"""Slice masks over denoising steps: bits of all branches and layers in one buffer, written at refresh steps."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, UInt32

from fgattn_jax import _validation
from fgattn_jax.attention import attention, attention_with_lse
from fgattn_jax.masks import SliceMask
from fgattn_jax.models.video.attention import Attended, TextTail, VideoAttention, dense, valid_keys
from fgattn_jax.models.video.joint_mask import join_text
from fgattn_jax.predictors import AbstractPredictor, RefreshPolicy
from fgattn_jax.predictors.refresh import StepKind
from fgattn_jax.types import Implementation

KINDS: tuple[StepKind, ...] = ("dense", "refresh", "cached")


class StoredMasks(NamedTuple):
    """Masks of `C` guidance branches (1 where they share them) and `L` layers; zeros where none was made yet.

    Attributes:
        bits: those of a `SliceMask`, of the joint mask in a joint attention. In host memory with `on_host`.
        work_order: of the same masks: see `SliceMask.with_work_order`.
        density: share of slices that they keep.
    """

    bits: UInt32[Array, "C L B N R W"]
    work_order: Int32[Array, "C L B N R 2"]
    density: Float32[Array, "C L"]


class VideoMaskState(NamedTuple):
    """What `SliceMasks` threads through layers, branches and steps.

    Attributes:
        stored: the masks, or None where every call uses those it makes.
        computed: share of slices that each branch and layer computed when it was last called; 1 where it ran dense.
    """

    stored: StoredMasks | None
    computed: Float32[Array, "branches L"]


class Call(NamedTuple):
    """What a model asks of its attention, without values.

    Attributes:
        query: `[B, T, N, H]`.
        key: `[B, T, N, H]`.
        num_text: text tokens at the end of `T`, or None in a model without joint attention.
    """

    query: jax.ShapeDtypeStruct
    key: jax.ShapeDtypeStruct
    num_text: int | None


@dataclasses.dataclass(frozen=True)
class SliceMasks:
    """Sparse attention of a video model over denoising steps: who makes masks, when, and where they are kept.

    At a refresh step an exact predictor makes masks beside dense attention, from its LSE; a predictor that needs no
    LSE makes them first, and the same step attends under them. `MeanQueryPredictor` with `RefreshPolicy(every=1)` is
    the paper's pooled method, and keeps no masks at all.

    In a joint attention (HunyuanVideo) masks say which video keys video queries see; valid text keys are always kept,
    and text queries see all valid keys. Padded text is never attended.

    Attributes:
        predictor: makes the masks, from video queries and keys alone. Its query order is over video tokens.
        refresh: when they are made, and which steps and layers are dense.
        shared_branches: one set of masks for both branches of guidance, made by the conditional one. The other
            attends under it at refresh steps too.
        on_host: keep the bits in pinned host memory: those of one layer at a time are on the device, copied there
            before the layer and back behind it at every step, whatever its kind.
        implementation: runs attention with masks, as in `fgattn_jax.attention`.

    Raises:
        ValueError: An attribute is of another kind, or `refresh` asks for one pass, which needs the LSE of every layer
            kept.
    """

    predictor: AbstractPredictor
    refresh: RefreshPolicy = dataclasses.field(default_factory=RefreshPolicy)
    shared_branches: bool = False
    on_host: bool = False
    implementation: Implementation | None = None

    def __post_init__(self):
        if not isinstance(self.predictor, AbstractPredictor):
            raise ValueError(
                f"expected an `AbstractPredictor` for `predictor`, got {type(self.predictor).__name__}: give for "
                "instance fgattn_jax.predictors.ExactPredictor(128)"
            )
        if not isinstance(self.refresh, RefreshPolicy):
            raise ValueError(
                f"expected a `RefreshPolicy` for `refresh`, got {type(self.refresh).__name__}: write "
                "RefreshPolicy(every=...)"
            )
        if self.refresh.one_pass:
            raise ValueError(
                "expected a `refresh` in two passes, got one_pass=True: video models keep no LSE between steps; leave "
                "it out"
            )
        for name in ("shared_branches", "on_host"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"expected True or False for `{name}`, got {name}={getattr(self, name)!r}")
        _validation.check_implementation(self.implementation)

    def kinds(self, steps: int, num_layers: int, num_branches: int) -> tuple[StepKind, ...]:
        """What attention does at any layer of a run: those of `"dense"`, `"refresh"` and `"cached"` that occur."""
        used = set(self.refresh.schedule(steps))
        flags = self.refresh.dense_layer_flags(num_layers)
        if flags.all():
            return ("dense",)
        if flags.any():
            used.add("dense")
        if self.shared_branches and num_branches > 1 and "refresh" in used:
            used.add("cached")
        return tuple(kind for kind in KINDS if kind in used)

    def start(self, call: Call, *, kinds: tuple[StepKind, ...], num_layers: int, num_branches: int) -> VideoMaskState:
        """The state before the first step: room for the masks, if any attention reads those of another call.

        Args:
            call: what the model asks of its attention.
            kinds: what `kinds` gave for this run.
            num_layers: attentions of one forward.
            num_branches: branches of guidance.

        Raises:
            ValueError: The predictor does not fit the call, or orders queries by what it sees.
        """
        stored = 1 if self.shared_branches else num_branches
        computed = jnp.ones((num_branches, num_layers), jnp.float32)
        if "cached" not in kinds:
            return VideoMaskState(None, computed)
        mask = self._structure(call)
        shape = (stored, num_layers, *mask.bits.shape)
        # On the host from the start: the device may have no room for it even once.
        bits = _zeros_on_host(shape) if self.on_host else jnp.zeros(shape, jnp.uint32)
        work_order = jnp.zeros((*shape[:-1], 2), jnp.int32)
        return VideoMaskState(StoredMasks(bits, work_order, jnp.zeros(shape[:2], jnp.float32)), computed)

    def attention(
        self, kind: Int[Array, ""], branch: Int[Array, ""], *, kinds: tuple[StepKind, ...], num_layers: int
    ) -> VideoAttention:
        """What the model calls in one forward; its state is a `VideoMaskState`.

        Args:
            kind: of this step, a traced index into `kinds`.
            branch: of guidance, traced; 0 is the conditional one.
            kinds: what `kinds` gave for this run.
            num_layers: attentions of one forward.
        """
        flags = self.refresh.dense_layer_flags(num_layers)

        def attend(query, key, value, state: VideoMaskState, *, layer, text) -> Attended:
            now = jnp.asarray(kind)
            if self.shared_branches and "refresh" in kinds and "cached" in kinds:
                borrows = (branch > 0) & (now == kinds.index("refresh"))
                now = jnp.where(borrows, kinds.index("cached"), now)
            if "dense" in kinds and flags.any():
                now = jnp.where(jnp.asarray(flags)[layer], kinds.index("dense"), now)
            place = (jnp.zeros_like(branch) if self.shared_branches else branch, layer)
            call = _AttentionCall(query, key, value, text)
            functions = {"dense": self._dense, "refresh": self._refresh, "cached": self._cached}
            branches = [functools.partial(functions[name], call) for name in kinds]
            # Only the masks of this layer pass through the conditional: the buffer of all layers would be copied by
            # it (jax 0.10 on GPUs). They are written back whatever kind of step it was; that moves some bits in place.
            here = None if state.stored is None else self._read(state.stored, place)
            output, here, density = jax.lax.switch(now, branches, here)
            stored = None if state.stored is None else self._write(state.stored, here, place)
            return Attended(output, VideoMaskState(stored, state.computed.at[branch, layer].set(density)))

        return attend

    # The kinds of step: what they get and give in place of the masks of the layer are those of a single one.

    def _dense(self, call: "_AttentionCall", here: StoredMasks | None):
        output = dense(call.query, call.key, call.value, None, layer=jnp.int32(0), text=call.text).output
        return output, here, jnp.float32(1)

    def _refresh(self, call: "_AttentionCall", here: StoredMasks | None):
        query, key, value, text = call.query, call.key, call.value, call.text
        if self.predictor.needs_lse:
            everything = None if text is None else valid_keys(text, query.shape[1])
            output, lse = attention_with_lse(query, key, value, everything)
            mask = self._predict(query, key, lse, text)
            computed = jnp.float32(1)
        else:
            mask = self._predict(query, key, None, text)
            output = attention(query, key, value, mask, implementation=self.implementation)
            computed = mask.density()
        if here is None:
            return output, None, computed
        work_order = mask.with_work_order().work_order
        assert work_order is not None
        return output, StoredMasks(mask.bits, work_order, mask.density()), computed

    def _cached(self, call: "_AttentionCall", here: StoredMasks | None):
        assert here is not None
        like = self._structure(_asked(call.query, call.key, call.text))
        order = self._query_order(call.query.shape, call.text)
        sizes = {"query_block": like.query_block, "num_keys": like.num_keys, "num_queries": like.num_queries}
        mask = SliceMask(here.bits, order, here.work_order, **sizes)
        output = attention(call.query, call.key, call.value, mask, implementation=self.implementation)
        return output, here, here.density

    def _predict(self, query, key, lse, text: TextTail | None) -> SliceMask:
        """The mask of one call, over all its tokens."""
        num_tokens = query.shape[1]
        video = num_tokens - (0 if text is None else text.num_tokens)
        operands = (query[:, :video], key[:, :video])
        mask = self.predictor(*operands) if lse is None else self.predictor(*operands, lse[..., :video])
        return mask if text is None else join_text(mask, text, num_tokens)

    def _structure(self, call: Call) -> SliceMask:
        """The mask of one call as shapes; nothing runs."""
        batch, num_tokens, num_heads, _ = call.query.shape
        lse = jax.ShapeDtypeStruct((batch, num_heads, num_tokens), jnp.float32) if self.predictor.needs_lse else None
        lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)

        def predict(query, key, lse, lengths):
            text = None if call.num_text is None else TextTail(call.num_text, lengths)
            return self._predict(query, key, lse, text)

        mask = jax.eval_shape(predict, call.query, call.key, lse, lengths)
        if (mask.query_order is None) != (getattr(self.predictor, "query_order", None) is None):
            raise ValueError(
                "expected masks in the `query_order` of the predictor, got another from "
                f"{type(self.predictor).__name__}: an order that depends on queries and keys is not kept between steps"
            )
        return mask

    def _query_order(self, shape: tuple[int, ...], text: TextTail | None) -> Int32[Array, "B N T"] | None:
        """The order of `_predict`'s masks, which is not kept: it is known before tracing."""
        order = getattr(self.predictor, "query_order", None)
        if order is None:
            return None
        order = np.asarray(order, np.int32)
        order = order if order.ndim == 3 else order[None, None]
        tail = np.arange(order.shape[-1], shape[1], dtype=np.int32)
        assert tail.size == (0 if text is None else text.num_tokens)
        return jnp.asarray(np.concatenate([order, np.broadcast_to(tail, (*order.shape[:2], tail.size))], axis=-1))

    def _read(self, stored: StoredMasks, place: tuple[Array, Array]) -> StoredMasks:
        here = jax.tree.map(lambda buffer: _take(buffer, place), stored)
        return here._replace(bits=_to_device(here.bits)) if self.on_host else here

    def _write(self, stored: StoredMasks, here: StoredMasks, place: tuple[Array, Array]) -> StoredMasks:
        here = here._replace(bits=_to_host(here.bits)) if self.on_host else here
        return jax.tree.map(lambda buffer, value: _put(buffer, value, place), stored, here)


class _AttentionCall(NamedTuple):
    """The arguments of one call."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B T N H"]
    value: Float[Array, "B T N H"]
    text: TextTail | None


def probe(calls: list[Call]) -> VideoAttention:
    """An attention that notes in `calls` what the model asks, for `jax.eval_shape` of a forward."""

    def attend(query, key, value, state, *, layer, text) -> Attended:
        del layer
        calls.append(_asked(query, key, text))
        return Attended(value, state)

    return attend


def _asked(query: Array, key: Array, text: TextTail | None) -> Call:
    query_shape, key_shape = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (query, key))
    return Call(query_shape, key_shape, None if text is None else text.num_tokens)


def _take(buffer: Array, place: tuple[Array, Array]) -> Array:
    start = (*place, *(0,) * (buffer.ndim - 2))
    return jax.lax.dynamic_slice(buffer, start, (1, 1, *buffer.shape[2:]))[0, 0]


def _put(buffer: Array, value: Array, place: tuple[Array, Array]) -> Array:
    return jax.lax.dynamic_update_slice(buffer, value[None, None], (*place, *(0,) * (buffer.ndim - 2)))


def _to_device(array: Array) -> Array:
    return jax.device_put(array, jax.memory.Space.Device)


def _to_host(array: Array | np.ndarray) -> Array:
    return jax.device_put(array, jax.memory.Space.Host)


def _zeros_on_host(shape: tuple[int, ...]) -> Array:
    # Memory that NumPy has not written is not there yet: the only copy is the pinned one.
    return _to_host(np.zeros(shape, np.uint32))
