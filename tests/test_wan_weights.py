"""Loading of Wan checkpoints, what is refused by name, and random weights."""

import json
import re
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from fgattn_jax.models import wan
from fgattn_jax.models._leaves import named_leaves
from fgattn_jax.models.video.checkpoint import save_diffusers
from fgattn_jax.models.video.layout import WEIGHTS
from fgattn_jax.models.wan.weights import tensor_names

GOLDEN = Path(__file__).parent / "golden" / "wan"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the golden checkpoint: the pipeline's directory."""
    shutil.copytree(GOLDEN / "transformer", tmp_path / "transformer")
    return tmp_path


def change_config(folder: Path, **changes) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def params_of(model: wan.WanTransformer) -> dict[str, jax.Array]:
    return named_leaves(nnx.state(model, nnx.Param))


def test_every_tensor_lands_in_its_place():
    """Beside the parity of outputs: each leaf is what its torch name says, layer by layer."""
    tensors = load_file(GOLDEN / "transformer" / WEIGHTS)
    leaves = params_of(wan.load(GOLDEN, dtype=jnp.float32))
    np.testing.assert_array_equal(leaves["blocks.attn1.out.kernel"][1], tensors["blocks.1.attn1.to_out.0.weight"].T)
    np.testing.assert_array_equal(leaves["blocks.ffn.up.bias"][0], tensors["blocks.0.ffn.net.0.proj.bias"])
    np.testing.assert_array_equal(leaves["blocks.norm2.scale"][1], tensors["blocks.1.norm2.weight"])
    patches = tensors["patch_embedding.weight"].reshape(32, 16).T
    np.testing.assert_array_equal(leaves["patch_embedding.kernel"], patches)
    assert sum(leaf.size for leaf in leaves.values()) == sum(tensor.size for tensor in tensors.values())


@pytest.mark.parametrize(("name", "num_tensors"), [("wan-1.3b", 825), ("wan-14b", 1095)])
def test_the_names_are_as_many_as_the_published_checkpoints_have(name, num_tensors):
    tensors = [tensor for source in tensor_names(wan.PRESETS[name]).values() for tensor in source.tensors()]
    assert len(tensors) == len(set(tensors)) == num_tensors


@pytest.mark.parametrize("name", sorted(wan.PRESETS))
def test_a_config_goes_to_json_and_back(name):
    assert wan.WanConfig.from_json(json.loads(json.dumps(wan.PRESETS[name].to_json()))) == wan.PRESETS[name]


def test_the_golden_config_is_read():
    config = wan.load(GOLDEN).config
    assert (config.num_layers, config.num_heads, config.head_dim, config.hidden_dim) == (2, 2, 16, 40)
    assert (config.in_channels, config.text_dim, config.time_features, config.eps) == (4, 20, 32, 1e-6)


def test_no_parameter_is_drawn_on_loading(monkeypatch):
    draw, seen = jax.random.normal, []

    def only_traced(key, *args, **kwargs):
        seen.append(1)
        assert isinstance(key, jax.core.Tracer)
        return draw(key, *args, **kwargs)

    monkeypatch.setattr(jax.random, "normal", only_traced)
    wan.load(GOLDEN)
    assert seen


def test_the_callback_fills_a_bar():
    done = []
    wan.load(GOLDEN, progress=lambda name, size, total: done.append((size, total)))
    assert sum(size for size, _ in done) == done[0][1] > 60_000


@pytest.mark.multidevice
def test_parameters_are_split_over_devices_as_asked(run_python):
    run_python(
        f"""
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from fgattn_jax.models import wan
from fgattn_jax.models._leaves import named_leaves
mesh = Mesh(jax.devices(), ("fsdp",))
def split(name, shape):
    return NamedSharding(mesh, P(None, "fsdp") if name.startswith("blocks") and "table" not in name else P())
whole = wan.load({str(GOLDEN)!r}, dtype=jnp.float32)
for model, other in (
    (wan.load({str(GOLDEN)!r}, dtype=jnp.float32, sharding=split), whole),
    (wan.random(whole.config, dtype=jnp.float32, sharding=split), wan.random(whole.config, dtype=jnp.float32)),
):
    leaves, wanted = (named_leaves(nnx.state(m, nnx.Param)) for m in (model, other))
    for name, leaf in leaves.items():
        assert leaf.sharding.is_equivalent_to(split(name, leaf.shape), leaf.ndim), name
        np.testing.assert_allclose(leaf, wanted[name], atol=1e-6)
    assert leaves["blocks.ffn.down.kernel"].addressable_shards[0].data.shape == (2, 20, 32)
""",
        devices=2,
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_dim": 1280}, "text-to-video checkpoint of Wan 2.1, got image_dim=1280: this is an image-to-video one"),
        ({"added_kv_proj_dim": 5120}, "got added_kv_proj_dim=5120: this is an image-to-video one"),
        ({"pos_embed_seq_len": 514}, "got pos_embed_seq_len=514"),
        ({"in_channels": 36}, "got in_channels=36: this is an image-to-video one"),
        ({"in_channels": 8}, "got in_channels=8, out_channels=4"),
        ({"cross_attn_norm": False}, "expected cross_attn_norm=True.* got cross_attn_norm=False"),
        ({"vace_layers": [0, 5]}, r"got vace_layers=\[0, 5\], which is not known"),
        ({"_class_name": "WanVACETransformer3DModel"}, "expected _class_name='WanTransformer3DModel' in .*VACE"),
        ({"_class_name": "WanModel"}, "the original layout"),
        ({"ffn_dim": 64}, r"expected shape=\(32, 64\) for 'blocks.0.ffn.net.2.weight' in .* got shape=\(32, 40\)"),
        ({"num_layers": 3}, "expected the 96 tensors .* got 69: 27 .blocks.2.attn1.norm_k.weight, .* missing and 0"),
    ],
)
def test_other_checkpoints_are_refused_by_name(folder, changes, words):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=words):
        wan.load(folder)


def test_a_missing_field_is_named(folder):
    path = folder / "transformer" / "config.json"
    fields = json.loads(path.read_text())
    del fields["ffn_dim"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=re.escape("got no ['ffn_dim']")):
        wan.load(folder)
    with pytest.raises(ValueError, match="config of a WanTransformer3DModel, got _class_name=None"):
        wan.WanConfig.from_json({})


def test_fields_without_effect_are_no_reason_to_refuse(folder):
    change_config(folder, window_size=[-1, -1], add_img_emb=False, qk_norm=True, some_new_switch=None)
    assert wan.load(folder).config == wan.load(GOLDEN).config


@pytest.mark.parametrize(
    "index",
    [
        {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
        {"boundary_ratio": 0.875},
        {"expand_timesteps": True},
    ],
    ids=lambda index: next(iter(index)),
)
def test_wan22_is_refused_from_the_pipeline_and_from_its_folder(folder, index):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"} | index))
    for place in (folder, folder / "transformer"):
        with pytest.raises(ValueError, match=f"got {next(iter(index))}=.* in model_index.json: this is Wan 2.2"):
            wan.load(place)


def test_the_index_of_wan21_by_a_new_diffusers_is_accepted(folder):
    index = {"transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    wan.load(folder)


def test_tensors_that_diffusers_ignores_are_ignored(folder):
    path = folder / "transformer" / WEIGHTS
    save_file(load_file(path) | {"blocks.0.attn2.norm_added_q.weight": np.ones(32, np.float32)}, path)
    chex.assert_trees_all_equal(params_of(wan.load(folder)), params_of(wan.load(GOLDEN)))


def test_a_directory_that_is_not_there_is_no_reason_to_download():
    with pytest.raises(ValueError, match=r"got 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers', which is not there: nothing is"):
        wan.load("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")


def test_a_model_is_written_and_read_again(tmp_path):
    model = wan.random(wan.load(GOLDEN).config, seed=4)
    params = nnx.state(model, nnx.Param)
    save_diffusers(tmp_path / "transformer", tensor_names(model.config), params, model.config.to_json(), num_shards=3)
    chex.assert_trees_all_equal(params_of(wan.load(tmp_path)), params_of(model))


def test_random_weights_depend_on_the_seed_and_differ_from_layer_to_layer():
    config = wan.load(GOLDEN).config
    first, other = (params_of(wan.random(config, seed=seed)) for seed in (0, 1))
    for name, leaf in first.items():
        if name.endswith("kernel") or "table" in name:
            assert jnp.abs(leaf - other[name]).max() > 0.01, name
            assert not name.startswith("blocks") or jnp.abs(leaf[0] - leaf[1]).max() > 0.01, name


@pytest.mark.slow
def test_random_activations_keep_unit_scale_over_many_layers():
    config = wan.WanConfig(num_layers=40, num_heads=2, head_dim=32, hidden_dim=128, text_dim=16)
    latents = jax.random.normal(jax.random.key(0), (1, 16, 2, 4, 4))
    model = wan.random(config)
    condition = wan.WanCondition(jax.random.normal(jax.random.key(1), (1, 4, 16)))
    velocity = model(latents, jnp.array([999.0]), condition).velocity.astype(jnp.float32)
    assert 0.3 < float(jnp.std(velocity)) < 3
