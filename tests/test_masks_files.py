"""Mask files: what comes back, and what is said about files that hold no mask."""

import json

import chex
import jax
import jax.numpy as jnp
import masks_oracle as oracle
import numpy as np
import pytest
from safetensors.numpy import save_file

from fgattn_jax import masks

SMALL = oracle.CASES["odd lengths, smallest slices"]
METADATA = {
    "format": "fgattn_jax.slice_mask",
    "format_version": "1",
    "query_block": "16",
    "num_keys": "133",
    "num_queries": "71",
}


def tensors(seed=0):
    return {
        "bits": oracle.words_of_rows(oracle.random_rows(SMALL, seed)),
        "query_order": oracle.random_order(SMALL, seed),
    }


def make(seed=0):
    return masks.from_rows(
        oracle.random_rows(SMALL, seed), query_block=16, num_queries=71, query_order=oracle.random_order(SMALL, seed)
    )


@pytest.mark.parametrize("order", ["own order", "raster"])
def test_a_mask_comes_back_from_its_file(tmp_path, order):
    mask = make() if order == "own order" else make().with_query_order(None)
    masks.save_mask(tmp_path / "mask.safetensors", mask)
    again = masks.load_mask(tmp_path / "mask.safetensors")
    chex.assert_trees_all_equal(again, mask)
    assert jax.tree.structure(again) == jax.tree.structure(mask)
    assert isinstance(again.bits, jax.Array)


def test_a_stack_of_layers_comes_back_from_its_file(tmp_path):
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), make(0), make(1))
    masks.save_mask(str(tmp_path / "stack"), stack)
    chex.assert_trees_all_equal(masks.load_mask(str(tmp_path / "stack")), stack)


def test_a_file_written_by_others_as_documented_is_read(tmp_path):
    save_file(tensors(), tmp_path / "mask", metadata=METADATA)
    chex.assert_trees_all_equal(masks.load_mask(tmp_path / "mask"), make())


def test_the_header_holds_the_documented_metadata(tmp_path):
    masks.save_mask(tmp_path / "mask", make())
    data = (tmp_path / "mask").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == METADATA
    assert header["bits"]["dtype"] == "U32"
    assert header["query_order"]["dtype"] == "I32"


def test_saving_replaces_a_file_and_leaves_nothing_else(tmp_path):
    for seed in range(2):
        masks.save_mask(tmp_path / "mask", make(seed))
    chex.assert_trees_all_equal(masks.load_mask(tmp_path / "mask"), make(1))
    assert [path.name for path in tmp_path.iterdir()] == ["mask"]


def test_a_wrong_mask_is_not_saved(tmp_path):
    mask = make()
    stray = masks.SliceMask(mask.bits.at[0, 0, 0, 7].set(jnp.uint32(1)), **SMALL.sizes)
    with pytest.raises(ValueError, match="got key=224 set"):
        masks.save_mask(tmp_path / "mask", stray)
    with pytest.raises(ValueError, match="outside `jit`"):
        jax.jit(lambda mask: masks.save_mask(tmp_path / "mask", mask))(mask)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 5, 100, -1], ids=["empty", "in the length", "in the header", "in the data"])
def test_a_truncated_file_is_named(tmp_path, size):
    masks.save_mask(tmp_path / "whole", make())
    data = (tmp_path / "whole").read_bytes()[:size]
    (tmp_path / "part").write_bytes(data)
    with pytest.raises(ValueError, match=rf"whole safetensors file, got `.*part` with {len(data)} bytes.*`save_mask`"):
        masks.load_mask(tmp_path / "part")


def test_another_kind_of_file_is_named(tmp_path):
    (tmp_path / "text").write_text("no mask at all, but long enough to hold a header length\n" * 10)
    with pytest.raises(ValueError, match=r"whole safetensors file, got `.*text` with 560 bytes"):
        masks.load_mask(tmp_path / "text")


def test_missing_files_and_folders_are_errors_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        masks.load_mask(tmp_path / "nothing")
    with pytest.raises(OSError, match="directory"):
        masks.load_mask(tmp_path)
    with pytest.raises(FileNotFoundError):
        masks.save_mask(tmp_path / "no_folder" / "mask", make())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fgattn_jax.dit"}, "format='fgattn_jax.slice_mask' in its metadata, got format='fgattn_jax.dit'"),
        ({"format": None}, "got format=None"),
        ({"format_version": "2"}, "format_version='1', got format_version='2'"),
        ({"format_version": None}, "got format_version=None"),
        ({"num_keys": None}, "`num_keys` in the metadata to be a number, got num_keys=''"),
        ({"num_queries": "-71"}, "got num_queries='-71'"),
        ({"query_block": "20"}, "no mask in `.*file`: .*got query_block=20"),
        ({"num_queries": "81"}, "no mask in `.*file`: .*R=6 rows"),
        ({"num_keys": "99"}, "no mask in `.*file`: .*W=4 words for num_keys=99"),
        ({"num_keys": "129"}, "no mask in `.*file`: .*past num_keys=129"),
    ],
    ids=lambda value: "-".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_metadata_is_named(tmp_path, change, message):
    metadata = {name: text for name, text in (METADATA | change).items() if text is not None}
    save_file(tensors(), tmp_path / "file", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        masks.load_mask(tmp_path / "file")


def test_a_file_without_metadata_is_named(tmp_path):
    save_file(tensors(), tmp_path / "file")
    with pytest.raises(ValueError, match=r"got format=None in `.*file`"):
        masks.load_mask(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": None}, r"`bits` and perhaps `query_order`, got \['query_order'\]"),
        ({"weights": np.zeros(3)}, r"got \['bits', 'query_order', 'weights'\]"),
        ({"bits": np.zeros((2, 2, 5, 8), np.int64)}, "`bits` of dtype uint32, got int64"),
        ({"bits": np.zeros((5, 8), np.uint32)}, r"rank 4 .*got shape=\(5, 8\)"),
        ({"query_order": np.zeros((2, 2, 71), np.int64)}, "`query_order` of dtype int32, got int64"),
        ({"query_order": np.zeros((2, 2, 71), np.int32)}, "got query=0 more than once"),
        ({"query_order": np.zeros((2, 2, 72), np.int32)}, "T=num_queries=71 positions, got T=72"),
    ],
    ids=["no bits", "more", "bits dtype", "bits rank", "order dtype", "no permutation", "order length"],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    arrays = {name: array for name, array in (tensors() | change).items() if array is not None}
    save_file(arrays, tmp_path / "file", metadata=METADATA)
    with pytest.raises(ValueError, match=message):
        masks.load_mask(tmp_path / "file")


def test_a_work_order_is_not_stored(tmp_path):
    masks.save_mask(tmp_path / "mask", make().with_work_order())
    again = masks.load_mask(tmp_path / "mask")
    assert again.work_order is None
    chex.assert_trees_all_equal(again, make())
