"""UniPC and flow-match Euler as step tables: what does not depend on data, made on the host in diffusers' float steps.

A scheduler is a frozen description. `table(steps)` gives arrays over steps, `start(noise)` what is carried from step to
step, and `step(carry, row, velocity)` one step, a pure function for `lax.scan` over the table.
"""

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

TRAIN_TIMESTEPS = 1000


class UniPCTable(NamedTuple):
    """Coefficients of UniPC, float32 NumPy arrays over steps; a row of it holds scalars.

    With `x0` the clip estimated at this step, `m0` and `m1` those of the two steps before, and `last` the corrected
    latents of the step before:

        `latents <- last_factor * last - last_x0 * m0 - before * (m1 - m0) - now * (x0 - m0)`   (corrector)
        `next = latents_factor * latents - x0_factor * x0 - slope * (m0 - x0)`                  (predictor)

    Attributes:
        timestep: what the model is told, 0 .. 1000, whole numbers.
        sigma: share of noise in the latents; the clip is `latents - sigma * velocity`.
        corrects: 1 where the corrector runs, 0 at the first step.
        last_factor: see above; 0 at the first step, like the other three of the corrector.
        last_x0: see above.
        before: see above; 0 where the step before was of first order.
        now: see above.
        latents_factor: see above.
        x0_factor: see above.
        slope: see above; 0 at steps of first order (the first and the last).
    """

    timestep: Float32[np.ndarray, " steps"]
    sigma: Float32[np.ndarray, " steps"]
    corrects: Float32[np.ndarray, " steps"]
    last_factor: Float32[np.ndarray, " steps"]
    last_x0: Float32[np.ndarray, " steps"]
    before: Float32[np.ndarray, " steps"]
    now: Float32[np.ndarray, " steps"]
    latents_factor: Float32[np.ndarray, " steps"]
    x0_factor: Float32[np.ndarray, " steps"]
    slope: Float32[np.ndarray, " steps"]


class UniPCCarry(NamedTuple):
    """What UniPC hands from step to step, all float32 `[B, C, F, Y, X]`.

    Attributes:
        latents: what the model sees next; the result after the last step.
        last: the corrected latents of the step before.
        x0: the clip estimated at the step before.
        x0_before: the clip estimated two steps before.
    """

    latents: Float32[Array, "B C F Y X"]
    last: Float32[Array, "B C F Y X"]
    x0: Float32[Array, "B C F Y X"]
    x0_before: Float32[Array, "B C F Y X"]


class EulerTable(NamedTuple):
    """Euler steps, float32 NumPy arrays over steps.

    Attributes:
        timestep: what the model is told, 0 .. 1000.
        sigma: share of noise in the latents.
        change: difference to the next sigma, negative: `next = latents + change * velocity`.
    """

    timestep: Float32[np.ndarray, " steps"]
    sigma: Float32[np.ndarray, " steps"]
    change: Float32[np.ndarray, " steps"]


class EulerCarry(NamedTuple):
    """What Euler hands from step to step.

    Attributes:
        latents: float32 `[B, C, F, Y, X]`: what the model sees next; the result after the last step.
    """

    latents: Float32[Array, "B C F Y X"]


@dataclasses.dataclass(frozen=True)
class UniPC:
    """UniPC of order 2 for flow matching (bh2, predicting the clip, first order at the ends): the scheduler of Wan.

    Attributes:
        flow_shift: moves steps towards noise; 3 for 480p and 5 for 720p in Wan's checkpoints.

    Raises:
        ValueError: `flow_shift` is not a positive number.

    Note:
        Timesteps and sigmas are bit-equal to `UniPCMultistepScheduler(prediction_type="flow_prediction",
        use_flow_sigmas=True)` of diffusers; timesteps are truncated to whole numbers as there.

    Example:
        >>> UniPC(flow_shift=3.0).table(4).timestep.tolist()
        [999.0, 900.0, 750.0, 500.0]

    References:
        UniPC (arXiv 2302.04867).
    """

    flow_shift: float = 3.0

    def __post_init__(self):
        object.__setattr__(self, "flow_shift", _shift("flow_shift", self.flow_shift))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The scheduler of a `scheduler_config.json` of diffusers.

        Raises:
            ValueError: It is another scheduler, or has a setting that is not reproduced here.
        """
        _check_config(config, "UniPCMultistepScheduler", _UNIPC_SETTINGS)
        return cls(_shift("flow_shift", config.get("flow_shift", 1.0)))

    def table(self, steps: int) -> UniPCTable:
        """The coefficients of a run of `steps` steps.

        Raises:
            ValueError: `steps` is not an integer of at least 1.
        """
        steps = _num_steps(steps)
        ramp = np.linspace(1, 1 / TRAIN_TIMESTEPS, steps + 1)[:-1]
        sigmas = self.flow_shift * ramp / (1 + (self.flow_shift - 1) * ramp)
        if abs(sigmas[0] - 1) < _NOT_ONE:
            sigmas[0] -= _NOT_ONE  # the logarithm of 1 - sigma is taken
        timesteps = (sigmas * TRAIN_TIMESTEPS).astype(np.int64).astype(np.float32)
        levels = _levels(np.append(sigmas, 0.0).astype(np.float32))
        rows = [_unipc_row(levels, step, steps) for step in range(steps)]
        columns = np.asarray(rows, np.float32).T
        return UniPCTable(timesteps, levels.sigma[:-1], *columns)

    def start(self, noise: Float[Array, "B C F Y X"]) -> UniPCCarry:
        """The carry before the first step; it shares no memory with `noise`."""
        latents = jnp.array(noise, jnp.float32, copy=True)
        return UniPCCarry(latents, *(jnp.zeros_like(latents) for _ in range(3)))

    def step(self, carry: UniPCCarry, row: UniPCTable, velocity: Float[Array, "B C F Y X"]) -> UniPCCarry:
        """One step: estimate the clip, correct the latents by it, and predict the next ones.

        Args:
            carry: from `start` or the step before.
            row: scalars of this step (a row of the table).
            velocity: of the model at `carry.latents`. With 16 bits its product with sigma is rounded to them, as
                torch does it on a GPU (on a CPU it rounds sigma too); all else is float32.
        """
        x0 = carry.latents - _rounded_product(row.sigma, velocity)
        corrected = (
            row.last_factor * carry.last
            - row.last_x0 * carry.x0
            - row.before * (carry.x0_before - carry.x0)
            - row.now * (x0 - carry.x0)
        )
        latents = jnp.where(row.corrects > 0, corrected, carry.latents)
        following = row.latents_factor * latents - row.x0_factor * x0 - row.slope * (carry.x0 - x0)
        return UniPCCarry(jnp.asarray(following), latents, x0, carry.x0)


@dataclasses.dataclass(frozen=True)
class FlowEuler:
    """Euler steps of flow matching: the scheduler of HunyuanVideo.

    Attributes:
        shift: moves steps towards noise; 7 in HunyuanVideo's checkpoint.

    Raises:
        ValueError: `shift` is not a positive number.

    Note:
        Timesteps and sigmas are bit-equal to `FlowMatchEulerDiscreteScheduler` of diffusers with the sigmas that its
        HunyuanVideo pipeline hands it, `linspace(1, 0, steps + 1)[:-1]`.

    Example:
        >>> FlowEuler(shift=7.0).table(2).timestep.tolist()
        [1000.0, 875.0]
    """

    shift: float = 7.0

    def __post_init__(self):
        object.__setattr__(self, "shift", _shift("shift", self.shift))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The scheduler of a `scheduler_config.json` of diffusers.

        Raises:
            ValueError: It is another scheduler, or has a setting that is not reproduced here.
        """
        _check_config(config, "FlowMatchEulerDiscreteScheduler", _EULER_SETTINGS)
        return cls(_shift("shift", config.get("shift", 1.0)))

    def table(self, steps: int) -> EulerTable:
        """The steps of a run of `steps` steps.

        Raises:
            ValueError: `steps` is not an integer of at least 1.
        """
        steps = _num_steps(steps)
        ramp = np.linspace(1, 0, steps + 1)[:-1].astype(np.float32)
        sigmas = self.shift * ramp / (1 + (self.shift - 1) * ramp)
        timesteps = sigmas * np.float32(TRAIN_TIMESTEPS)
        return EulerTable(timesteps, sigmas, np.diff(np.append(sigmas, np.float32(0))))

    def start(self, noise: Float[Array, "B C F Y X"]) -> EulerCarry:
        """The carry before the first step; it shares no memory with `noise`."""
        return EulerCarry(jnp.array(noise, jnp.float32, copy=True))

    def step(self, carry: EulerCarry, row: EulerTable, velocity: Float[Array, "B C F Y X"]) -> EulerCarry:
        """One step.

        Args:
            carry: from `start` or the step before.
            row: scalars of this step (a row of the table).
            velocity: of the model at `carry.latents`. With 16 bits its product with the change of sigma is rounded to
                them, and so are the new latents, as diffusers does it on a GPU; the array stays float32.
        """
        latents = carry.latents + _rounded_product(row.change, velocity)
        return EulerCarry(round_to(latents, velocity.dtype))


Scheduler = UniPC | FlowEuler


def from_config(config: Mapping[str, Any]) -> Scheduler:
    """The scheduler of a `scheduler_config.json` of diffusers, by its `_class_name`.

    Raises:
        ValueError: Neither UniPC nor flow-match Euler, or with a setting that is not reproduced here.
    """
    name = config.get("_class_name")
    if name == "UniPCMultistepScheduler":
        return UniPC.from_config(config)
    if name == "FlowMatchEulerDiscreteScheduler":
        return FlowEuler.from_config(config)
    raise ValueError(
        "expected `_class_name` 'UniPCMultistepScheduler' or 'FlowMatchEulerDiscreteScheduler' in the config of a "
        f"scheduler, got _class_name={name!r}: choose UniPC(...) or FlowEuler(...) yourself"
    )


def round_to(x: Float32[Array, "..."], dtype: Any) -> Float32[Array, "..."]:
    """`x` rounded to what `dtype` can hold, still float32.

    XLA may leave out a conversion to 16 bits and back; it keeps this.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return x
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def _rounded_product(factor: Array | np.ndarray, velocity: Array) -> Float32[Array, "..."]:
    return round_to(jnp.asarray(factor * velocity.astype(jnp.float32)), velocity.dtype)


_NOT_ONE = 1e-6


class _Levels(NamedTuple):
    """Noise levels of all steps and of the clip behind them, float32: sigma, alpha and log(alpha / sigma)."""

    sigma: Float32[np.ndarray, " steps+1"]
    alpha: Float32[np.ndarray, " steps+1"]
    log_ratio: Float32[np.ndarray, " steps+1"]


def _levels(sigma: Float32[np.ndarray, " steps+1"]) -> _Levels:
    # alpha in float32, whatever it loses near sigma = 1: diffusers does so, and the first steps follow from it.
    alpha = np.float32(1) - sigma
    with np.errstate(divide="ignore"):
        return _Levels(sigma, alpha, _log(alpha) - _log(sigma))


def _log(x: np.ndarray) -> np.ndarray:
    return np.log(x.astype(np.float64)).astype(np.float32)


def _unipc_row(levels: _Levels, step: int, steps: int) -> tuple[np.floating | float, ...]:
    """Coefficients of one step behind `sigma`, in the order of `UniPCTable`."""
    correction = (0.0,) * 5
    if step > 0:
        start, h_phi, ratio = _interval(levels, step - 1, step)
        order = _order(step - 1, steps)
        alpha = levels.alpha[step]
        before, now = np.float32(0), np.float32(0.5)
        if order == 2:
            matrix = np.asarray([[1, 1], [ratio, 1]], np.float32)
            before, now = np.linalg.solve(matrix, _phi_over_b(-start, h_phi))
            before = before / ratio
        scale = alpha * h_phi
        correction = (1.0, levels.sigma[step] / levels.sigma[step - 1], scale, scale * before, scale * now)
    _, h_phi, ratio = _interval(levels, step, step + 1)
    scale = levels.alpha[step + 1] * h_phi
    slope = scale * np.float32(0.5) / ratio if _order(step, steps) == 2 else 0.0
    return *correction, levels.sigma[step + 1] / levels.sigma[step], scale, slope


def _order(step: int, steps: int) -> int:
    return min(2, step + 1, steps - step)


def _interval(levels: _Levels, start: int, end: int) -> tuple[np.float32, np.float32, np.float32]:
    """Of the way from `start` to `end`: its length h in log(alpha / sigma), expm1(-h), and the length before by h."""
    h = levels.log_ratio[end] - levels.log_ratio[start]
    h_phi = np.float32(np.expm1(-np.float64(h)))
    ratio = (levels.log_ratio[max(start - 1, 0)] - levels.log_ratio[start]) / h
    return h, h_phi, ratio


def _phi_over_b(hh: np.float32, h_phi: np.float32) -> Float32[np.ndarray, " 2"]:
    """Right-hand side of the corrector's conditions, in float32: it loses digits, and diffusers loses the same."""
    first = h_phi / hh - np.float32(1)
    second = first / hh - np.float32(0.5)
    return np.asarray([first / h_phi, second * np.float32(2) / h_phi], np.float32)


# Of every setting that matters: the value that is reproduced, and diffusers' default where a config leaves it out.
_UNIPC_SETTINGS = {
    "num_train_timesteps": (TRAIN_TIMESTEPS, 1000),
    "solver_order": (2, 2),
    "solver_type": ("bh2", "bh2"),
    "prediction_type": ("flow_prediction", "epsilon"),
    "predict_x0": (True, True),
    "use_flow_sigmas": (True, False),
    "lower_order_final": (True, True),
    "disable_corrector": ([], []),
    "solver_p": (None, None),
    "thresholding": (False, False),
    "final_sigmas_type": ("zero", "zero"),
    "use_karras_sigmas": (False, False),
    "use_exponential_sigmas": (False, False),
    "use_beta_sigmas": (False, False),
    "use_dynamic_shifting": (False, False),
    "shift_terminal": (None, None),
}
_EULER_SETTINGS = {
    "num_train_timesteps": (TRAIN_TIMESTEPS, 1000),
    "use_dynamic_shifting": (False, False),
    "shift_terminal": (None, None),
    "use_karras_sigmas": (False, False),
    "use_exponential_sigmas": (False, False),
    "use_beta_sigmas": (False, False),
    "invert_sigmas": (False, False),
    "stochastic_sampling": (False, False),
}


def _check_config(config: Mapping[str, Any], name: str, settings: Mapping[str, tuple[Any, Any]]) -> None:
    if config.get("_class_name", name) != name:
        raise ValueError(
            f"expected the config of a {name}, got _class_name={config['_class_name']!r}: use `schedulers.from_config`"
        )
    for key, (expected, default) in settings.items():
        value = config.get(key, default)
        if value != expected:
            missing = "" if key in config else " (diffusers' default)"
            raise ValueError(
                f"expected {key}={expected!r} in the config of a {name}, got {key}={value!r}{missing}: "
                "other settings are not reproduced"
            )


def _shift(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < float(value) < math.inf:
        raise ValueError(f"expected a positive number for `{name}`, got {name}={value!r}: 1 shifts nothing")
    return float(value)


def _num_steps(steps: Any) -> int:
    try:
        number = operator.index(steps)
    except TypeError:
        number = 0
    if number < 1 or isinstance(steps, bool):
        raise ValueError(f"expected an integer of at least 1 for `steps`, got steps={steps!r}")
    return number
