"""Tuning values of the kernel, what they cost in shared memory, and which ones a call takes."""

import dataclasses
import functools
import importlib.resources
import json

SHARED_BYTES = 232_448
"""Shared memory that a block may have on Hopper."""
THREADS = 512
REGISTER_SPLITS = ((208, 48), (200, 56), (216, 40))
"""Registers of a thread that multiplies and of one that copies: what `fgattn tune` tries, the heuristic's first."""
_REGISTERS = 65_536


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Tuning values. None of them changes a result by more than rounding.

    Args:
        tile_keys: Keys of a tile: 64 times the warpgroups that copy for a row (128 queries: 2, 64 queries: 1).
        stages: Tiles of K and V that stand in shared memory at once, at least 2.
        compute_registers: Registers of a thread that multiplies; a multiple of 8.
        copy_registers: Registers of a thread that copies; a multiple of 8.

    Raises:
        ValueError: A value is not one of these, or all threads together need more registers than there are.
    """

    tile_keys: int
    stages: int
    compute_registers: int = 208
    copy_registers: int = 48

    def __post_init__(self) -> None:
        if self.tile_keys not in (64, 128):
            raise ValueError(f"expected `tile_keys` of 64 or 128, got tile_keys={self.tile_keys}")
        if self.stages < 2:
            raise ValueError(f"expected at least 2 `stages`, got stages={self.stages}")
        for name in ("compute_registers", "copy_registers"):
            value = getattr(self, name)
            if value % 8 or not 24 <= value <= 240:
                raise ValueError(f"expected `{name}` that is a multiple of 8 from 24 to 240, got {name}={value}")
        total = THREADS // 2 * (self.compute_registers + self.copy_registers)
        if total > _REGISTERS:
            raise ValueError(
                f"expected registers for {THREADS} threads of at most {_REGISTERS} in all, got {total} from "
                f"compute_registers={self.compute_registers} and copy_registers={self.copy_registers}"
            )

    def shared_bytes(self, *, head_dim: int, query_block: int) -> int:
        """Shared memory of a block: queries, the stages' tiles of K and V, barriers."""
        lines = 128 // query_block
        queries = 128 * head_dim * 2
        stage = 2 * self.tile_keys * head_dim * 2
        # Numbers of rows stand in a KiB of their own. Mosaic rounds the whole up to a KiB, and adds a byte.
        barriers = 16 * lines * self.stages
        return -(-(queries + lines * self.stages * stage + 1024 + barriers) // 1024) * 1024 + 1


def choose(*, head_dim: int, query_block: int, device_kind: str | None) -> KernelConfig:
    """The tuned values for this device if there are any, else the heuristic's.

    Args:
        head_dim: Width of a head (`H`).
        query_block: Queries per slice (`M`).
        device_kind: As `jax.Device.device_kind` says, or None where it is not known.
    """
    for row in tuned_rows():
        if (row["device"], row["head_dim"], row["query_block"]) == (device_kind, head_dim, query_block):
            return KernelConfig(**row["config"])
    return heuristic(head_dim=head_dim, query_block=query_block)


def heuristic(*, head_dim: int, query_block: int) -> KernelConfig:
    """Tiles as large as the copying warpgroups make them, and as many as fit, up to 6."""
    tile_keys = query_block
    stages = 6
    while KernelConfig(tile_keys, stages).shared_bytes(head_dim=head_dim, query_block=query_block) > SHARED_BYTES:
        stages -= 1
    return KernelConfig(tile_keys, stages)


def candidates(*, head_dim: int, query_block: int) -> tuple[KernelConfig, ...]:
    """What `fgattn tune` times: every number of stages that the heuristic may take, times `REGISTER_SPLITS`.

    The heuristic's own choice comes first.
    """
    most = heuristic(head_dim=head_dim, query_block=query_block)
    return tuple(
        KernelConfig(most.tile_keys, stages, *registers)
        for stages in range(most.stages, 1, -1)
        for registers in REGISTER_SPLITS
    )


@functools.lru_cache(maxsize=1)
def tuned_rows() -> tuple[dict, ...]:
    """Rows of `tuned.json`: config, and the device, versions, date and command that found it (`fgattn tune`)."""
    text = (importlib.resources.files(__package__) / "tuned.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["rows"])
