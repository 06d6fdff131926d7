"""Video models on four emulated devices: the same clip, each device with its own heads, tokens and weights."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from fgattn_jax.models.video.sharding import VideoSharding, make_mesh
from fgattn_jax.models.video.slice_masks import SliceMasks
from fgattn_jax.predictors import Budget, ExactPredictor

PROGRAMS = Path(__file__).parent / "programs"
slow = pytest.mark.slow
CASES = [
    ("wan", "cached", "tokens", "odd", "split"),
    pytest.param("hunyuan", "cached", "heads", "even", "whole", marks=slow),
    pytest.param("wan", "dense", "tokens", "even", "whole", marks=slow),
    pytest.param("wan", "mean", "heads", "odd", "whole", marks=slow),
    pytest.param("wan", "cached", "heads", "even", "whole", marks=slow),
    pytest.param("hunyuan", "mean", "tokens", "odd", "split", marks=slow),
    pytest.param("hunyuan", "cached", "tokens", "even", "whole", marks=slow),
    pytest.param("hunyuan", "dense", "heads", "odd", "whole", marks=slow),
]


@pytest.mark.multidevice
@pytest.mark.parametrize(("family", "attention", "divide", "grid", "weights"), CASES)
def test_four_devices_make_the_clip_of_one(run_python, family, attention, divide, grid, weights):
    words = [family, attention, divide, grid, weights]
    program = PROGRAMS / "sharded_video.py"
    code = f"import runpy, sys; sys.argv[1:] = {words!r}; runpy.run_path({str(program)!r}, run_name='__main__')"
    got = json.loads(run_python(code, devices=4, timeout=280).splitlines()[-1])
    assert got["difference"] < 1e-5
    assert got["density"] < 1e-6
    assert got["own_mask_share"] == (0.25 if attention == "cached" else None)
    assert got["compilations"] == (1 if (family, attention) == ("hunyuan", "cached") else 0)
    found, num_tokens = got["collectives"], {"even": 32, "odd": 45}[grid]
    if divide == "tokens":
        # Products run on a quarter of the tokens where these divide; queries, keys, values and outputs change hands.
        assert got["linear_rows"] == (num_tokens // 4 if grid == "even" and family == "wan" else got["linear_rows"])
        assert found["all-to-all"] >= 4
        assert got["own_weights_share"] == (1.0 if weights == "whole" else pytest.approx(0.27, abs=0.03))
    else:
        assert got["linear_rows"] >= num_tokens
        assert found["all-to-all"] == found["all-gather"] == 0 or family == "hunyuan"
        assert found["all-reduce"] >= 2
        assert got["own_weights_share"] < 0.6


@pytest.mark.multidevice
@slow
def test_two_processes_make_the_clip_of_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    env["PYTHONPATH"] = os.pathsep.join([str(PROGRAMS.parents[1]), str(PROGRAMS), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(PROGRAMS / "video_processes.py"), str(port)]
    started = [
        subprocess.Popen([*command, number], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for number in "01"
    ]
    try:
        said = [process.communicate(timeout=280)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 and "same" in text for process, text in zip(started, said, strict=True)), said


def test_weights_are_divided_by_heads_or_along_their_longest_axis():
    mesh = make_mesh(1)
    heads, tokens = VideoSharding(mesh, "heads"), VideoSharding(mesh, split_weights=True)
    assert heads.parameter("blocks.attn1.q.kernel", (30, 1536, 1536)).spec == P(None, None, "devices")
    assert heads.parameter("blocks.attn1.q.bias", (30, 1536)).spec == P(None, "devices")
    assert heads.parameter("blocks.attn1.out.kernel", (30, 1536, 1536)).spec == P(None, "devices", None)
    assert heads.parameter("blocks.attn1.out.bias", (30, 1536)).spec == P()
    assert heads.parameter("single.out.kernel", (40, 15360, 3072)).spec == P(None, "devices", None)
    assert heads.parameter("time_proj.kernel", (1536, 9216)).spec == P()
    assert tokens.parameter("blocks.ffn.up.kernel", (30, 1536, 8960)).spec == P(None, None, "devices")
    assert tokens.parameter("blocks.attn1.q.bias", (30, 1536)).spec == P(None, "devices")
    assert tokens.parameter("proj_out.kernel", (1536, 64)).spec == P("devices", None)
    assert tokens.parameter("proj_out.bias", (64,)).spec == P()
    assert VideoSharding(mesh).parameter("blocks.ffn.up.kernel", (30, 1536, 8960)).spec == P()


def test_refuses():
    device = jax.devices()[0]
    with pytest.raises(ValueError, match=r"mesh of one axis, got \('a', 'b'\)"):
        VideoSharding(Mesh(np.array([[device]]), ("a", "b"), axis_types=(AxisType.Auto,) * 2))
    with pytest.raises(ValueError, match="mesh of one axis, got list"):
        VideoSharding([device])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'heads' or 'tokens' for `divide`, got divide='frames'"):
        VideoSharding(make_mesh(1), divide="frames")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`split_weights` has no effect with divide='heads'"):
        VideoSharding(make_mesh(1), "heads", split_weights=True)
    with pytest.raises(ValueError, match="got num_devices=0"):
        make_mesh(0)
    with pytest.raises(ValueError, match="JAX finds no more here"):
        make_mesh(1000)
    sharding = VideoSharding(make_mesh(1))
    predictor = ExactPredictor(16, query_order=np.stack([np.arange(4)] * 2)[None])
    with pytest.raises(ValueError, match="got query orders per head"):
        sharding.check(2, SliceMasks(predictor))
    with pytest.raises(ValueError, match="got thresholds per head"):
        sharding.check(2, SliceMasks(ExactPredictor(16, budget=Budget(threshold=(0.1, 0.2)))))
    with pytest.raises(ValueError, match="got on_host=True"):
        sharding.check(2, SliceMasks(ExactPredictor(16), on_host=True))


@pytest.mark.multidevice
def test_heads_that_do_not_divide_are_refused(run_python):
    code = """
from fgattn_jax.models.video.sharding import VideoSharding, make_mesh
try:
    VideoSharding(make_mesh(4)).check(6)
except ValueError as error:
    print(error)
"""
    said = run_python(code, devices=4)
    assert "divides num_heads=6, got 4: take 3 of them, `make_mesh(3)`" in said
