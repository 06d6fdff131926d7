"""What is measured, with whom, and which bar stands where."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

OURS = ("cuda", "pallas")
"""Kernels of this project."""

FLASHINFER = ("flashinfer_fused", "flashinfer_launches")
"""FlashInfer with one key per block and a mask per head: all heads in one launch, or one launch a head."""

DENSE = ("fa3", "fa4", "flashinfer", "cudnn", "tokamax")
"""Contestants that compute everything, whatever the mask says."""

FA4_BLOCKS = ("fa4_128x128", "fa4_128x64")
"""Kernels of whole blocks: random blocks of their own at the same density."""

MaskKind = Literal["random", "full", "uneven", "overlap", "video", "file"]


@dataclasses.dataclass(frozen=True)
class MaskRule:
    """Which slices a contestant that makes masks keeps, and what that may cost.

    Args:
        statistic: Score of a slice: largest ("peak") or summed ("mass") probability of its queries, or the one of
            their mean ("mean").
        rule: The field of `fgattn_jax.predictors.Budget` that is given.
        value: Its value: "threshold" in units of `1 / S`, "top_k" as a share of the keys.
        bar: Largest share of the time of one dense attention.
        calls: Calls per program: what takes less than a launch from Python would show that launch.
    """

    statistic: Literal["peak", "mass", "mean"]
    rule: Literal["threshold", "top_p", "top_k"]
    value: float
    bar: float
    calls: int = 1

    def budget(self, num_keys: int) -> dict[str, Any]:
        """Arguments of `Budget` for `S` keys."""
        values = {"threshold": self.value / num_keys, "top_p": self.value, "top_k": round(self.value * num_keys)}
        return {self.rule: values[self.rule]}

    @property
    def text(self) -> str:
        """The rule in a table cell."""
        value = {
            "threshold": f"> {self.value:g}/S",
            "top_p": f"top-p {self.value:g}",
            "top_k": f"top-k {self.value:g}S",
        }
        return f"{self.statistic} {value[self.rule]}"


_MEAN_CALLS = 16

MASKS: Mapping[str, MaskRule] = {
    "exact": MaskRule("peak", "threshold", 0.5, bar=0.55),
    "exact_mass": MaskRule("mass", "top_p", 0.95, bar=0.75),
    "one_pass": MaskRule("peak", "threshold", 0.5, bar=0.10),
    "mean_query": MaskRule("mean", "threshold", 0.1, bar=0.02, calls=_MEAN_CALLS),
    "mean_query_topk": MaskRule("mean", "top_k", 0.3, bar=0.04, calls=_MEAN_CALLS),
    "mean_query_topp": MaskRule("mean", "top_p", 0.9, bar=0.04, calls=_MEAN_CALLS),
}
"""Contestants that make masks. `one_pass` also computes dense attention; its bar is for what it takes beyond that."""

ORDER = "order"
ORDER_BAR, ORDER_CALLS = 0.003, 32
"""The contestant that counts the kept keys of every row and sorts the rows; its bar and calls as in `MaskRule`."""

MAKERS = (*MASKS, ORDER)
"""All contestants that compute no attention, or not only."""

SPARSE: Mapping[str, float] = {f"cuda_{share}": share for share in (0.2, 0.3, 0.4, 0.5, 0.6)}
"""`cuda` with a random mask of its own, at densities where the break-even of masks is asked for."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """A figure to reach; what is given must hold together.

    Args:
        tflops: At least this many useful TFLOP/s.
        factor: At least this many times the rate of `against`.
        against: Contestants of which the fastest counts; `OURS` stands for the kernel whose bar it is.
        case: The case where `against` was measured; None is the same case.
    """

    tflops: float | None = None
    factor: float | None = None
    against: tuple[str, ...] = ()
    case: str | None = None

    @property
    def text(self) -> str:
        """The bar in a table cell."""
        parts = [] if self.tflops is None else [f">= {self.tflops:g}"]
        if self.factor is not None:
            where = f" at {self.case!r}" if self.case else ""
            parts.append(f">= {self.factor:g}x {self.against[0].partition('_')[0]}{where}")
        return " and ".join(parts)


@dataclasses.dataclass(frozen=True)
class Bars:
    """What a kernel of ours is to reach in a case.

    Args:
        must: Bar of the issue.
        stretch: Its second bar, if it has one.
    """

    must: Bar
    stretch: Bar | None = None


@dataclasses.dataclass(frozen=True)
class GpuCase:
    """One call, B = 1.

    Args:
        name: In words; part of result rows.
        num_queries: `T`.
        num_keys: `S`.
        num_heads: `N`.
        num_kv_heads: `K`.
        head_dim: `H`.
        query_block: `M`.
        dtype: "bfloat16" or "float16".
        mask: See `benchmarks.gpu.masks`; "file" is layer `layer` of the mask file of `--dit-masks`.
        density: Kept share of all slices.
        overlap: For "overlap": shared part of neighbouring rows' keys.
        grid: For "video", of masks and of values: tokens per axis.
        values: Query and key: independent numbers, or fields that are smooth in space and time.
        order: Name of the query order on `grid`, as `fgattn_jax.query_order.resolve` takes it.
        layer: For "file".
        contestants: Who takes part, ours first.
        bars: Of each kernel of ours that has one here; others are only reported.
        quick: Part of a `--quick` run.
        device_timer: Also ask the device's own timer, as a check of the common one; the last case of a run.
    """

    name: str
    num_queries: int = 32760
    num_keys: int = 32760
    num_heads: int = 12
    num_kv_heads: int = 12
    head_dim: int = 128
    query_block: int = 128
    dtype: str = "bfloat16"
    mask: MaskKind = "random"
    density: float = 0.3
    overlap: float | None = None
    grid: tuple[int, int, int] | None = None
    values: Literal["normal", "video"] = "normal"
    order: str | None = None
    layer: int = 0
    contestants: tuple[str, ...] = (*OURS, "fa3")
    bars: Mapping[str, Bars] = dataclasses.field(default_factory=dict)
    quick: bool = False
    device_timer: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"expected `num_heads` in groups of `num_kv_heads`, got num_heads={self.num_heads} and "
                f"num_kv_heads={self.num_kv_heads} in {self.name!r}"
            )

    @property
    def num_rows(self) -> int:
        """`R`."""
        return -(-self.num_queries // self.query_block)

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return self.head_dim**-0.5

    def flops(self, density: float, num_queries: int | None = None, num_keys: int | None = None) -> float:
        """`4 * T * S * H * N * density`; lengths only where a contestant takes others."""
        queries, keys = num_queries or self.num_queries, num_keys or self.num_keys
        return 4.0 * queries * keys * self.head_dim * self.num_heads * density


EVEN = "480p, density 0.3"
_SPARSE = (*OURS, "fa3", *FLASHINFER)
_BLOCKS = (*_SPARSE, *FA4_BLOCKS)
_LARGE: dict[str, Any] = {"num_queries": 75600, "num_keys": 75600, "num_heads": 8, "num_kv_heads": 8}
_VIDEO: dict[str, Any] = {"mask": "video", "grid": (21, 30, 52)}


def _flashinfer(tflops: float, factor: float) -> Bar:
    return Bar(tflops=tflops, factor=factor, against=FLASHINFER)


def _at_fa3(tflops: float) -> Bar:
    return Bar(tflops=tflops, factor=1.0, against=("fa3",))


def _bars(cuda: Bars | None = None, pallas: Bars | None = None) -> dict[str, Bars]:
    return {name: bars for name, bars in (("cuda", cuda), ("pallas", pallas)) if bars is not None}


_NEAR_CUDA = Bar(factor=0.97, against=("cuda",))

CASES: tuple[GpuCase, ...] = (
    GpuCase(EVEN, contestants=_BLOCKS, quick=True,
            bars=_bars(Bars(_flashinfer(640, 1.22), _at_fa3(700)), Bars(Bar(tflops=580), _NEAR_CUDA))),
    GpuCase("480p, full", mask="full", density=1.0, contestants=(*OURS, *DENSE), quick=True,
            bars=_bars(Bars(Bar(factor=0.92, against=("fa3",)), Bar(factor=1.0, against=("fa3",))),
                       Bars(Bar(factor=0.85, against=("tokamax",))))),
    GpuCase("480p, density 0.5", density=0.5, contestants=_BLOCKS, quick=True,
            bars=_bars(Bars(_flashinfer(640, 1.22), _at_fa3(700)), Bars(Bar(tflops=580), _NEAR_CUDA))),
    GpuCase("480p, density 0.1", density=0.1, contestants=_BLOCKS, quick=True,
            bars=_bars(Bars(_flashinfer(580, 1.2), Bar(tflops=640)), Bars(Bar(tflops=500)))),
    GpuCase("480p, density 0.03", density=0.03, contestants=_SPARSE,
            bars=_bars(Bars(Bar(tflops=450), Bar(tflops=540)))),
    GpuCase("480p, density 0.2", density=0.2, contestants=_BLOCKS),
    GpuCase("480p, density 0.7", density=0.7, contestants=_SPARSE),
    GpuCase("480p, density 0.88", density=0.88, contestants=_SPARSE),
    GpuCase("480p, uneven rows, density 0.3", mask="uneven", contestants=_SPARSE,
            bars=_bars(Bars(Bar(factor=0.95, against=OURS, case=EVEN), Bar(factor=0.98, against=OURS, case=EVEN)))),
    GpuCase("720p, 8 of 40 heads, density 0.3", **_LARGE, contestants=(*_SPARSE, "cudnn"),
            bars=_bars(Bars(Bar(tflops=600), Bar(tflops=660)), Bars(Bar(tflops=520)))),
    GpuCase("480p, H=64, density 0.3", head_dim=64, contestants=(*_SPARSE, "cudnn"),
            bars=_bars(Bars(Bar(tflops=460), Bar(tflops=500)), Bars(Bar(tflops=400)))),
    GpuCase("480p, M=64, overlap 0.6, density 0.3", query_block=64, mask="overlap", overlap=0.6, contestants=_SPARSE,
            bars=_bars(Bars(Bar(tflops=400), Bar(tflops=480)))),
    GpuCase("480p, M=64, overlap 0.3, density 0.3", query_block=64, mask="overlap", overlap=0.3, contestants=_SPARSE),
    GpuCase("480p, M=64, overlap 0.8, density 0.3", query_block=64, mask="overlap", overlap=0.8, contestants=_SPARSE),
    GpuCase("480p, video windows, density 0.3", **_VIDEO, contestants=_SPARSE),
    GpuCase("480p, video windows in cubes, density 0.3", **_VIDEO, order="cubes_2x8x8", contestants=(*OURS, "fa3")),
    GpuCase("480p, float16, density 0.3", dtype="float16"),
    GpuCase("480p, 12 heads on 3, density 0.3", num_kv_heads=3, contestants=_SPARSE),
    GpuCase("DiT, long clip, layer 2", num_queries=8192, num_keys=8192, num_heads=4, num_kv_heads=4, head_dim=64,
            mask="file", layer=2, contestants=(*OURS, "fa3", "cudnn")),
    GpuCase("DiT, long clip, layer 5", num_queries=8192, num_keys=8192, num_heads=4, num_kv_heads=4, head_dim=64,
            mask="file", layer=5, contestants=(*OURS, "fa3", "cudnn")),
    GpuCase("720p, 8 of 40 heads, density 0.1", **_LARGE, density=0.1, contestants=(*OURS, "fa3", *FLASHINFER)),
    # Last: a profiler may leave something behind in its process.
    GpuCase("480p, density 0.3, both timers", contestants=(*OURS, "fa3", FLASHINFER[0], "fa4", "cudnn", "tokamax"),
            quick=True, device_timer=True),
)  # fmt: skip
"""The cases of the issues' tables, the ones that matter most first: a run that ends early has measured those."""

_480P: dict[str, Any] = {"values": "video", "grid": (21, 30, 52)}
_720P: dict[str, Any] = {"values": "video", "grid": (21, 45, 80), **_LARGE}
_WHOLE: dict[str, Any] = {"mask": "full", "density": 1.0}
_MAKING = (*OURS, *SPARSE, *MAKERS)
_PEERS_OF_MASKS = ("fa3", "fa4", "cudnn", "tokamax")

MASK_CASES: tuple[GpuCase, ...] = (
    GpuCase("masks, 1.3B 480p", **_480P, **_WHOLE, contestants=(*_PEERS_OF_MASKS, *_MAKING)),
    GpuCase("masks, 14B 720p, 8 of 40 heads", **_720P, **_WHOLE, contestants=(*_PEERS_OF_MASKS, *_MAKING)),
    GpuCase("masks, 1.3B 480p in cubes", **_480P, **_WHOLE, order="cubes_2x8x8",
            contestants=(*_PEERS_OF_MASKS, *_MAKING)),
    GpuCase("masks, 480p, H=64, M=64", **_480P, **_WHOLE, head_dim=64, query_block=64,
            contestants=("fa3", "cudnn", *_MAKING)),
)  # fmt: skip
"""Making masks beside dense attention, with ours on the full mask and at the densities of `SPARSE`."""

PARTS: Mapping[str, tuple[GpuCase, ...]] = {
    "attention": CASES,
    "masks": MASK_CASES,
    # Masks before the case with the profiler.
    "all": (*CASES[:-1], *MASK_CASES, CASES[-1]),
}
"""Cases of a run, by what `--part` names."""

BREAK_EVEN_BAR = 0.88
"""Least density at which ours may take as long as the fastest dense contestant."""

LINEARITY_BAR = 0.999
"""Least R^2 of time over kept slices."""


def cases_of(*, quick: bool, names: tuple[str, ...] = (), part: str = "all") -> tuple[GpuCase, ...]:
    """The cases of a run: those with the names, or all of a part (of which `quick` takes some).

    Raises:
        ValueError: No case of the part has one of the names, or a quick run would have none.
    """
    cases = PARTS[part]
    if not names:
        chosen = tuple(case for case in cases if case.quick or not quick)
        if not chosen:
            raise ValueError(f"expected a part with quick cases, got part={part!r}: leave out `--quick`")
        return chosen
    known = {case.name: case for case in cases}
    for name in names:
        if name not in known:
            raise ValueError(f"expected a case among {', '.join(map(repr, known))}; got {name!r}")
    return tuple(known[name] for name in names)
