import contextlib
import dataclasses
import io
import json

import chex
import dit_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from fgattn_jax.models.dit import card, data, load_weights, save_weights, train, training, weights
from fgattn_jax.models.dit.training import TrainConfig

CONFIG = TrainConfig(batch=4, warmup_steps=4, learning_rate=4e-3, long_every=2, chunk=10, scene_share=0.25)
DIT = dit_cases.TINY
FLAGS = [
    text
    for values in (dataclasses.asdict(CONFIG), dataclasses.asdict(DIT))
    for name, value in values.items()
    if isinstance(value, int | float)
    for text in (f"--{name.replace('_', '-')}", str(value))
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 3}, "batch=3"),
        ({"batch": 0}, "batch=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"ema_decay": 1.5}, "ema_decay=1.5"),
        ({"adam_b2": -0.1}, "adam_b2=-0.1"),
        ({"label_dropout": 2.0}, "label_dropout=2.0"),
        ({"scene_share": -1.0}, "scene_share=-1.0"),
        ({"final_share": 1.1}, "final_share=1.1"),
        ({"chunk": 0}, "chunk=0"),
        ({"warmup_steps": 0}, "warmup_steps=0"),
        ({"long_every": -1}, "long_every=-1"),
    ],
)
def test_config_refuses_wrong_values(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_learning_rate_rises_then_falls_to_its_share():
    config = TrainConfig(learning_rate=2.0, warmup_steps=10, final_share=0.1)
    rates = [float(training.learning_rate(config, jnp.int32(step), jnp.int32(110))) for step in (0, 4, 9, 10, 60, 110)]
    np.testing.assert_allclose(rates, [0.2, 1.0, 2.0, 2.0, 1.1, 0.2], rtol=1e-5)


def test_loss_is_the_error_of_the_velocity():
    video, noise = np.random.default_rng(0).normal(size=(2, 2, 4, 16, 16, 3)).astype(np.float32)
    # A new model's velocity is zero: the loss is the mean square of noise - clip.
    loss = training.flow_loss(dit_cases.new_model(), video, jnp.array([0.1, 0.9]), noise, jnp.array([0, 1]))
    np.testing.assert_allclose(loss, np.mean((noise - video).astype(np.float64) ** 2), rtol=1e-5)


def test_weight_decay_touches_matrices_only():
    params = nnx.state(dit_cases.make_model(), nnx.Param)
    optimizer = training._optimizer(dataclasses.replace(CONFIG, weight_decay=0.5))
    updates = jax.jit(lambda p: optimizer.update(jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p)[0])(params)
    moved = {name for name, leaf in weights.named_leaves(updates).items() if float(jnp.abs(leaf).max()) > 0}
    assert moved == {name for name in weights.named_leaves(params) if name.endswith("kernel")}
    assert {"blocks.query_gain", "class_table", "blocks.modulation_table"}.isdisjoint(moved)


def test_long_chunks_come_at_their_turn():
    assert [CONFIG.is_long(chunk) for chunk in range(4)] == [False, True, False, True]
    assert not any(dataclasses.replace(CONFIG, long_every=0).is_long(chunk) for chunk in range(8))


def run_train(folder, clips, *more):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        state = train.main(["--out", str(folder), "--clips", str(clips), *FLAGS, *more])
    return state, printed.getvalue()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return dit_cases.write_clips(tmp_path_factory.mktemp("clips") / "clips.npz")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, clips):
    folder = tmp_path_factory.mktemp("run")
    options = ("--steps", "60", "--log-every", "20", "--validate-every", "30", "--save-every", "20", "--commit", "abc")
    state, printed = run_train(folder, clips, *options)
    return folder, state, printed


def test_training_lowers_the_loss_and_writes_everything(trained):
    folder, state, printed = trained
    log = json.loads((folder / "log.json").read_text())
    losses = [loss for _, loss in log["curve"]]
    assert [step for step, _ in log["curve"]] == [10, 20, 30, 40, 50, 60]
    assert losses[-1] < 0.8 * losses[0]
    assert log["validation"][-1][1] < log["validation"][0][1]
    assert log["total_steps"] == 60
    assert log["commit"] == "abc"
    assert "step 60/60 loss" in printed
    assert "ms/step ETA 0 s" in printed
    assert Image.open(folder / "samples.png").size == (8 * 16, DIT.num_classes * 16)
    model, facts = load_weights(folder / "ema.safetensors")
    assert (model.config, facts["steps"], facts["commit"]) == (DIT, 60, "abc")
    stored, ema = nnx.state(model, nnx.Param), state.ema
    chex.assert_trees_all_close(jax.tree.leaves(stored), jax.tree.leaves(ema), rtol=1e-2)  # bfloat16


def test_resumed_run_equals_an_uninterrupted_one(trained, tmp_path, clips):
    _, whole, _ = trained
    trainer = train.Trainer(tmp_path, CONFIG, DIT, data.load_clips(clips), remat=False)
    trainer.total_steps, trainer.steps_done = 60, 0
    trainer.log |= {"command": "", "commit": ""}
    for _ in range(3):
        trainer.chunk()
    training.save_checkpoint(tmp_path / train.CHECKPOINT, trainer.state, trainer.log | {"total_steps": 60})
    state, _ = run_train(tmp_path, clips, "--resume")
    assert int(state.step) == 60
    chex.assert_trees_all_equal(state, whole)


def test_resuming_with_other_values_is_refused(trained, clips):
    folder, _, _ = trained
    with pytest.raises(ValueError, match="resume with the same values"):
        run_train(folder, clips, "--resume", "--learning-rate", "1e-4")


def test_damaged_checkpoint_is_refused(tmp_path, clips):
    (tmp_path / train.CHECKPOINT).write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        run_train(tmp_path, clips, "--resume")


def test_minutes_become_steps(tmp_path, clips):
    """Time is up when the speed is known: the run ends after the measured chunks, and says so."""
    state, printed = run_train(tmp_path, clips, "--minutes", "0.001", "--log-every", "1000", "--validate-every", "1000")
    assert int(state.step) == 2 * train._MEASURE_CHUNKS * CONFIG.chunk
    assert f"{int(state.step)} steps fit into 0.001 minutes" in printed


def test_length_must_be_given(tmp_path, clips, capsys):
    with pytest.raises(SystemExit):
        run_train(tmp_path, clips)
    assert "give --steps or --minutes" in capsys.readouterr().err


def test_weights_come_back_in_sixteen_bits(tmp_path):
    model = dit_cases.make_model()
    save_weights(tmp_path / "w.safetensors", nnx.state(model, nnx.Param), DIT, facts={"steps": 3})
    read, facts = load_weights(tmp_path / "w.safetensors")
    assert facts == {"steps": 3}
    for before, after in zip(
        jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(nnx.state(read, nnx.Param)), strict=True
    ):
        assert after.dtype == jnp.float32
        chex.assert_trees_all_equal(after, before.astype(jnp.bfloat16).astype(jnp.float32))


def spoiled_files(folder):
    """Weights files, each wrong in its own way, with what the message must say."""
    from safetensors.numpy import save_file

    params = nnx.state(dit_cases.make_model(), nnx.Param)
    arrays = {name: np.asarray(leaf) for name, leaf in weights.named_leaves(params).items()}
    header = {"format": weights.FORMAT, "config": DIT.to_json(), "facts": "{}"}
    (folder / "cut").write_bytes(b"\x10" * 40)
    save_file(arrays, str(folder / "format"), metadata=header | {"format": "other"})
    save_file(arrays, str(folder / "config"), metadata=header | {"config": "{}"})
    save_file({k: v for k, v in arrays.items() if k != "class_table"}, str(folder / "lacks"), metadata=header)
    save_file(arrays | {"more": np.zeros(1)}, str(folder / "more"), metadata=header)
    save_file(arrays | {"class_table": np.zeros((1, 2))}, str(folder / "shape"), metadata=header)
    return {
        "missing": "cannot be read",
        "cut": "cannot be read",
        "format": "format='other', expected 'fgattn_jax.dit.v1'",
        "config": "The config must have the fields",
        "lacks": r"missing \['class_table'\]",
        "more": r"not expected \['more'\]",
        "shape": r"`class_table` must have shape \(5, 32\), got \(1, 2\)",
    }


def test_spoiled_weights_are_named(tmp_path):
    for name, message in spoiled_files(tmp_path).items():
        with pytest.raises(ValueError, match=message):
            load_weights(tmp_path / name)


def test_card_tells_the_facts_of_a_run(trained, tmp_path):
    folder, _, _ = trained
    path = tmp_path / "CARD.md"
    path.write_text(f"# Card\n{card.BEGIN}\nold\n{card.END}\nrest\n")
    files = ["--log", folder / "log.json", "--weights", folder / "ema.safetensors", "--plot", tmp_path / "loss.png"]
    with contextlib.redirect_stdout(io.StringIO()):
        card.main([*map(str, files), "--card", str(path)])
    text = path.read_text()
    assert "| steps | 60 (180 clips) |" in text  # half of the steps take half a batch of 4
    assert "`abc`" in text
    assert "old" not in text
    assert text.endswith("rest\n")
    assert Image.open(tmp_path / "loss.png").size[0] > 400


def test_card_refuses_what_is_no_card_or_log(tmp_path):
    with pytest.raises(ValueError, match="once each"):
        card.insert_facts("no marks", "table")
    (tmp_path / "log.json").write_text("{}")
    with pytest.raises(ValueError, match="is no training log"):
        card.read_log(tmp_path / "log.json")
