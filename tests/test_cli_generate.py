"""`fgattn generate` without torch: random weights, embeddings from files, reports, and what it refuses."""

import argparse
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from fgattn_jax.cli import _generate_families, _generate_options, _generate_progress, generate
from fgattn_jax.cli.main import main
from fgattn_jax.models.video import stage_files
from fgattn_jax.models.video.stage_files import PromptEmbeddings, SavedLatents

WAN = Path(__file__).parent / "golden" / "wan"
HUNYUAN = Path(__file__).parent / "golden" / "hunyuan_video"
TEXT_DIM = json.loads((WAN / "transformer" / "config.json").read_text())["text_dim"]
SMALL = ["--size", "48x64", "--frames", "5", "--steps", "3"]


def options(*argv: str) -> argparse.Namespace:
    """The options as the command line reads them."""
    parser = argparse.ArgumentParser()
    generate.add_parser(parser.add_subparsers(dest="command"))
    return parser.parse_args(["generate", *argv])


def job_of(*argv: str) -> _generate_options.GenerateJob:
    job = _generate_options.read_options(options(*argv))
    assert isinstance(job, _generate_options.GenerateJob)
    return job


def wan_embeddings(*, width: int = TEXT_DIM, branches: int = 2) -> PromptEmbeddings:
    rng = np.random.default_rng(0)
    texts = [rng.standard_normal((1, 512, width), np.float32) for _ in range(branches)]
    return PromptEmbeddings("wan", "a cat", "" if branches == 2 else None, tuple({"text": text} for text in texts))


@pytest.fixture
def embeddings(tmp_path):
    stage_files.save_embeddings(tmp_path / "text.safetensors", wan_embeddings())
    return tmp_path / "text.safetensors"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison on the tiny HunyuanVideo: its output, its report, its latents."""
    folder = tmp_path_factory.mktemp("compared")
    argv = ["generate", "--random-weights", "hunyuan-tiny", "--steps", "5", "--seed", "3", "--compare-dense"]
    argv += ["--dense-steps", "1", "--refresh-every", "3", "--dense-layers", "0", "--density", "0.2"]
    argv += ["--query-block", "16", "--query-order", "raster"]
    argv += ["--report", str(folder / "run.json"), "--latents-out", str(folder / "latents.safetensors")]
    with pytest.MonkeyPatch.context() as patch:
        screen, errors = io.StringIO(), io.StringIO()
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", errors)
        assert main(argv) == 0
    return screen.getvalue(), errors.getvalue(), json.loads((folder / "run.json").read_text()), folder


def test_a_comparison_reports_both_runs(compared):
    _, _, report, _ = compared
    assert set(report["runs"]) == {"cached", "dense"}
    cached, dense = report["runs"]["cached"], report["runs"]["dense"]
    assert [step["kind"] for step in cached["steps"]] == ["dense", "refresh", "cached", "cached", "refresh"]
    assert {step["kind"] for step in dense["steps"]} == {"dense"}
    assert dense["density"] == 1.0
    density = np.array(cached["density_by_step_and_layer"])
    assert density.shape == (5, 3)
    np.testing.assert_array_equal(density[[0, 1, 4]], 1.0)
    # Layer 0 is dense. 144 video tokens, 9 rows: each keeps a fifth of them and the text, and text rows keep all that
    # is valid; 96 of 256 text tokens are.
    rows = np.r_[np.full(9, 29 + 96), np.full(16, 144 + 96)]
    np.testing.assert_allclose(density[2], [1.0, *[rows.mean() / 400] * 2], atol=0.01)
    assert cached["density_of_cached_steps"] == pytest.approx(density[2:4].mean(), abs=1e-5)
    for run in (cached, dense):
        assert run["seconds_of_steps"] == pytest.approx(sum(step["seconds"] for step in run["steps"]))
        assert 0 < run["seconds_of_steps"] < run["seconds"]
        assert not run["first_step_compiled"]
    # Something was skipped, and it is not another model.
    assert 1e-6 < report["comparison"]["latents_relative_error"] < 0.5
    assert report["comparison"]["speed_of_steps"] > 0


def test_the_report_says_where_it_comes_from(compared):
    _, _, report, _ = compared
    assert {"device", "commit", "date", "command", "versions", "peak_host_bytes"} <= set(report)
    assert report["versions"]["jax"]
    settings = report["settings"]
    assert settings["random_weights"] is True
    assert (settings["tokens"], settings["layers"], settings["heads"]) == (144, 3, 2)
    assert settings["scheduler"] == {"name": "FlowEuler", "shift": 7.0}
    assert settings["masks"]["dense_layers"] == [0]
    assert settings["implementation"]["masked"].startswith("xla")
    assert settings["implementation"]["dense"].endswith("all valid keys kept")
    # 3 layers of 2 heads, 25 rows of 16 queries, 400 keys in 16 words of 4 bytes.
    assert settings["kept_mask_bytes"] == 3 * 2 * 25 * 16 * 4
    assert report["options"]["density"] == 0.2
    assert "tau" not in report["options"]


def test_the_screen_shows_steps_and_speed(compared):
    screen, errors, _, folder = compared
    for words in ("HunyuanVideo (hunyuan-tiny, random weights)", "exact-mass, 0.2 of the keys", "2 .. 3", "cached"):
        assert words in screen
    assert "times as fast" in screen
    assert str(folder / "run.json") in screen
    assert "cached: step 5 of 5, refresh, density 1.000" in errors
    assert "dense: step 1 of 5, dense" in errors


def test_latents_are_kept_with_what_made_them(compared):
    *_, folder = compared
    saved = stage_files.load_latents(folder / "latents.safetensors")
    assert saved.family == "hunyuan_video"
    assert saved.latents.shape == (1, 16, 3, 12, 16)
    assert np.isfinite(saved.latents).all()
    assert saved.facts["seed"] == 3


def test_embeddings_from_a_file_need_no_torch(embeddings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_generate_options, "_TORCH_MODULES", ("a_module_that_is_not_there",))
    out = tmp_path / "latents.safetensors"
    argv = ["generate", "--model", str(WAN), "--from-embeddings", str(embeddings), "--latents-out", str(out), *SMALL]
    assert main([*argv, "--attention", "mean-query", "--density", "0.5", "--query-block", "16"]) == 0
    printed = capsys.readouterr().out
    assert f"fgattn generate --model {WAN} --decode {out} --out" in printed
    latents = stage_files.load_latents(out).latents
    assert latents.shape == (1, 4, 2, 6, 8)
    # Masks are made at every step, and the step that makes them attends under them.
    assert "refresh" in printed
    assert "density 0.5" in printed
    # The loop moves the noise.
    assert latents.std() > 0.1


REFUSED_WITH_RANDOM = [
    (["--random-weights", "wan-tiny", "--model", "x"], "got both"),
    (["--steps", "4"], "got neither"),
    (["--random-weights", "wan-tiny", "--prompt", "a cat"], "`--prompt` has no effect with `--random-weights`"),
    (["--random-weights", "wan-tiny", "--out", "x.mp4"], "no `--out` with `--random-weights`"),
    (["--random-weights", "wan-tiny", "--steps", "0"], "steps=0"),
    (["--random-weights", "wan-tiny", "--frames", "8"], "frames=8"),
    (["--random-weights", "wan-tiny", "--frames", "-3"], "frames=-3"),
    (["--random-weights", "wan-tiny", "--size", "480"], "`--size` as HxW"),
    (["--random-weights", "wan-tiny", "--size", "100x128"], "try 96x128"),
    (["--random-weights", "wan-tiny", "--size", "0x128"], "multiples of 16"),
    (["--random-weights", "wan-tiny", "--guidance", "nan"], "finite `--guidance`"),
    (["--random-weights", "wan-tiny", "--true-guidance", "2"], "`--true-guidance` is for HunyuanVideo"),
    (["--random-weights", "wan-tiny", "--flow-shift", "0"], "flow_shift=0"),
    (["--random-weights", "wan-tiny", "--seed", "-1"], "seed=-1"),
    (["--random-weights", "wan-tiny", "--dtype", "float32", "--match-diffusers-bf16"], "`--dtype bfloat16`"),
    (["--random-weights", "wan-tiny", "--attention", "dense", "--tau", "1"], "`--tau` has no effect with"),
    (["--random-weights", "wan-tiny", "--attention", "dense", "--compare-dense"], "`--compare-dense` has no effect"),
    (["--random-weights", "wan-tiny", "--tau", "1", "--mass", "0.9"], "got `--tau`, `--mass`: drop one"),
    (["--random-weights", "wan-tiny", "--tau", "1", "--predictor", "exact-mass"], "`exact-mass` takes `--mass`"),
    (["--random-weights", "wan-tiny", "--mass", "0.9", "--predictor", "exact"], "`exact` takes `--tau`"),
    (["--random-weights", "wan-tiny", "--tau", "-1"], "tau=-1"),
    (["--random-weights", "wan-tiny", "--mass", "1.5"], "mass=1.5"),
    (["--random-weights", "wan-tiny", "--density", "0"], "density=0"),
    (["--random-weights", "wan-tiny", "--top-k", "145"], "1 .. 144"),
    (["--random-weights", "wan-tiny", "--refresh-every", "0"], "refresh_every=0"),
    (["--random-weights", "wan-tiny", "--attention", "mean-query", "--refresh-every", "5"], "refresh_every=5"),
    (["--random-weights", "wan-tiny", "--attention", "mean-query", "--predictor", "exact"], "predictor=exact"),
    (["--random-weights", "wan-tiny", "--steps", "4", "--dense-steps", "4"], "dense_steps=4"),
    (["--random-weights", "wan-tiny", "--dense-layers", "2"], "layer=2"),
    (["--random-weights", "wan-tiny", "--dense-layers", "all"], "got 'all'"),
    (["--random-weights", "hunyuan-tiny", "--shared-masks"], "`--shared-masks` has no effect"),
    (["--random-weights", "wan-tiny", "--query-order", "spiral"], "'spiral'"),
    (["--random-weights", "wan-tiny", "--report", "no/such/folder/run.json"], "existing folder"),
    (["--random-weights", "wan-tiny", "--report", "."], "is a folder"),
    (["--random-weights", "wan-tiny", "--fps", "8"], "`--fps` has no effect"),
    (["--random-weights", "wan-tiny", "--attention", "mean-query", "--masks-on-host"], "`--masks-on-host` has no"),
    (["--random-weights", "wan-tiny", "--vae-dtype", "float16"], "`--vae-dtype` has no effect"),
    (
        ["--random-weights", "wan-1.3b-480p", "--devices", "8"],
        "divides the 12 heads of this model, got devices=8: take 6",
    ),
    (["--random-weights", "wan-tiny", "--devices", "0"], "got devices=0: take 1"),
    (["--random-weights", "wan-tiny", "--divide", "heads"], "`--divide` has no effect on one device"),
    (["--random-weights", "wan-tiny", "--split-weights"], "`--split-weights` has no effect on one device"),
    (
        ["--random-weights", "wan-tiny", "--devices", "2", "--divide", "heads", "--split-weights"],
        "`--split-weights` has no effect with `--divide heads`",
    ),
    (["--random-weights", "wan-tiny", "--devices", "2", "--masks-on-host"], "with `--devices`, got `--masks-on-host`"),
    (["--random-weights", "wan-tiny", "--latents-out", "a", "--report", "a"], "different files"),
]


def refused(capsys, *argv: str) -> str:
    """A call that must fail before anything runs; its only line on standard error."""
    assert main(["generate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_more_devices_than_there_are_end_in_one_line(capsys):
    # Seen when the first array is made: text encoders in torch had the GPU before.
    assert main(["generate", "--random-weights", "wan-tiny", "--devices", "2"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "expected 1 to 1 devices, got num_devices=2: JAX finds no more here" in said[-1]


@pytest.mark.parametrize(("argv", "words"), REFUSED_WITH_RANDOM, ids=lambda value: " ".join(value)[-40:])
def test_wrong_options_end_in_one_line(capsys, argv, words):
    assert words in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "one of `--prompt TEXT` and `--from-embeddings FILE`, got neither"),
        (["--prompt", "a", "--from-embeddings", "TEXT"], "got both"),
        (["--prompt", "  ", "--out", "x.gif"], "an empty one"),
        (["--from-embeddings", "TEXT"], "got neither"),
        (
            ["--from-embeddings", "TEXT", "--negative-prompt", "a", "--out", "x.gif"],
            "`--negative-prompt` has no effect",
        ),
        (["--from-embeddings", "TEXT", "--save-embeddings", "a"], "expected `--prompt TEXT`"),
        (["--from-embeddings", "TEXT", "--latents-out", "x", "--fps", "3"], "`--fps` has no effect without `--out`"),
        (["--from-embeddings", "missing", "--latents-out", "x"], "got 'missing'"),
        (["--from-embeddings", "TEXT", "--latents-out", "TEXT"], "different files"),
        (["--from-embeddings", "TEXT", "--out", "x.gif"], "pip install 'fgattn-jax[torch]'"),
        (["--prompt", "a cat", "--latents-out", "x"], "give `--from-embeddings FILE`"),
        (["--prompt", "a cat", "--save-embeddings", "x"], "pip install 'fgattn-jax[torch]'"),
        (["--prompt", "a", "--negative-prompt", "b", "--guidance", "1", "--latents-out", "x"], "without `--guidance`"),
        (["--save-embeddings", "x"], "expected `--prompt TEXT`"),
        (["--prompt", "a cat", "--save-embeddings", "x", "--steps", "3"], "`--steps` has no effect with"),
        (["--decode", "TEXT"], "`--out FILE` with `--decode`"),
        (["--decode", "TEXT", "--out", "x.gif", "--prompt", "a"], "`--prompt` has no effect with `--decode`"),
        (["--decode", "TEXT", "--out", "x.gif"], "decode on a machine that has it"),
    ],
    ids=lambda value: " ".join(value)[-40:],
)
def test_wrong_combinations_of_stages_end_in_one_line(embeddings, capsys, monkeypatch, argv, words):
    monkeypatch.setattr(_generate_options, "_TORCH_MODULES", ("a_module_that_is_not_there",))
    argv = [str(embeddings) if word == "TEXT" else word for word in argv]
    assert words in refused(capsys, "--model", str(WAN), *argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", "a cat", "--out", "x.mp3"], "text encoders"),
        (["--from-embeddings", "TEXT", "--out", "x.gif"], "expected the VAE"),
    ],
)
def test_folders_that_a_stage_needs_are_asked_for_first(embeddings, capsys, monkeypatch, argv, words):
    monkeypatch.setattr(_generate_options, "_TORCH_MODULES", ())
    argv = [str(embeddings) if word == "TEXT" else word for word in argv]
    err = refused(capsys, "--model", str(WAN), *argv)
    assert words in err
    assert "missing are" in err


def test_clips_must_be_mp4_or_gif(tmp_path, embeddings, capsys, monkeypatch):
    monkeypatch.setattr(_generate_options, "_TORCH_MODULES", ())
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    (tmp_path / "transformer").symlink_to(WAN / "transformer")
    argv = ["--model", str(tmp_path), "--from-embeddings", str(embeddings)]
    assert ".mp4 or .gif, got 'x.mp3'" in refused(capsys, *argv, "--out", "x.mp3")


def test_directories_that_are_no_checkpoint_are_named(tmp_path, capsys):
    argv = ["--prompt", "a cat", "--latents-out", "x"]
    assert "none" in refused(capsys, "--model", str(tmp_path / "none"), *argv)
    (tmp_path / "transformer").mkdir()
    config = json.loads((WAN / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(
        json.dumps(config | {"_class_name": "FluxTransformer2DModel"})
    )
    assert "FluxTransformer2DModel" in refused(capsys, "--model", str(tmp_path), *argv)
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | {"image_dim": 1280}))
    assert "image" in refused(capsys, "--model", str(tmp_path), *argv)
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.9}))
    assert "Wan 2.2" in refused(capsys, "--model", str(tmp_path), *argv)


def test_embeddings_must_fit_the_model_and_its_guidance(tmp_path, capsys):
    path = tmp_path / "text.safetensors"
    argv = ["--from-embeddings", str(path), "--latents-out", str(tmp_path / "latents")]
    stage_files.save_embeddings(path, wan_embeddings(branches=1))
    assert "a prompt and a negative prompt" in refused(capsys, "--model", str(WAN), *argv, *SMALL)
    assert "embeddings of hunyuan_video" in refused(capsys, "--model", str(HUNYUAN), *argv, *SMALL)
    stage_files.save_embeddings(path, wan_embeddings(width=TEXT_DIM + 1))
    assert main(["generate", "--model", str(WAN), *argv, *SMALL]) == 2
    assert f"width {TEXT_DIM} for this model" in capsys.readouterr().err
    path.write_bytes(b"no embeddings" * 9)
    assert "no safetensors file" in refused(capsys, "--model", str(WAN), *argv)
    stage_files.save_latents(path, SavedLatents("wan", np.zeros((1, 4, 2, 6, 8), np.float32), {}))
    assert "prompt embeddings" in refused(capsys, "--model", str(WAN), *argv)


@pytest.mark.parametrize(
    ("name", "tokens", "shift", "frames", "guidance", "branches"),
    [
        ("wan-1.3b-480p", 32760, 3.0, 81, 5.0, 2),
        ("wan-1.3b-720p", 75600, 5.0, 81, 5.0, 2),
        ("wan-14b-480p", 32760, 3.0, 81, 5.0, 2),
        ("wan-14b-720p", 75600, 5.0, 81, 5.0, 2),
        ("hunyuan-544p", 67320, 7.0, 129, 6.0, 1),
        ("hunyuan-720p", 118800, 7.0, 129, 6.0, 1),
    ],
)
def test_defaults_are_those_of_diffusers(name, tokens, shift, frames, guidance, branches):
    job = job_of("--random-weights", name)
    assert math.prod(job.grid) == tokens
    scheduler = _generate_families.scheduler(job.facts, job.model, job.flow_shift, job.size)
    assert (getattr(scheduler, "flow_shift", None) or scheduler.shift) == shift
    assert (job.steps, job.frames, job.guidance, job.num_branches) == (50, frames, guidance, branches)
    assert (job.masks.method, job.masks.predictor, job.masks.rule, job.masks.amount) == (
        "cached",
        "exact-mass",
        "density",
        0.35,
    )


def test_kept_masks_take_what_the_documents_say():
    from fgattn_jax.cli import _generate_run

    gigabytes = {
        ("wan-1.3b-480p",): 0.703,
        ("wan-14b-720p",): 16.7,
        ("wan-14b-720p", "--shared-masks"): 8.34,
        ("hunyuan-720p",): 18.6,
        ("wan-14b-720p", "--attention", "mean-query"): 0.0,
    }
    for argv, wanted in gigabytes.items():
        assert _generate_run.mask_bytes(job_of("--random-weights", *argv)) / 2**30 == pytest.approx(wanted, rel=0.02)


def test_masks_of_checkpoints_follow_the_paper_unless_told(embeddings, tmp_path):
    argv = ["--model", str(WAN), "--from-embeddings", str(embeddings), "--latents-out", str(tmp_path / "x"), *SMALL]
    masks = job_of(*argv).masks
    assert (masks.predictor, masks.rule, masks.amount) == ("exact", "tau", 0.5)
    assert (masks.refresh_every, masks.dense_steps, masks.query_block) == (15, 0, 128)
    predictor = masks.predictor_for((2, 3, 4))
    assert (predictor.statistic, predictor.budget.threshold) == ("peak", 0.5 / 24)
    assert job_of(*argv, "--mass", "0.9").masks.predictor == "exact-mass"
    pooled = job_of(*argv, "--attention", "mean-query").masks
    assert (pooled.predictor, pooled.rule, pooled.amount, pooled.refresh_every) == ("mean-query", "tau", 0.1, 1)
    assert job_of(*argv, "--density", "0.26").masks.predictor_for((2, 3, 4)).budget.top_k == 6
    raster = job_of(*argv, "--query-order", "raster").masks
    assert raster.predictor_for((2, 3, 4)).query_order is None


def test_guidance_of_one_is_one_forward(embeddings, tmp_path):
    argv = ["--model", str(WAN), "--from-embeddings", str(embeddings), "--latents-out", str(tmp_path / "x"), *SMALL]
    job = job_of(*argv, "--guidance", "1")
    assert (job.num_branches, job.negative_prompt) == (1, None)
    assert job_of("--random-weights", "hunyuan-tiny", "--true-guidance", "3").num_branches == 2


def test_files_of_stages_come_back_as_they_were(tmp_path):
    path = tmp_path / "text.safetensors"
    rng = np.random.default_rng(1)
    branch = {
        "text": rng.standard_normal((1, 256, 8), np.float32),
        "lengths": np.array([7], np.int32),
        "pooled": rng.standard_normal((1, 6), np.float32),
    }
    stage_files.save_embeddings(path, PromptEmbeddings("hunyuan_video", "a \u00fcber-cat", None, (branch,)))
    again = stage_files.load_embeddings(path)
    assert (again.family, again.prompt, again.negative_prompt) == ("hunyuan_video", "a \u00fcber-cat", None)
    for name, array in branch.items():
        np.testing.assert_array_equal(again.branches[0][name], array)
        assert again.branches[0][name].dtype == array.dtype
    latents = rng.standard_normal((1, 4, 2, 6, 8), np.float32)
    stage_files.save_latents(path, SavedLatents("wan", latents, {"seed": 4, "prompt": None}))
    saved = stage_files.load_latents(path)
    np.testing.assert_array_equal(saved.latents, latents)
    assert saved.facts == {"seed": 4, "prompt": None}
    assert not list(tmp_path.glob("*.partial"))


def test_wrong_arrays_of_embeddings_are_named():
    good = wan_embeddings().branches[0]
    hunyuan = {"text": np.zeros((1, 9, 4)), "lengths": np.array([10]), "pooled": np.zeros((1, 3))}
    for wrong, words in (
        (("wan", "", None, (good, good)), "expected 1 branches"),
        (("wan", "", None, ({"text": good["text"], "pooled": good["text"]},)), r"\['text'\]"),
        (("wan", "", None, ({"text": good["text"][0]},)), "3 axes"),
        (("hunyuan_video", "", None, (hunyuan,)), r"0 \.\. 9, got 10"),
    ):
        with pytest.raises(ValueError, match=words):
            PromptEmbeddings(*wrong)


def test_options_and_text_are_read_without_a_device(embeddings, run_python):
    """JAX takes most of a GPU when it finds it, and torch comes first."""
    out = run_python(
        f"""
import sys; sys.path.insert(0, "tests")
from test_cli_generate import job_of
from fgattn_jax.cli import _generate_stages
job = job_of("--model", {str(WAN)!r}, "--from-embeddings", {str(embeddings)!r}, "--latents-out", "x", "--size", "48x64")
print(_generate_stages._embeddings(job, {{}}).family)
""",
        platform="there_is_no_such_platform",
    )
    assert out.strip() == "wan"


def test_a_device_given_back_can_be_used_again(run_python):
    """On a GPU, torch needs the memory that JAX's client holds; afterwards frames are compared by JAX."""
    out = run_python(
        """
import jax, jax.numpy as jnp
from fgattn_jax.cli import _generate_run
double = jax.jit(lambda x: 2 * x)
before = double(jnp.ones(3))
client = jax.devices()[0].client
name = jax.default_backend
jax.default_backend = lambda: "gpu"
_generate_run.release_device()
jax.default_backend = name
assert jax.devices()[0].client is not client
print(double(jnp.ones(3)).sum())
"""
    )
    assert out.strip() == "6.0"


@pytest.mark.torch  # the lane that installs the extra `video`
def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def steps(stream) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        with _generate_progress.steps_progress("cached", 30) as advance:
            for step in range(30):
                advance(step, "refresh" if step == 0 else "cached", 0.25, 1.5)
        with _generate_progress.leaves_progress("weights") as advance:
            advance("a.kernel", 2**21, 2**21)
        return stream.getvalue()

    lines = steps(io.StringIO()).splitlines()
    assert lines[0].startswith("cached: step 1 of 30, refresh, density 0.250, 1.50 s a step")
    assert len(lines) == 11
    pytest.importorskip("tqdm", reason="bars need the extra `video`")
    bar = steps(Terminal())
    assert "30/30" in bar
    assert "density 0.250, 1.50 s a step" in bar
    assert "weights: 100%" in bar
