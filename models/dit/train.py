"""Train the video DiT: `python -m fgattn_jax.models.dit.train --help`."""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgattn_jax.models.dit import data, training, weights
from fgattn_jax.models.dit.config import DiTConfig
from fgattn_jax.models.dit.training import TrainConfig, TrainState

LOG = "log.json"
CHECKPOINT = "checkpoint.safetensors"
EMA = "ema.safetensors"
SAMPLES = "samples.png"
_MEASURE_CHUNKS = 8  # chunks timed before `--minutes` fixes the number of steps
_UNKNOWN_STEPS = 1_000_000_000  # before that: the warm-up does not depend on the length of the run


class Trainer:
    """One run: a state, its log and its folder."""

    def __init__(self, out: pathlib.Path, config: TrainConfig, dit: DiTConfig, clips: data.ClipSet, *, remat: bool):
        self.out, self.config, self.dit, self.clips = out, config, dit, clips
        dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
        self.graph, self.state = training.init_state(config, dit, dtype=dtype, remat=remat)
        self.total_steps: int | None = None
        self.log: dict[str, Any] = {
            "config": dataclasses.asdict(config),
            "model": dataclasses.asdict(dit),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "dtype": str(jnp.dtype(dtype)),
            "curve": [],
            "validation": [],
            "seconds": 0.0,
        }

    def resume(self) -> None:
        """Go on from the folder's checkpoint; the rest of the run is the one an uninterrupted run would have made."""
        self.state, facts = training.load_checkpoint(self.out / CHECKPOINT, self.state)
        if facts["config"] != json.loads(json.dumps(self.log["config"])):
            raise ValueError(
                f"The checkpoint was made with config={facts['config']}; resume with the same values, or start anew."
            )
        self.log = facts
        self.total_steps = facts.get("total_steps")

    def chunk(self) -> jax.Array:
        """Dispatch the next steps; the losses come later, without waiting for the device."""
        done = self.steps_done
        config = self.config
        last = self.total_steps if self.total_steps is not None else _UNKNOWN_STEPS
        self.state, losses = training.train_chunk(
            self.state,
            self.clips,
            jnp.asarray(last, jnp.int32),
            graph=self.graph,
            config=config,
            dit=self.dit,
            long=config.is_long(done // config.chunk),
            num_steps=min(config.chunk, last - done),
        )
        self.steps_done = done + losses.shape[0]
        return losses

    def validate(self) -> float:
        """Held-out loss of the averaged parameters."""
        return float(
            training.validation_loss(self.state.ema, self.clips, graph=self.graph, config=self.config, dit=self.dit)
        )

    def save(self) -> None:
        """Write checkpoint, averaged weights, log and a picture of samples."""
        self.log["total_steps"] = self.total_steps
        training.save_checkpoint(self.out / CHECKPOINT, self.state, self.log)
        facts = {name: self.log[name] for name in ("device", "jax", "seconds", "total_steps", "command", "commit")}
        weights.save_weights(self.out / EMA, self.state.ema, self.dit, facts={**facts, "steps": self.steps_done})
        partial = self.out / f"{LOG}.partial"
        partial.write_text(json.dumps(self.log))
        partial.replace(self.out / LOG)
        video = training.sample_grid(self.state.ema, graph=self.graph, dit=self.dit)
        save_strips(self.out / SAMPLES, np.asarray(data.to_uint8(video)))

    def run(self, *, minutes: float | None, log_every: int, save_every: int, validate_every: int) -> None:
        """Train to the end: `total_steps`, or as many steps as fit into `minutes`."""
        self.steps_done = int(self.state.step)
        started, before = time.perf_counter(), self.log["seconds"]
        chunk_ms: list[float] = []
        pending: list[tuple[int, jax.Array]] = []
        reported, reported_at = self.steps_done, started
        while self.total_steps is None or self.steps_done < self.total_steps:
            measuring = self.total_steps is None
            chunk_started = time.perf_counter()
            losses = self.chunk()
            pending.append((self.steps_done, losses))
            if measuring:
                losses.block_until_ready()
                chunk_ms.append(1e3 * (time.perf_counter() - chunk_started))
                if len(chunk_ms) >= 2 * _MEASURE_CHUNKS:
                    assert minutes is not None
                    # The first half holds the compilations; saving and validation get a thirtieth of the time.
                    step_ms = float(np.mean(chunk_ms[_MEASURE_CHUNKS:])) / self.config.chunk
                    left_ms = 6e4 * minutes * (1 - 1 / 30) - 1e3 * (time.perf_counter() - started)
                    steps = self.steps_done + max(int(left_ms / step_ms), 0)
                    self.total_steps = max(steps // self.config.chunk * self.config.chunk, self.steps_done)
                    say(f"{step_ms:.2f} ms a step: {self.total_steps} steps fit into {minutes:g} minutes")
            done = self.steps_done == self.total_steps
            if self.steps_done - reported >= log_every or done:
                values = [(step, np.asarray(part)) for step, part in pending]
                mean = float(np.mean(np.concatenate([part for _, part in values])))
                if not np.isfinite(mean):
                    raise RuntimeError(f"The loss is {mean} at step={self.steps_done}; the last checkpoint is kept.")
                self.log["curve"] += [[step, round(float(part.mean()), 6)] for step, part in values]
                now = time.perf_counter()
                self.log["seconds"] = round(before + now - started, 1)
                step_ms = 1e3 * (now - reported_at) / max(self.steps_done - reported, 1)
                left = (self.total_steps - self.steps_done) * step_ms / 1e3 if self.total_steps is not None else None
                eta = "?" if left is None else f"{left:.0f} s"
                say(f"step {self.steps_done}/{self.total_steps or '?'} loss {mean:.5f} {step_ms:.1f} ms/step ETA {eta}")
                pending, reported, reported_at = [], self.steps_done, now
            if self.steps_done % validate_every < self.config.chunk or done:
                self.log["validation"].append([self.steps_done, round(self.validate(), 6)])
                say(f"step {self.steps_done} validation loss {self.log['validation'][-1][1]:.5f}")
            if (self.steps_done % save_every < self.config.chunk and self.total_steps is not None) or done:
                self.save()


def save_strips(path: pathlib.Path, video: np.ndarray, shown: int = 8) -> None:
    """Write a picture with one row per clip and `shown` frames per row, from `[B, F, Y, X, 3]` 8-bit colours."""
    from PIL import Image

    picks = np.linspace(0, video.shape[1] - 1, shown).round().astype(int)
    rows = [np.concatenate(list(clip[picks]), axis=1) for clip in video]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)


def say(text: str) -> None:
    """Print a progress line at once."""
    print(text, flush=True)


def make_parser() -> argparse.ArgumentParser:
    """The command line of training."""
    parser = argparse.ArgumentParser(
        prog="python -m fgattn_jax.models.dit.train",
        description="Train the small video DiT by flow matching on real clips and generated scenes.",
        epilog="Example, 24 minutes on one H100: python -m fgattn_jax.models.dit.train --clips clips.npz --out run "
        "--minutes 24. The folder then holds ema.safetensors (the model), checkpoint.safetensors (to go on with "
        "--resume), log.json (loss curve) and samples.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder for checkpoint, weights, log, samples")
    parser.add_argument("--clips", type=pathlib.Path, help="clips file of fgattn_jax.models.dit.data; default: decode")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="steps in all")
    length.add_argument("--minutes", type=float, help="measure the speed, then fix the steps to fit this time")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--remat", action="store_true", help="recompute blocks in the backward pass (less memory)")
    parser.add_argument("--commit", default="", help="commit of the code, noted in the log")
    parser.add_argument("--log-every", type=int, default=200, help="steps between progress lines")
    parser.add_argument("--validate-every", type=int, default=2000, help="steps between validation losses")
    parser.add_argument("--save-every", type=int, default=4000, help="steps between checkpoints and samples")
    train, dit = parser.add_argument_group("training"), parser.add_argument_group("model")
    for group, kind in ((train, TrainConfig), (dit, DiTConfig)):
        for field in dataclasses.fields(kind):
            if isinstance(field.default, int | float):
                flag = f"--{field.name.replace('_', '-')}"
                group.add_argument(flag, type=type(field.default), default=field.default, help=f"`{field.name}`")
    return parser


def main(arguments: Sequence[str] | None = None) -> TrainState:
    """Run the command line; gives the final state."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    values = vars(options)
    config = TrainConfig(**{field.name: values[field.name] for field in dataclasses.fields(TrainConfig)})
    dit = DiTConfig(**{f.name: values[f.name] for f in dataclasses.fields(DiTConfig) if f.name in values})
    if options.steps is None and options.minutes is None and not options.resume:
        parser.error("give --steps or --minutes (or --resume)")
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options.out, config, dit, data.load_clips(options.clips), remat=options.remat)
    if options.resume:
        trainer.resume()
    else:
        trainer.log["command"] = " ".join(
            ["python -m fgattn_jax.models.dit.train", *(arguments if arguments is not None else sys.argv[1:])]
        )
    if options.steps is not None:
        trainer.total_steps = options.steps
    trainer.log["commit"] = options.commit or trainer.log.get("commit", "")
    trainer.run(
        minutes=options.minutes,
        log_every=options.log_every,
        save_every=options.save_every,
        validate_every=options.validate_every,
    )
    return trainer.state


if __name__ == "__main__":
    main()
