"""The FFI handlers check every buffer again, in words, before anything is launched. Compiled with g++; no GPU."""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_kernel import load

B, T, S, N, K, H, M = 2, 150, 70, 4, 2, 64, 64
R, W = 3, 4
BF16, U32, S32, F32, F16 = jnp.bfloat16, jnp.uint32, jnp.int32, jnp.float32, jnp.float16
OPERANDS = {
    "query": ((B, T, N, H), BF16),
    "key": ((B, S, K, H), BF16),
    "value": ((B, S, K, H), BF16),
    "bits": ((B, N, R, W), U32),
    "work_order": ((B, N, R, 2), S32),
    "query_order": ((B, N, T), S32),
}
RESULTS = {"output": ((B, T, N, H), BF16), "lse": ((B, N, T), F32), "workspace": ((4 + 4 * B * N * R,), S32)}


@pytest.fixture(scope="module")
def library(host_library):
    return load(host_library)


def call(target="fgattn_check_attention", *, scale=0.125, query_block=M, drop=(), **changed):
    """Runs a target with the valid arguments above but for `changed`: a shape, or (shape, dtype)."""
    described = {}
    for name, (shape, dtype) in (OPERANDS | RESULTS).items():
        new = changed.pop(name, shape)
        described[name] = new if isinstance(new[0], tuple) else (new, dtype)
    assert not changed
    operands = [jnp.zeros(*described[name]) for name in OPERANDS if name not in drop]
    results = [jax.ShapeDtypeStruct(*described[name]) for name in RESULTS]
    run = jax.ffi.ffi_call(target, results)
    return jax.block_until_ready(run(*operands, scale=np.float32(scale), query_block=np.int32(query_block)))


def test_right_arguments_pass(library):
    call()
    call(drop=("query_order",))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_both_dtypes_pass(library, dtype):
    call(**{name: ((OPERANDS | RESULTS)[name][0], dtype) for name in ("query", "key", "value", "output")})


def test_mask_arrays_may_have_axes_of_size_1_each_for_itself(library):
    call(bits=(1, 1, R, W), work_order=(1, 1, R, 2), query_order=(1, 1, T))
    call(bits=(B, 1, R, W), work_order=(B, N, R, 2), query_order=(1, N, T))


WRONG = {
    "query of rank 3": ({"query": (B, T, H)}, r"`query` BF16 or F16 \[B, T, N, H\], got BF16\[2, 150, 64\]"),
    "query of float32": ({"query": ((B, T, N, H), F32)}, r"`query` BF16 or F16 .*, got F32\[2, 150, 4, 64\]"),
    "head width": ({"query": (B, T, N, 32)}, r"H=64 or H=128, got BF16\[2, 150, 4, 32\]"),
    "key of another dtype": ({"key": ((B, S, K, H), F16)}, r"`key` BF16\[B=2, S, K, H=64\], got F16\[2, 70, 2, 64\]"),
    "key of another batch": ({"key": (3, S, K, H)}, r"`key` BF16\[B=2, S, K, H=64\], got BF16\[3, 70, 2, 64\]"),
    "key of another width": ({"key": (B, S, K, 128)}, r"`key` BF16\[B=2, S, K, H=64\], got BF16\[2, 70, 2, 128\]"),
    "key of rank 3": ({"key": (B, S, H)}, r"`key` .*, got BF16\[2, 70, 64\]"),
    "value of another length": ({"value": (B, 71, K, H)}, r"`value` BF16\[B=2, S=70, K=2, H=64\], got BF16\[2, 71,"),
    "value of other heads": ({"value": (B, S, 4, H)}, r"`value` BF16\[B=2, S=70, K=2, H=64\], got .*70, 4, 64\]"),
    "value of another dtype": ({"value": ((B, S, K, H), F32)}, r"`value` BF16.*, got F32\["),
    "no keys": ({"key": (B, 0, K, H), "value": (B, 0, K, H)}, r"`key` with at least one key, got BF16\[2, 0,"),
    "no key heads": ({"key": (B, S, 0, H), "value": (B, S, 0, H)}, r"multiple of key/value heads K, got N=4 and K=0"),
    "heads in no groups": ({"key": (B, S, 3, H), "value": (B, S, 3, H)}, r"a multiple of .* K, got N=4 and K=3"),
    "query block": ({"query_block": 32}, r"`query_block` 64 or 128, got query_block=32"),
    "negative scale": ({"scale": -0.5}, r"`scale` finite and not negative, got scale=-0.5"),
    "infinite scale": ({"scale": np.inf}, r"`scale` finite and not negative, got scale=inf"),
    "scale NaN": ({"scale": np.nan}, r"`scale` finite and not negative, got scale=-?nan"),
    "rows": ({"bits": (B, N, 2, W)}, r"`bits` U32\[B=2\|1, N=4\|1, R=3, W=4\], got U32\[2, 4, 2, 4\]"),
    "words": ({"bits": (B, N, R, 3)}, r"`bits` U32\[B=2\|1, N=4\|1, R=3, W=4\], got U32\[2, 4, 3, 3\]"),
    "too many words": ({"bits": (B, N, R, 8)}, r"`bits` .* got U32\[2, 4, 3, 8\]"),
    "signed bits": ({"bits": ((B, N, R, W), S32)}, r"`bits` U32\[.*, got S32\["),
    "bits of another batch": ({"bits": (3, N, R, W)}, r"`bits` .*, got U32\[3, 4, 3, 4\]"),
    "bits of key heads": ({"bits": (B, K, R, W)}, r"`bits` .*, got U32\[2, 2, 3, 4\]"),
    "work order of one head": ({"work_order": (B, 1, R, 2)}, r"`work_order` S32\[B=2, N=4, R=3, 2=2\], got S32\[2, 1,"),
    "work order of fewer rows": ({"work_order": (B, N, 2, 2)}, r"`work_order` .*, got S32\[2, 4, 2, 2\]"),
    "work order without counts": ({"work_order": (B, N, R, 1)}, r"`work_order` .*, got S32\[2, 4, 3, 1\]"),
    "work order unsigned": ({"work_order": ((B, N, R, 2), U32)}, r"`work_order` S32.*, got U32\["),
    "query order of keys": ({"query_order": (B, N, S)}, r"`query_order` S32\[B=2\|1, N=4\|1, T=150\], got S32"),
    "query order of floats": ({"query_order": ((B, N, T), F32)}, r"`query_order` S32.*, got F32"),
    "query order of rank 1": ({"query_order": (T,)}, r"`query_order` .*, got S32\[150\]"),
    "output of another shape": ({"output": (B, N, T, H)}, r"`output` BF16\[B=2, T=150, N=4, H=64\], got BF16\[2, 4,"),
    "output of another dtype": ({"output": ((B, T, N, H), F32)}, r"`output` BF16.*, got F32"),
    "LSE in another layout": ({"lse": (B, T, N)}, r"`lse` F32\[B=2, N=4, T=150\], got F32\[2, 150, 4\]"),
    "LSE of another dtype": ({"lse": ((B, N, T), BF16)}, r"`lse` F32.*, got BF16"),
    "workspace of one number": ({"workspace": (1,)}, r"`workspace` S32\[4 \+ 4 B N R=100\], got S32\[1\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_argument_is_named(library, name):
    changed, message = WRONG[name]
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(**changed)


def test_the_real_handler_makes_the_same_checks_before_it_launches(library):
    before = library.fgattn_host_launches()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"`bits` .*, got U32\[2, 4, 3, 3\]"):
        call("fgattn_host_attention", bits=(B, N, R, 3))
    assert library.fgattn_host_launches() == before
    call("fgattn_host_attention")
    assert library.fgattn_host_launches() == before + 1


@pytest.mark.parametrize("axis", ["B", "T", "N"])
def test_empty_arrays_return_without_a_launch(library, axis):
    sizes = {"B": B, "T": T, "N": N, "R": R} | ({"T": 0, "R": 0} if axis == "T" else {axis: 0})
    b, t, n, r = sizes.values()
    before = library.fgattn_host_launches()
    call(
        "fgattn_host_attention",
        query=(b, t, n, H), key=(b, S, K, H), value=(b, S, K, H), bits=(1, 1, r, W), work_order=(1, 1, r, 2),
        query_order=(b, n, t), output=(b, t, n, H), lse=(b, n, t), workspace=(4 + 4 * b * n * r,),
    )  # fmt: skip
    assert library.fgattn_host_launches() == before


def order_rows(bits, num_keys, shape=(1, 2, 3, 2), dtype=S32, target="fgattn_check_work_order"):
    return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, dtype))(bits, num_keys=np.int32(num_keys))


def test_work_order_handler_checks_its_arguments(library):
    bits = jnp.zeros((1, 2, 3, 4), U32)
    jax.block_until_ready(order_rows(bits, 128))
    for wrong, message in (
        ((bits, 129), r"`bits` U32\[B, N, R, W=8\], got U32\[1, 2, 3, 4\]"),
        ((bits, 0), "`num_keys` of at least 1, got num_keys=0"),
        ((bits.astype(S32), 128), r"`bits` U32.*, got S32"),
        ((bits[0], 128), r"`bits` .*, got U32\[2, 3, 4\]"),
        ((bits, 128, (1, 2, 3, 1)), r"`work_order` S32\[B=1, N=2, R=3, 2=2\], got S32\[1, 2, 3, 1\]"),
        ((bits, 128, (1, 1, 3, 2)), r"`work_order` .*, got S32\[1, 1, 3, 2\]"),
        ((bits, 128, (1, 2, 3, 2), F32), r"`work_order` .*, got F32"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(order_rows(*wrong))
    before = library.fgattn_host_launches()
    jax.block_until_ready(order_rows(bits[:, :, :0], 128, (1, 2, 0, 2), target="fgattn_host_work_order"))
    assert library.fgattn_host_launches() == before


# Shapes and addresses that no array here can have: the checks touch no memory.


class Buffer(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("extents", ctypes.c_int64 * 4),
        ("address", ctypes.c_int64),
    )


NUMBERS = {BF16: 16, U32: 8, S32: 4, F32: 11}  # XLA's numbers of these dtypes


def check(library, offsets=None, **shapes) -> str:
    offsets = offsets or {}
    buffers = (Buffer * 9)()
    for buffer, (name, (shape, dtype)) in zip(buffers, (OPERANDS | RESULTS).items(), strict=True):
        shape = shapes.get(name, shape)
        buffer.dtype, buffer.rank, buffer.address = NUMBERS[dtype], len(shape), 4096 + offsets.get(name, 0)
        buffer.extents[: len(shape)] = shape
    library.fgattn_host_check.restype = ctypes.c_char_p
    return library.fgattn_host_check(buffers, ctypes.c_float(1.0), M).decode()


@pytest.mark.parametrize(
    ("name", "bytes_"),
    [("query", 16), ("key", 16), ("value", 16), ("bits", 16), ("output", 16), ("work_order", 8), ("query_order", 4),
     ("lse", 4), ("workspace", 4)],
)  # fmt: skip
def test_addresses_that_the_kernel_could_not_load_from_are_refused(library, name, bytes_):
    assert check(library) == ""
    assert check(library, {name: bytes_}) == ""
    said = check(library, {name: bytes_ // 2})
    assert said == f"expected the address of `{name}` to be a multiple of {bytes_}, got remainder={bytes_ // 2}"


def sized(b=1, t=64, s=64, n=1, k=1):
    r, w = -(-t // M), 4 * -(-s // 128)
    return {
        "query": (b, t, n, H), "key": (b, s, k, H), "value": (b, s, k, H), "bits": (1, 1, r, w),
        "work_order": (1, 1, r, 2), "query_order": (1, 1, t), "output": (b, t, n, H), "lse": (b, n, t),
        "workspace": (4 + 4 * b * n * r,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ({"t": 2**31 - 63}, "R * M query positions"),
        ({"s": 2**30 - 127}, "2 * W * 32 key numbers"),
        ({"b": 2**31}, "B query batches"),
        ({"n": 2**31}, "N query heads"),
        ({"b": 2**16, "n": 2**15}, "B * N heads of the whole batch"),
        ({"b": 2**10, "n": 2**11, "t": 2**16}, "B * N * R rows"),
        ({"b": 2**10, "n": 2**9, "t": 2**16}, "4 + 4 B N R numbers of workspace"),
        ({"n": 2**24, "k": 2**24}, "2 K H bytes from key to key"),
    ],
)
def test_sizes_that_32_bits_cannot_count_are_refused(library, sizes, what):
    said = check(library, **sized(**sizes))
    assert said.startswith(f"expected {what} below 2^31")


def test_the_largest_sizes_that_32_bits_can_count_pass(library):
    assert check(library, **sized(t=2**31 - 64, s=2**30 - 128)) == ""
    assert check(library, **sized(b=2**10, n=2**9, t=2**15)) == ""
