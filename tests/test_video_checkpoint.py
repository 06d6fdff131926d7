"""Reading and writing of diffusers checkpoints: stacking, casting, placement, and what is refused with which words."""

import json
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fgattn_jax.models.video import checkpoint, layout
from fgattn_jax.models.video.checkpoint import Source, load_stacked, save_diffusers

LAYERS, WIDTH, WINDOW = 3, 5, (2, 1, 2, 2)
NAMES = {
    "patch.kernel": Source("patch.weight", "kernel", window=WINDOW),
    "patch.bias": Source("patch.bias"),
    "blocks.up.kernel": Source("blocks.{i}.net.0.weight", "kernel", LAYERS),
    "blocks.table": Source("blocks.{i}.table", num_layers=LAYERS),
}
CONFIG = {"_class_name": "SomeTransformer3DModel", "num_layers": LAYERS}


def template(dtype: Any = jnp.float32) -> Any:
    shape = jax.ShapeDtypeStruct
    return {
        "patch": {"kernel": shape((8, WIDTH), dtype), "bias": shape((WIDTH,), dtype)},
        "blocks": {
            "up": {"kernel": shape((LAYERS, WIDTH, 7), dtype)},
            "table": shape((LAYERS, 1, 2, WIDTH), jnp.float32),
        },
    }


def torch_tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """What a checkpoint holds, made without any code of ours."""
    rng = np.random.default_rng(0)
    shapes = {"patch.weight": (WIDTH, *WINDOW), "patch.bias": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {f"blocks.{i}.net.0.weight": (7, WIDTH), f"blocks.{i}.table": (1, 2, WIDTH)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, np.ndarray], shards: dict[str, list[str]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if shards is None:
        save_file(tensors, folder / layout.WEIGHTS)
        return folder
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = {name: file for file, names in shards.items() for name in names}
    (folder / f"{layout.WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_leaves_are_stacked_transposed_and_flattened(tmp_path):
    tensors = torch_tensors()
    params = load_stacked(write(tmp_path, tensors), NAMES, template())
    wanted = {
        "patch": {"kernel": tensors["patch.weight"].reshape(WIDTH, 8).T, "bias": tensors["patch.bias"]},
        "blocks": {
            "up": {"kernel": np.stack([tensors[f"blocks.{i}.net.0.weight"].T for i in range(LAYERS)])},
            "table": np.stack([tensors[f"blocks.{i}.table"] for i in range(LAYERS)]),
        },
    }
    chex.assert_trees_all_equal(params, wanted)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_a_matrix_of_more_rows_than_a_tile_is_transposed_whole(tmp_path):
    rows = 2 * checkpoint._ROWS + 3
    weight = np.random.default_rng(1).standard_normal((rows, 4)).astype(np.float32)
    wanted = {"kernel": jax.ShapeDtypeStruct((4, rows), jnp.float32)}
    params = load_stacked(write(tmp_path, {"w": weight}), {"kernel": Source("w", "kernel")}, wanted)
    np.testing.assert_array_equal(params["kernel"], weight.T)


@pytest.mark.parametrize("stored", [jnp.bfloat16, np.float16, np.float32], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("wanted", [jnp.bfloat16, jnp.float32], ids=lambda d: np.dtype(d).name)
def test_values_are_rounded_once_to_the_dtypes_of_the_template(tmp_path, stored, wanted):
    tensors = torch_tensors(stored)
    params = load_stacked(write(tmp_path, tensors), NAMES, template(wanted))
    assert params["patch"]["bias"].dtype == wanted
    assert params["blocks"]["table"].dtype == jnp.float32
    np.testing.assert_array_equal(
        params["blocks"]["up"]["kernel"][1], tensors["blocks.1.net.0.weight"].T.astype(wanted)
    )


def test_shards_with_an_index_give_the_same_as_one_file(tmp_path):
    tensors = torch_tensors()
    names = sorted(tensors)
    # Layers of one parameter lie in different files.
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    whole = load_stacked(write(tmp_path / "one", tensors), NAMES, template())
    parts = load_stacked(write(tmp_path / "two", tensors, shards), NAMES, template())
    chex.assert_trees_all_equal(whole, parts)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_what_is_saved_is_what_torch_would_hold_and_loads_again(tmp_path, num_shards):
    tensors = torch_tensors(jnp.bfloat16)
    params = load_stacked(write(tmp_path / "a", tensors), NAMES, template(jnp.bfloat16))
    save_diffusers(tmp_path / "b" / "transformer", NAMES, params, CONFIG, num_shards=num_shards)
    written = {}
    for file in (tmp_path / "b" / "transformer").glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name].astype(np.float32), tensor.astype(np.float32))
    chex.assert_trees_all_equal(load_stacked(tmp_path / "b", NAMES, template(jnp.bfloat16)), params)
    assert layout.read_config(tmp_path / "b") == CONFIG


def test_the_callback_counts_every_byte_once(tmp_path):
    calls = []
    load_stacked(write(tmp_path, torch_tensors()), NAMES, template(), progress=lambda *call: calls.append(call))
    assert [name for name, _, _ in calls] == sorted(NAMES)
    assert {total for *_, total in calls} == {sum(size for _, size, _ in calls)}
    assert calls[-1][1] == 4 * 8 * WIDTH


def test_the_host_holds_one_leaf_at_a_time(tmp_path, monkeypatch):
    """Of NumPy's memory; the files are mapped and leaves on the device are XLA's."""
    layers, width = 8, 256
    leaf = layers * width * width * 4
    names = {f"{kind}.kernel": Source(f"b.{{i}}.{kind}", "kernel", layers) for kind in "abcd"}
    shapes = {kind: {"kernel": jax.ShapeDtypeStruct((layers, width, width), jnp.float32)} for kind in "abcd"}
    rng = np.random.default_rng(0)
    tensors = {f"b.{i}.{kind}": rng.random((width, width), np.float32) for kind in "abcd" for i in range(layers)}
    write(tmp_path, tensors)

    def empty(shape, dtype):
        """Off the alignment of XLA: its CPU device then copies the array, as a GPU does, and does not borrow it."""
        raw = np.zeros(math.prod(shape) * np.dtype(dtype).itemsize + 64, np.uint8)
        start = 4 - raw.ctypes.data % 64 + 64 * (raw.ctypes.data % 64 > 4)
        return raw[start : raw.size - 64 + start].view(dtype).reshape(shape)

    monkeypatch.setattr(np, "empty", empty)
    tracemalloc.start()
    load_stacked(tmp_path, names, shapes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert leaf < peak < 1.5 * leaf


@pytest.mark.multidevice
def test_each_device_is_sent_its_own_part(tmp_path, run_python):
    write(tmp_path, torch_tensors())
    out = run_python(
        f"""
import sys; sys.path.insert(0, "tests")
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from test_video_checkpoint import NAMES, template
from fgattn_jax.models.video.checkpoint import load_stacked
mesh = Mesh(jax.devices(), ("fsdp",))
whole = load_stacked({str(tmp_path)!r}, NAMES, template())
spec = lambda name: NamedSharding(mesh, P("fsdp") if name == "patch.kernel" else P())
tree = jax.tree_util.tree_map(lambda _: NamedSharding(mesh, P()), template())
tree["patch"]["kernel"] = spec("patch.kernel")
for given in (spec, tree):
    params = load_stacked({str(tmp_path)!r}, NAMES, template(), sharding=given)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    kernel = params["patch"]["kernel"]
    assert kernel.sharding == spec("patch.kernel"), kernel.sharding
    assert {{s.data.shape for s in kernel.addressable_shards}} == {{(2, 5)}}
one = load_stacked({str(tmp_path)!r}, NAMES, template(), sharding=NamedSharding(mesh, P()))
assert one["patch"]["bias"].sharding.is_fully_replicated and len(one["patch"]["bias"].devices()) == 4
print("placed")
""",
        devices=4,
    )
    assert "placed" in out


def test_a_pytree_of_shardings_that_does_not_fit_is_refused(tmp_path):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match=re.escape("got 3 (blocks.table, blocks.up.kernel, patch.kernel) missing")):
        load_stacked(write(tmp_path, torch_tensors()), NAMES, template(), sharding={"patch": {"bias": device}})


def test_missing_and_unknown_tensors_are_counted_and_named(tmp_path):
    tensors = torch_tensors()
    del tensors["blocks.1.table"]
    tensors |= {f"lora_{i}": np.zeros(1, np.float32) for i in range(5)}
    words = "expected the 8 tensors of this model in .*, got 12: 1 \\(blocks.1.table\\) missing and 5 \\(lora_0, lora_1"
    with pytest.raises(ValueError, match=words):
        load_stacked(write(tmp_path, tensors), NAMES, template())


def test_ignored_tensors_may_be_there_and_may_not_be_wanted_ones(tmp_path):
    tensors = torch_tensors() | {"blocks.0.norm_added_q.weight": np.zeros(1, np.float32)}
    write(tmp_path, tensors)
    load_stacked(tmp_path, NAMES, template(), ignored=["norm_added_q", "patch"])
    with pytest.raises(ValueError, match=re.escape("1 (blocks.0.norm_added_q.weight) unknown")):
        load_stacked(tmp_path, NAMES, template())


def test_the_names_of_the_original_layout_are_recognised(tmp_path):
    tensors = {"blocks.0.self_attn.q.weight": np.zeros((2, 2), np.float32)}
    with pytest.raises(ValueError, match=r'original layout .* ends in "-Diffusers"'):
        load_stacked(write(tmp_path, tensors), NAMES, template())


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("blocks.2.net.0.weight", (6, WIDTH), (7, WIDTH)),
        ("patch.weight", (WIDTH, 4, 1, 2, 1), (WIDTH, *WINDOW)),
        ("patch.bias", (WIDTH + 1,), (WIDTH,)),
    ],
)
def test_a_wrong_shape_is_told_with_both_shapes(tmp_path, name, shape, wanted):
    tensors = torch_tensors() | {name: np.zeros(shape, np.float32)}
    words = f"expected shape={wanted} for '{name}' in '{tmp_path}', got shape={shape}"
    with pytest.raises(ValueError, match=re.escape(words)):
        load_stacked(write(tmp_path, tensors), NAMES, template())


def test_nothing_is_read_before_names_and_shapes_are_checked(tmp_path, monkeypatch):
    tensors = torch_tensors() | {"blocks.2.table": np.zeros((1, 3, WIDTH), np.float32)}
    monkeypatch.setattr(checkpoint, "_read_leaf", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match="expected shape="):
        load_stacked(write(tmp_path, tensors), NAMES, template())


def test_names_that_do_not_fit_the_template_are_refused(tmp_path):
    names = {name: source for name, source in NAMES.items() if name != "patch.bias"}
    with pytest.raises(
        ValueError, match=re.escape("4 leaves of the template, got 1 (patch.bias) missing and 0 unknown")
    ):
        load_stacked(write(tmp_path, torch_tensors()), names, template())
    with pytest.raises(ValueError, match=r"expected 2 layers in front of `blocks.table`"):
        load_stacked(
            tmp_path,
            NAMES | {"blocks.table": Source("blocks.{i}.table", num_layers=2)},
            template(),
            ignored=["blocks.2"],
        )


def test_whole_numbers_and_eight_bit_floats_are_refused(tmp_path):
    for dtype, name in ((np.int8, "I8"), (jnp.float8_e4m3fn, "F8_E4M3")):
        tensors = torch_tensors() | {"patch.bias": np.zeros(WIDTH, dtype)}
        with pytest.raises(ValueError, match=f"'patch.bias' in .* got dtype={name}: quantised"):
            load_stacked(write(tmp_path, tensors), NAMES, template())


def test_broken_files_say_which_and_what_to_do(tmp_path):
    tensors = torch_tensors()
    path = write(tmp_path / "cut", tensors) / layout.WEIGHTS
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        ValueError, match=f"whole safetensors file at '{re.escape(str(path))}', got .*download it again"
    ):
        load_stacked(tmp_path / "cut", NAMES, template())
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="got 22 bytes that cannot be read"):
        load_stacked(tmp_path / "cut", NAMES, template())


def test_a_broken_index_says_what_is_lost(tmp_path):
    names = sorted(torch_tensors())
    folder = write(tmp_path, torch_tensors(), {"a.safetensors": names[:4], "b.safetensors": names[4:]})
    index = folder / f"{layout.WEIGHTS}.index.json"
    good = index.read_text()
    index.write_text(good.replace("b.safetensors", "a.safetensors"))
    with pytest.raises(ValueError, match=f"got 4 that are not there, such as '{names[4]}' in a.safetensors"):
        load_stacked(folder, NAMES, template())
    index.write_text(good[:-5])
    with pytest.raises(ValueError, match="JSON object with `weight_map`"):
        load_stacked(folder, NAMES, template())
    index.write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="name a file for each tensor, got dict"):
        load_stacked(folder, NAMES, template())
    index.write_text(good)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected the 2 files .* got 1 missing, such as b.safetensors: download"):
        load_stacked(folder, NAMES, template())


def test_other_weight_files_are_named(tmp_path):
    write(tmp_path, torch_tensors())
    (tmp_path / layout.WEIGHTS).rename(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ValueError, match=r"got diffusion_pytorch_model.fp16.safetensors: only"):
        load_stacked(tmp_path, NAMES, template())


def test_the_config_is_found_from_the_pipeline_and_from_the_folder(tmp_path):
    write(tmp_path / "transformer", {})
    (tmp_path / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    for place in (tmp_path, tmp_path / "transformer"):
        assert layout.read_config(place, class_name="SomeTransformer3DModel") == CONFIG
        assert layout.read_pipeline(place) == {"_class_name": "SomePipeline"}
    (tmp_path / "model_index.json").unlink()
    assert layout.read_pipeline(tmp_path / "transformer") == {}


def test_what_is_no_diffusers_checkpoint_is_told(tmp_path):
    with pytest.raises(ValueError, match="got 'org/model', which is not there: nothing is downloaded here"):
        layout.read_config("org/model")
    with pytest.raises(ValueError, match=r"config.json in .* got an empty folder"):
        layout.read_config(tmp_path)
    (tmp_path / "readme.md").write_text("")
    with pytest.raises(ValueError, match="which is a file"):
        layout.read_config(tmp_path / "readme.md")
    with pytest.raises(ValueError, match=r"got 1 other files, such as readme.md"):
        layout.read_config(tmp_path)
    (tmp_path / "transformer").mkdir()
    with pytest.raises(ValueError, match=r"expected config.json in .*transformer', got an empty folder"):
        layout.read_config(tmp_path)
    (tmp_path / "transformer" / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"expected a JSON object in .* got list"):
        layout.read_config(tmp_path)
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "UNet"}')
    with pytest.raises(ValueError, match=r"expected _class_name='Wan' in .* got 'UNet': .* another model"):
        layout.read_config(tmp_path, class_name="Wan")


@pytest.mark.parametrize(
    "file", ["Wan2.1_VAE.pth", "transformers/mp_rank_00_model_states.pt", "v/transformers/mp_rank_00_model_states.pt"]
)
def test_original_files_are_recognised(tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ValueError, match=f"got {Path(file).name}: the original layout"):
        layout.read_config(tmp_path)


def test_an_original_config_is_recognised(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel"}')
    with pytest.raises(ValueError, match="got _class_name='WanModel': the original layout"):
        layout.read_config(tmp_path)
