import dataclasses
import json
import re
import shutil

import chex
import hunyuan_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from fgattn_jax.models import hunyuan_video
from fgattn_jax.models._leaves import named_leaves
from fgattn_jax.models.hunyuan_video import HunyuanVideoConfig, tensor_names
from fgattn_jax.models.video.checkpoint import save_diffusers

REAL = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "_diffusers_version": "0.32.0.dev0",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 16,
    "mlp_ratio": 4.0,
    "num_attention_heads": 24,
    "num_layers": 20,
    "num_refiner_layers": 2,
    "num_single_layers": 40,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
    "pooled_projection_dim": 768,
    "qk_norm": "rms_norm",
    "rope_axes_dim": [16, 56, 56],
    "rope_theta": 256.0,
    "text_embed_dim": 4096,
}
"""The config of the 13B text-to-video checkpoint."""


def golden_config():
    return json.loads((hunyuan_cases.GOLDEN / "transformer" / "config.json").read_text())


def golden_tensors():
    return load_file(hunyuan_cases.GOLDEN / "transformer" / "diffusion_pytorch_model.safetensors")


def copy_golden(folder, **changes):
    shutil.copytree(hunyuan_cases.GOLDEN / "transformer", folder / "transformer")
    text = json.dumps({**golden_config(), **changes})
    (folder / "transformer" / "config.json").write_text(text)
    return folder


def test_config_of_the_released_checkpoint():
    config = HunyuanVideoConfig.from_json(REAL)
    assert config == HunyuanVideoConfig() == hunyuan_video.PRESETS["hunyuan-video"]
    assert (config.width, config.mlp_width, config.refiner_mlp_width) == (3072, 12288, 12288)
    assert config.num_attentions == 60
    assert config.grid(21, 90, 160) == (21, 45, 80)


def test_config_of_other_sizes():
    assert HunyuanVideoConfig.from_json(golden_config()) == hunyuan_cases.TINY
    config = HunyuanVideoConfig.from_json({**REAL, "patch_size": 3, "patch_size_t": 4, "guidance_embeds": False})
    assert config.patch == (4, 3, 3)
    assert config.patch_values == 16 * 36
    assert not config.guidance_embeds
    # What an older file lacks has diffusers' default; a null field says nothing.
    shorter = {name: value for name, value in REAL.items() if name != "rope_theta"}
    assert (
        HunyuanVideoConfig.from_json({**shorter, "image_condition_type": None, "some_new_field": None})
        == HunyuanVideoConfig()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "HunyuanVideo15Transformer3DModel"}, "got _class_name='HunyuanVideo15Transformer3DModel'"),
        ({"_class_name": "WanTransformer3DModel"}, "config of a HunyuanVideoTransformer3DModel, got _class_name='Wan"),
        ({"image_condition_type": "latent_concat"}, "text-to-video HunyuanVideo, got image_condition_type='latent_con"),
        ({"image_condition_type": "token_replace"}, "got image_condition_type='token_replace': image-to-video"),
        ({"in_channels": 33}, "in_channels=33 and out_channels=16"),
        ({"qk_norm": "layer_norm"}, "qk_norm='rms_norm', got qk_norm='layer_norm'"),
        ({"image_embed_dim": 1152}, r"no further fields .* got \['image_embed_dim'\]"),
        ({"num_layers": 0}, "`num_dual_layers` to be an integer of at least 1, got num_dual_layers=0"),
        ({"num_single_layers": 2.5}, "num_single_layers=2.5"),
        ({"rope_axes_dim": [16, 56, 58]}, r"sum to head_dim=128, got rope_dims=\(16, 56, 58\) with sum=130"),
        ({"rope_axes_dim": [17, 55, 56]}, r"three even numbers, got rope_dims=\(17, 55, 56\)"),
        ({"rope_axes_dim": [64, 64]}, r"three even numbers, got rope_dims=\(64, 64\)"),
        ({"rope_theta": 1.0}, "`rope_theta` to be above 1, got rope_theta=1.0"),
        ({"mlp_ratio": 0.0}, "`mlp_ratio` to be positive, got mlp_ratio=0.0"),
        ({"patch_size_t": 0}, r"three sizes .* got patch=\(0, 2, 2\)"),
    ],
)
def test_other_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        HunyuanVideoConfig.from_json({**REAL, **change})


def test_latents_must_be_whole_patches():
    for size, message in (((21, 91, 160), "rows a multiple of 2, got rows=91"), ((0, 2, 2), "frames=0")):
        with pytest.raises(ValueError, match=message):
            HunyuanVideoConfig().grid(*size)


def test_released_checkpoint_has_1264_tensors_of_12_8_billion_values():
    config = HunyuanVideoConfig()
    leaves = named_leaves(nnx.state(hunyuan_cases.abstract_model(config), nnx.Param))
    sources = tensor_names(config)
    assert leaves.keys() == sources.keys()
    tensors = [name for source in sources.values() for name in source.tensors()]
    assert len(tensors) == len(set(tensors)) == 1264
    assert sum(leaf.size for leaf in leaves.values()) == 12_821_012_544
    # The names in a file that diffusers wrote, with as many layers as the released one has.
    layers = {"transformer_blocks": 20, "single_transformer_blocks": 40, "refiner_blocks": 2}
    expected = set()
    for name in golden_tensors():
        block = re.fullmatch(r"(.*?)(\w+_blocks)\.\d+\.(.*)", name)
        count = layers[block[2]] if block else 1
        expected |= {f"{block[1]}{block[2]}.{i}.{block[3]}" if block else name for i in range(count)}
    assert set(tensors) == expected


def test_every_tensor_has_the_shape_of_its_parameter():
    stored = {name: tensor.shape for name, tensor in golden_tensors().items()}
    leaves = named_leaves(nnx.state(hunyuan_cases.abstract_model(hunyuan_cases.TINY), nnx.Param))
    ours = {
        tensor: source.stored_shape(tuple(leaves[name].shape))
        for name, source in tensor_names(hunyuan_cases.TINY).items()
        for tensor in source.tensors()
    }
    assert ours == stored


def test_parameters_are_the_tensors_of_the_checkpoint():
    model, stored = hunyuan_video.load(hunyuan_cases.GOLDEN, dtype=jnp.float32), golden_tensors()
    name = "transformer_blocks.1.attn.add_k_proj.weight"
    chex.assert_trees_all_equal(np.asarray(model.dual.attn_text.k.kernel[...][1]), stored[name].astype(np.float32).T)
    patch = stored["x_embedder.proj.weight"].astype(np.float32)
    chex.assert_trees_all_equal(np.asarray(model.x_embedder.kernel[...]), patch.reshape(16, -1).T)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.float32)}


def test_progress_is_told_of_every_parameter():
    told = []
    model = hunyuan_video.load(
        hunyuan_cases.GOLDEN / "transformer", dtype=jnp.bfloat16, progress=lambda *facts: told.append(facts)
    )
    leaves = named_leaves(nnx.state(model, nnx.Param))
    assert {name for name, _, _ in told} == leaves.keys()
    total = sum(leaf.nbytes for leaf in leaves.values())
    assert {facts[2] for facts in told} == {total}
    assert sum(facts[1] for facts in told) == total


def test_what_is_written_is_read_again(tmp_path):
    model = hunyuan_video.load(hunyuan_cases.GOLDEN, dtype=jnp.bfloat16)
    sources, params = tensor_names(hunyuan_cases.TINY), nnx.state(model, nnx.Param)
    save_diffusers(tmp_path, sources, params, golden_config(), num_shards=3)
    again = nnx.state(hunyuan_video.load(tmp_path, dtype=jnp.bfloat16), nnx.Param)
    chex.assert_trees_all_equal(named_leaves(again), named_leaves(params))


def test_image_to_video_checkpoints_are_refused(tmp_path):
    folder = copy_golden(tmp_path, image_condition_type="token_replace")
    with pytest.raises(ValueError, match="text-to-video HunyuanVideo, got image_condition_type='token_replace'"):
        hunyuan_video.load(folder)


def test_checkpoints_without_a_guidance_embedder_need_a_config_that_says_so(tmp_path):
    folder = copy_golden(tmp_path, guidance_embeds=False)
    with pytest.raises(ValueError, match=r"4 \(time_text_embed\.guidance_embedder.* unknown"):
        hunyuan_video.load(folder)


@pytest.mark.parametrize("make", [hunyuan_video.load, hunyuan_video.random], ids=["load", "random"])
def test_other_dtypes_are_refused(make):
    with pytest.raises(ValueError, match="`dtype` to be bfloat16 or float32, got dtype=float16"):
        make(hunyuan_cases.GOLDEN if make is hunyuan_video.load else hunyuan_cases.TINY, dtype=jnp.float16)


def test_random_parameters_follow_the_seed_and_keep_sizes():
    config = dataclasses.replace(hunyuan_cases.TINY, num_heads=8)  # wider: more values to judge by
    first, same, other = (named_leaves(nnx.state(hunyuan_video.random(config, seed=s), nnx.Param)) for s in (1, 1, 2))
    chex.assert_trees_all_equal(first, same)
    for name, leaf in first.items():
        values = np.asarray(leaf).astype(np.float32)
        if name.endswith("kernel"):
            assert not np.array_equal(values, np.asarray(other[name]).astype(np.float32)), name
            # Within five standard errors of 1 / inputs, the rounding to 16 bits included.
            spread = values.std() * np.sqrt(values.shape[-2])
            assert abs(spread - 1) < 5 / np.sqrt(2 * values.size) + 4e-3, name
        else:
            assert np.all(values == name.endswith("scale")), name
    kernel = np.asarray(first["dual.attn.q.kernel"]).astype(np.float32)
    assert not np.array_equal(kernel[0], kernel[1])


def test_random_parameters_are_made_where_they_belong():
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    placed = hunyuan_video.random(
        hunyuan_cases.TINY, sharding=lambda name, _: sharding if name.startswith("dual.") else None
    )
    for name, leaf in named_leaves(nnx.state(placed, nnx.Param)).items():
        assert (leaf.sharding == sharding) == name.startswith("dual."), name
    plain = hunyuan_video.random(hunyuan_cases.TINY)
    chex.assert_trees_all_equal(*(named_leaves(nnx.state(model, nnx.Param)) for model in (placed, plain)))


@pytest.mark.slow
def test_random_activations_stay_finite_in_all_sixty_layers():
    config = dataclasses.replace(hunyuan_cases.TINY, num_dual_layers=20, num_single_layers=40, num_heads=8)
    model = hunyuan_video.random(config, dtype=jnp.bfloat16)
    inputs = hunyuan_cases.make_inputs(config=config)
    velocity = hunyuan_cases.compiled(model)(*inputs).velocity.astype(jnp.float32)
    assert bool(jnp.isfinite(velocity).all())
    assert 0.1 < float(velocity.std()) < 100
