"""Peers for a machine without a network: fetch their wheels, slim them, pack one archive each, unpack them there.

    python -m benchmarks.peers.bundle fetch DIR              wheels of all peers, unpacked into DIR/<peer>
    python -m benchmarks.peers.bundle build-flashinfer DIR   its kernels into DIR/flashinfer; needs torch (any build),
                                                             nvcc 13 and g++, but no GPU
    python -m benchmarks.peers.bundle pack DIR ARCHIVES      a <peer>.tar.xz each, without what no run uses
    python -m benchmarks.peers.bundle unpack ARCHIVES DIR    there: folders for `python -m benchmarks.gpu --peers DIR`

Every peer keeps a folder of its own: FlashInfer and FA4 bring the same package in versions of their own.
"""

import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WHEELS: dict[str, tuple[str, ...]] = {
    "fa3": ("fa3-fwd==0.0.3",),
    "flashinfer": ("flashinfer-python==0.7.2.post1", "apache-tvm-ffi==0.1.15.post2"),
    "tokamax": (
        "tokamax==0.0.17",
        "einshape==1.0",
        "qwix==0.1.8",
        "immutabledict==4.3.1",
        "pydantic==2.14.3",
        "pydantic-core==2.50.4",
        "annotated-types==0.8.0",
        "typing-extensions==4.16.0",
        "typing-inspection==0.4.5",
        "tensorboardx==2.6.5",
    ),
    "fa4": (
        "flash-attn-4==4.0.0b36",
        "nvidia-cutlass-dsl==4.8.1",
        "nvidia-cutlass-dsl-libs-base==4.8.1",
        "nvidia-cutlass-dsl-libs-core==4.8.1",
        "nvidia-cutlass-dsl-libs-cu13==4.8.1",
        "quack-kernels==0.6.5",
        "torch-c-dlpack-ext==0.1.5",
        "apache-tvm-ffi==0.1.15.post2",
    ),
}
"""Packages of each peer beside torch, jax and what those bring."""

_PLATFORMS = ("2_28", "2_27", "2_24", "2_17")
_CURAND = "nvidia-curand==10.4.5.25"

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "fa3": (),
    # Sources of other kernels, and headers: its kernels travel as a library. The templates of the prefill kernels
    # stay, because it writes them out again before it looks for that library.
    "flashinfer": (
        "flashinfer/data/c[!s]*",
        "flashinfer/data/[!c]*",
        "flashinfer/data/csrc/*/*",
        "flashinfer/data/csrc/[!b]*",
        "flashinfer/data/csrc/b[!a]*",
        "tvm_ffi/include/*",
        "*/generated/*",
        "*.o",
        "*.o.d",
        "*.log",
    ),
    "tokamax": ("*/data/*tpu*", "*_test.py", "*/benchmarks/*"),
    "fa4": ("*/stubs/*", "tvm_ffi/include/*", "*/profiler/*"),
}
"""Patterns of paths, as `fnmatch` takes them, that an archive does without."""

_XZ = ("-T1", "--x86", "--lzma2=preset=6,dict=192MiB")  # most of it is x86-64 code; 2 GB of memory, minutes
_EVERYWHERE = ("*/__pycache__/*", "*.pyc")


def fetch(folder: Path, peers: Sequence[str], python: str) -> None:
    """Download the wheels of peers for Linux x86-64 and unpack them into `folder/<peer>`.

    Raises:
        subprocess.CalledProcessError: pip found no such wheel, or no network.
    """
    for peer in peers:
        with tempfile.TemporaryDirectory() as wheels:
            _download(Path(wheels), WHEELS[peer], python)
            target = folder / peer
            if target.exists():
                shutil.rmtree(target)
            for wheel in sorted(Path(wheels).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(target)
        print(f"{peer}: {_megabytes(_size(target))} MB unpacked", flush=True)


def _download(folder: Path, requirements: Sequence[str], python: str) -> None:
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in _PLATFORMS]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--pre", "--only-binary=:all:"),
            *(*platforms, f"--python-version={python}", "--implementation=cp", "-d", str(folder), *requirements),
        ],
        check=True,
    )


_BUILD = """
import sys, torch
from flashinfer.jit.attention import gen_batch_prefill_module
dtype = torch.bfloat16
for head_dim in map(int, sys.argv[1:]):
    module = gen_batch_prefill_module(
        "fa3", dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, False, False, False
    )
    module.build(verbose=False)
    print(module.jit_library_path, module.jit_library_path.stat().st_size, "bytes", flush=True)
"""


def build_flashinfer(folder: Path, head_dims: Sequence[int], cuda_home: str) -> None:
    """Compile FlashInfer's sparse bfloat16 kernels for Hopper into `folder/flashinfer/.cache`; 5 to 10 minutes each.

    Runs in this interpreter, which needs torch (any build) and the Python packages that FlashInfer imports; tvm_ffi
    comes from PyPI for this Python version, whatever is in the folder.

    Raises:
        subprocess.CalledProcessError: The compiler failed, or a package is missing; its output says which.
    """
    target = folder / "flashinfer"
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        _download(scratch, [_CURAND], "3.12")
        with zipfile.ZipFile(next(scratch.glob("nvidia_curand-*.whl"))) as wheel:
            wheel.extractall(scratch, [entry for entry in wheel.namelist() if entry.endswith(".h")])
        headers = next(scratch.rglob("curand_kernel.h")).parent
        # The driver's library is not there without a driver, and nothing of it is needed before the kernels run.
        stub = scratch / "libcuda.so"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(stub)],
            input=b"",
            check=True,
        )
        packages = scratch / "packages"
        packages.mkdir()
        (packages / "flashinfer").symlink_to((target / "flashinfer").resolve())
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--target",
                str(packages),
                WHEELS["flashinfer"][1],
            ],
            check=True,
        )
        subprocess.run(
            [sys.executable, "-c", _BUILD, *map(str, head_dims)],
            check=True,
            env=os.environ
            | {
                "PYTHONPATH": str(packages),
                "FLASHINFER_WORKSPACE_BASE": str(target.resolve()),
                "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
                "CUDA_HOME": cuda_home,
                "CPATH": str(headers),
                "LIBRARY_PATH": os.pathsep.join([f"{cuda_home}/lib64", str(scratch)]),
            },
        )


def is_left_out(peer: str, path: str) -> bool:
    """Whether an archive does without a path, given from the peer's folder."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in (*LEFT_OUT[peer], *_EVERYWHERE))


def pack(folder: Path, output: Path, peers: Sequence[str]) -> None:
    """Write `output/<peer>.tar.xz` for every peer whose folder exists; needs the `xz` command.

    Raises:
        FileNotFoundError: None of the peers' folders exists.
    """
    output.mkdir(parents=True, exist_ok=True)
    found = [peer for peer in peers if (folder / peer).is_dir()]
    if not found:
        raise FileNotFoundError(f"expected folders of {', '.join(peers)} in {str(folder)!r}; run `fetch` first")
    for peer in found:
        archive = output / f"{peer}.tar.xz"
        partial = output / f"{peer}.partial"
        with (
            partial.open("wb") as file,
            subprocess.Popen(["xz", *_XZ], stdin=subprocess.PIPE, stdout=file) as xz,
        ):
            assert xz.stdin is not None
            with tarfile.open(fileobj=xz.stdin, mode="w|") as tar:
                tar.add(folder / peer, peer, filter=_keep(peer))
            xz.stdin.close()
            if xz.wait():
                raise OSError(f"xz ended with status {xz.returncode}")
        partial.replace(archive)
        print(f"{archive.name}: {_megabytes(archive.stat().st_size)} MB", flush=True)


def _keep(peer: str) -> Callable[[tarfile.TarInfo], tarfile.TarInfo | None]:
    def choose(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        inside = entry.name.removeprefix(peer).removeprefix("/")
        return None if inside and is_left_out(peer, inside) else entry

    return choose


def unpack(archives: Path, folder: Path) -> list[str]:
    """Unpack every `<peer>.tar.xz`, also where it lies in parts `<peer>.tar.xz.0`, `.1`, ...; returns the peers.

    Raises:
        FileNotFoundError: There is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    peers = sorted({path.name.partition(".tar.xz")[0] for path in archives.glob("*.tar.xz*")} & set(WHEELS))
    if not peers:
        raise FileNotFoundError(f"expected <peer>.tar.xz in {str(archives)!r}, for {', '.join(WHEELS)}")

    def one(peer: str) -> None:
        parts = sorted(archives.glob(f"{peer}.tar.xz*"))
        with subprocess.Popen(["xz", "-dc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as xz:
            assert xz.stdin is not None
            assert xz.stdout is not None
            with ThreadPoolExecutor(1) as feeder:
                fed = feeder.submit(_feed, parts, xz.stdin)
                with tarfile.open(fileobj=xz.stdout, mode="r|") as tar:
                    tar.extractall(folder, filter="data")
                fed.result()

    with ThreadPoolExecutor(len(peers)) as pool:
        list(pool.map(one, peers))
    return peers


def _feed(parts: Sequence[Path], stream) -> None:
    with stream:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, stream, 1 << 20)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the four steps."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.bundle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = parser.add_subparsers(dest="step", required=True)
    parsers = {name: steps.add_parser(name) for name in ("fetch", "build-flashinfer", "pack", "unpack")}
    parsers["unpack"].add_argument("archives", type=Path)
    for step in parsers.values():
        step.add_argument("folder", type=Path)
    parsers["pack"].add_argument("output", type=Path)
    for name in ("fetch", "pack"):
        parsers[name].add_argument("--peer", action="append", choices=list(WHEELS), help="only this; repeatable")
    parsers["fetch"].add_argument("--python", default="3.12", help="version there (default: %(default)s)")
    parsers["build-flashinfer"].add_argument("--head-dim", type=int, action="append", help="default: 128 and 64")
    parsers["build-flashinfer"].add_argument("--cuda-home", default="/usr/local/cuda", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.step == "fetch":
        fetch(args.folder, args.peer or list(WHEELS), args.python)
    elif args.step == "build-flashinfer":
        build_flashinfer(args.folder, args.head_dim or (128, 64), args.cuda_home)
    elif args.step == "pack":
        pack(args.folder, args.output, args.peer or list(WHEELS))
    else:
        print(f"unpacked: {', '.join(unpack(args.archives, args.folder))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
