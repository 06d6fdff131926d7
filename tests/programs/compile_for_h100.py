"""Compiles the Pallas kernel for an H100, on a machine that has none, and prints what came out as one JSON line.

    python tests/programs/compile_for_h100.py '{"head_dim": 128, "query_block": 128}'

Argument: the fields of a `Form`. It needs JAX's CUDA plugin, ptxas and nvdisasm: `make test-pallas-compile` installs
them.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

from fgattn_jax.pallas_kernels import config as configs
from fgattn_jax.pallas_kernels.attention import forward

DEVICE_KIND = "NVIDIA H100 80GB HBM3"
NUM_CORES = 132

# XLA's description of the device, which it asks the driver for where there is one: the H100 SXM5.
H100 = f"""
platform_name: "CUDA"
device_description_str: "{DEVICE_KIND}"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
gpu_device_info {{
  name: "{DEVICE_KIND}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  core_count: {NUM_CORES}
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {configs.SHARED_BYTES}
  l2_cache_size: 52428800
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  device_address_bits: 64
}}
"""

BATCH = 2
NUM_HEADS = 12
NUM_TOKENS = 32_760
"""Queries and keys, as in a clip of five seconds: the last row and the last mask words are not full."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What the kernel is compiled for.

    Args:
        head_dim: Width of a head (`H`).
        query_block: Queries per slice (`M`).
        dtype: Of query, key and value.
        ordered: With a query order.
        num_kv_heads: Key/value heads; there are 12 query heads.
        mask_batch: Batch axis of mask, query order and work order: 1 or 2.
        mask_heads: Head axis of the same: 1 or 12.
        config: Tuning values other than those of `config.choose`.
    """

    head_dim: int
    query_block: int
    dtype: str = "bfloat16"
    ordered: bool = False
    num_kv_heads: int = NUM_HEADS
    mask_batch: int = BATCH
    mask_heads: int = NUM_HEADS
    config: dict[str, int] | None = None

    def function(self) -> Callable:
        config = configs.KernelConfig(**self.config) if self.config else None
        sizes = {"scale": self.head_dim**-0.5, "query_block": self.query_block}
        return functools.partial(forward, **sizes, config=config)

    def arguments(self, sharding: NamedSharding | None = None) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        num_rows, num_words = -(-NUM_TOKENS // self.query_block), 4 * -(-NUM_TOKENS // 128)
        mask = (self.mask_batch, self.mask_heads)
        keys = shape((BATCH, NUM_TOKENS, self.num_kv_heads, self.head_dim), jnp.dtype(self.dtype))
        return (
            shape((BATCH, NUM_TOKENS, NUM_HEADS, self.head_dim), jnp.dtype(self.dtype)),
            keys,
            keys,
            shape((*mask, num_rows, num_words), jnp.uint32),
            shape((*mask, NUM_TOKENS), jnp.int32) if self.ordered else None,
            shape((*mask, num_rows, 2), jnp.int32),
        )


@contextlib.contextmanager
def captured_stdout(said: list[str]):
    """Appends to `said` what the process writes to its standard output, C++ included."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            said.append(file.read().decode())


def compile_form(form: Form) -> tuple[str, float]:
    """What ptxas and nvdisasm said about the kernel, and the seconds that lowering and compilation took."""
    # Without MOSAIC_GPU_DUMP_TO both go to the standard output. With it Mosaic also writes its modules after each pass,
    # 98 MB, and takes 11 s where this takes 4.
    os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_SASS": "1"}
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100)
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    # Mosaic looks up the generation here when no device is at hand.
    device = AbstractDevice(DEVICE_KIND, NUM_CORES, "cuda")
    said: list[str] = []
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)), captured_stdout(said):
        started = time.perf_counter()
        jax.jit(form.function()).lower(*form.arguments(sharding)).compile()
        seconds = time.perf_counter() - started
    return said[0], seconds


def report(said: str) -> dict[str, Any]:
    """Figures in the words of ptxas and in the machine code.

    Raises:
        ValueError: These are not the words about exactly one kernel, or its machine code is missing.
    """
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", said)
    registers = re.findall(r"Used (\d+) registers", said)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    code = [line for line in said.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)]
    if not len(kernels) == len(registers) == len(memory) == 1 or not code:
        raise ValueError(f"expected ptxas's report and machine code of one kernel, got {said[:2000]!r}")
    stack, *spills = map(int, memory[0])
    return {
        "architecture": kernels[0][1],
        "registers": int(registers[0]),
        "stack_bytes": stack,
        "spill_bytes": sum(spills),
        # C7510 to C7514: wgmma instructions are put one after the other, at half the speed and less. C7517 and its
        # neighbours: a wait that we did not write.
        "warnings": re.findall(r".*(?:\(C7\d+\)|[Ww]arning|Potential Performance Loss).*", said),
        "hgmma": _count(r"HGMMA\.", code),
        "ldgsts_128": _count(r"LDGSTS\.\S*\b128\b", code),
        "local_memory": _count(r"(?:LDL|STL)\b", code),
        "instructions": len(code),
    }


def _count(opcode: str, code: list[str]) -> int:
    # Before the opcode: its address, and maybe a predicate.
    return sum(bool(re.match(rf"\s*/\*\w+\*/\s+(?:@!?\w+\s+)?{opcode}", line)) for line in code)


def missing_tools() -> list[str]:
    spec = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    folders = [Path(folder) / "bin" for folder in spec.submodule_search_locations or []] if spec else []
    return [tool for tool in ("ptxas", "nvdisasm") if not any((folder / tool).is_file() for folder in folders)]


def main(form: Form) -> None:
    if missing := missing_tools():
        sys.exit(f"{' and '.join(missing)} not installed: run this with `make test-pallas-compile`")
    # Arrays that tracing makes are to stand on the CPU, whatever else is in the machine.
    jax.config.update("jax_platforms", "cpu")
    said, seconds = compile_form(form)
    print(json.dumps({"jax": jax.__version__, "compile_seconds": round(seconds, 1), **report(said)}))


if __name__ == "__main__":
    main(Form(**json.loads(sys.argv[1])))
