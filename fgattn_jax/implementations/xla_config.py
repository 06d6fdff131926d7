"""Tuning values of the `xla` implementation and where their defaults come from."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """How much one step of the gathered loops handles.

    Args:
        rows_per_step: Rows (query blocks) handled together; their scores form one batched matrix product.
        keys_per_step: Kept keys gathered per row at a time.
        dense_scores_per_step: Scores (over batch and heads) held at once where no mask is given: dense attention runs
            in chunks of as many queries as that allows.
        upcast: Convert gathered 16-bit tiles to float32 before the products instead of asking the products for
            float32 accumulation. CPUs have no fast 16-bit products; accelerators do.
    """

    rows_per_step: int
    keys_per_step: int
    dense_scores_per_step: int
    upcast: bool

    def __post_init__(self) -> None:
        for name in ("rows_per_step", "keys_per_step", "dense_scores_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {name}={getattr(self, name)}")


def default_config(platform: str, query_block: int) -> XlaConfig:
    """Config from plain facts: a CPU tile stays in the second-level cache, an accelerator tile fills the chip.

    Measured on two CPU cores (docs/notes/xla_on_cpu.md): 64 keys at a time waste little of a row's last chunk, and 16
    rows of 64 queries make up for the shorter products.
    """
    if platform == "cpu":
        return XlaConfig(
            rows_per_step=max(1, 1024 // query_block),
            keys_per_step=64,
            dense_scores_per_step=2**22,
            upcast=True,
        )
    return XlaConfig(
        rows_per_step=max(1, 32768 // query_block),
        keys_per_step=512,
        dense_scores_per_step=2**28,
        upcast=False,
    )
