"""Writes tests/golden/schedulers/schedulers.npz: what diffusers' schedulers give, for tests where there is no torch.

    python tests/programs/make_scheduler_golden.py [FILE]

Arrays, `NAME` being `unipc` or `euler` and `SHIFT` the shift:

    NAME/SHIFT/timesteps, NAME/SHIFT/sigmas   of runs of 1 .. 60 steps, one after the other; without the last sigma
    NAME/conditional, NAME/unconditional      velocities of every step of a run of 20 steps, which bfloat16 holds
    NAME/float32, NAME/bfloat16               latents: the start, then after every step, with CFG 5 in that dtype
"""

import functools
import sys
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler  # pyright: ignore[reportMissingImports]

SHIFTS = {"unipc": (1.0, 3.0, 5.0), "euler": (1.0, 7.0)}
MOST_STEPS = 60
STEPS, GUIDANCE = 20, 5.0
SHAPE = (1, 2, 2, 3, 4)
FILE = Path(__file__).resolve().parent.parent / "golden" / "schedulers" / "schedulers.npz"


class GpuFactor(torch.Tensor):
    """A sigma that multiplies 16-bit tensors as it does on a GPU: in float32, and the product is rounded.

    On a CPU, torch rounds a 0-dimensional tensor first where it stands before the operator (2.13), as sigmas do in
    diffusers, and keeps it where it stands behind. Its kernel for GPUs reads it as float32 in both places.
    """

    def __mul__(self, other):
        return other * self.as_subclass(torch.Tensor) if isinstance(other, torch.Tensor) else super().__mul__(other)


def multiply_as_on_gpus(made) -> None:
    """Let the sigmas of a scheduler multiply as they do on a GPU, now and whenever timesteps are set."""
    set_timesteps = made.set_timesteps

    @functools.wraps(set_timesteps)
    def wrapped(*arguments, **settings):
        set_timesteps(*arguments, **settings)
        made.sigmas = made.sigmas.as_subclass(GpuFactor)

    made.set_timesteps = wrapped
    made.sigmas = made.sigmas.as_subclass(GpuFactor)


def scheduler(name: str, shift: float, steps: int):
    """A scheduler of diffusers, as the pipeline of the model sets it up."""
    if name == "unipc":
        made = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        made.set_timesteps(steps)
    else:
        made = FlowMatchEulerDiscreteScheduler(shift=shift)
        made.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    made.set_begin_index(0)
    return made


def run(name: str, conditional: np.ndarray, unconditional: np.ndarray, start: np.ndarray, dtype) -> np.ndarray:
    """Latents before the first and after every step, with the velocities and their combination in `dtype`."""
    made = scheduler(name, SHIFTS[name][1], STEPS)
    multiply_as_on_gpus(made)
    latents = [torch.from_numpy(start)]
    for timestep, *pair in zip(made.timesteps, conditional, unconditional, strict=True):
        yes, no = (torch.from_numpy(velocity).to(dtype) for velocity in pair)
        latents.append(made.step(no + GUIDANCE * (yes - no), timestep, latents[-1], return_dict=False)[0])
    return torch.stack([x.float().as_subclass(torch.Tensor) for x in latents]).numpy()


def velocities(random: np.random.Generator) -> np.ndarray:
    """Random velocities `[steps, ...]` that change little from step to step, as a model's do; bfloat16 holds them."""
    walk = random.standard_normal(SHAPE) + 0.1 * np.cumsum(random.standard_normal((STEPS, *SHAPE)), axis=0)
    return torch.from_numpy(walk).bfloat16().float().numpy()


def golden() -> dict[str, np.ndarray]:
    """All arrays by name."""
    arrays: dict[str, np.ndarray] = {}
    for name, shifts in SHIFTS.items():
        for shift in shifts:
            made = [scheduler(name, shift, steps) for steps in range(1, MOST_STEPS + 1)]
            arrays[f"{name}/{shift:g}/timesteps"] = np.concatenate([one.timesteps.numpy() for one in made])
            arrays[f"{name}/{shift:g}/sigmas"] = np.concatenate([one.sigmas.numpy()[:-1] for one in made])
        random = np.random.default_rng(7)
        start = random.standard_normal(SHAPE).astype(np.float32)
        pair = velocities(random), velocities(random)
        arrays |= {f"{name}/conditional": pair[0], f"{name}/unconditional": pair[1]}
        arrays |= {
            f"{name}/float32": run(name, *pair, start, torch.float32),
            f"{name}/bfloat16": run(name, *pair, start, torch.bfloat16),
        }
    return arrays


def main() -> None:
    """Write the file."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **golden())
    print(f"{file}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
