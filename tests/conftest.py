"""Options and fixtures of the whole suite."""

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_ledger
import host_kernel as host
import pytest
from cuda_emulation import emulator as emulation
from shared_build import build_once

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fgattn_jax")
    group.addoption("--require-gpu", action="store_true", help="run on the GPU, and fail at once where there is none")
    group.addoption("--min-passed", type=int, default=0, metavar="N", help="fail unless at least N tests passed")
    group.addoption(
        "--allow-unreleased",
        action="store_true",
        help="let the kernels for Hopper GPUs run before their release",
    )
    group.addoption("--require-torch", action="store_true", help="fail, do not skip, where diffusers does not import")
    group.addoption(
        "--write-ledger", action="store_true", help="record the run in tests/gpu_ledger.json if all of it passed"
    )
    group.addoption(
        "--resume",
        type=Path,
        metavar="FILE",
        help="a GPU run in parts: leave out, but count, the tests that FILE says passed before, with these sources on "
        "this machine, and add those of this part; what once did not pass keeps the run out of the ledger",
    )


def pytest_configure(config: pytest.Config) -> None:
    option = config.getoption
    # Before anything imports jax: the CPU lane must not find a GPU by chance.
    if option("--require-gpu"):
        os.environ["JAX_PLATFORMS"] = "cuda,cpu"
        import jax

        try:
            jax.devices("cuda")
        except RuntimeError as error:
            pytest.exit(f"--require-gpu: JAX finds no GPU here: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if option("--write-ledger") and not (option("--require-gpu") and option("--min-passed")):
        raise pytest.UsageError("--write-ledger needs --require-gpu and --min-passed")
    if option("--resume") and not option("--require-gpu"):
        raise pytest.UsageError("--resume needs --require-gpu")
    config.pluginmanager.register(_tally(config), "gpu_tally")
    config.addinivalue_line("markers", "two_gpus: left out, not skipped, where JAX finds fewer than two GPUs")
    if option("--allow-unreleased"):
        from fgattn_jax.pallas_kernels import support as pallas_support
        from fgattn_jax.xla_ffi import support as cuda_support

        pallas_support.RELEASED = cuda_support.RELEASED = cuda_support.MASKS_RELEASED = True


def _tally(config: pytest.Config) -> gpu_ledger.Tally:
    parts = config.getoption("--resume")
    # The controller of pytest-xdist counts, not its workers.
    if parts is None or hasattr(config, "workerinput"):
        return gpu_ledger.Tally()
    try:
        gpu_ledger.begin_part(parts)
    except gpu_ledger.NotRecordedError as error:
        raise pytest.UsageError(f"--resume: {error}") from None
    return gpu_ledger.Tally(parts)


@pytest.hookimpl(tryfirst=True)  # before `-m torch` is applied
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "torch_models" in getattr(item, "fixturenames", ()):
            item.add_marker("torch")
    if config.getoption("--resume"):
        done = set(gpu_ledger.noted(config.getoption("--resume"))[0])
        _leave_out(config, items, [item for item in items if item.nodeid in done])
    if not any(item.get_closest_marker("two_gpus") for item in items) or not config.getoption("--require-gpu"):
        return
    import jax

    if jax.device_count("cuda") < 2:
        _leave_out(config, items, [item for item in items if item.get_closest_marker("two_gpus")])


def _leave_out(config: pytest.Config, items: list[pytest.Item], left_out: list[pytest.Item]) -> None:
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    # Workers of pytest-xdist have no reporter: the controller counts for all.
    if reporter is None or hasattr(config, "workerinput"):
        return
    tally = config.pluginmanager.get_plugin("gpu_tally")
    wanted = config.getoption("--min-passed")
    if wanted and tally.num_passed < wanted:
        reporter.write_line(f"--min-passed: only {tally.num_passed} tests passed, {wanted} expected", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if config.getoption("--write-ledger"):
        try:
            entry = gpu_ledger.record(tally, clean=session.exitstatus == pytest.ExitCode.OK)
        except gpu_ledger.NotRecordedError as error:
            reporter.write_line(f"--write-ledger: nothing was written: {error}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        else:
            reporter.write_line(f"--write-ledger: {entry['passed']} GPU tests recorded for {entry['source_hash'][:12]}")


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Returns a function that runs Python code in a process of its own, on the CPU, and returns what it printed.

    The function takes the code, `devices` (emulated CPU devices), `platform` (with a name that does not exist, touching
    any device fails), `cwd` and `timeout` (seconds); it fails the test with the process's whole output if the process
    fails.
    """

    def run(
        code: str,
        *,
        devices: int = 1,
        platform: str = "cpu",
        cwd: Path = ROOT,
        timeout: float = 120.0,
        flags: str = "",
    ) -> str:
        env = os.environ | {
            "JAX_PLATFORMS": platform,
            "XLA_FLAGS": " ".join(
                [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={devices}", flags]
            ),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            pytest.fail(f"process ended with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
        return done.stdout

    return run


@pytest.fixture(scope="session")
def torch_models(request: pytest.FixtureRequest) -> None:
    """Skips the test where torch and diffusers do not import; with --require-torch, fails it."""
    try:
        importlib.import_module("diffusers")
        torch = importlib.import_module("torch")
    except ImportError as error:
        if request.config.getoption("--require-torch"):
            pytest.fail(f"--require-torch: torch and diffusers do not import: {error}", pytrace=False)
        pytest.skip(f"needs torch and diffusers: {error}")
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def emulation_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA kernels compiled for the CPU (docs/notes/cuda_emulation.md); their objects lie beside the library."""
    return build_once(tmp_path_factory, "cuda_emulation", emulation.build)


@pytest.fixture(scope="session")
def emulator(emulation_library: Path) -> emulation.Emulator:
    """The CUDA kernels on the CPU."""
    return emulation.Emulator(emulation_library)


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FFI handlers over a kernel for host memory (tests/programs/host_kernel.cc), compiled with g++."""
    hashes = gpu_ledger.source_hash(), gpu_ledger.mask_hash()
    return build_once(tmp_path_factory, "host_kernel", functools.partial(host.build, hashes=hashes))


@pytest.fixture
def host_kernel(host_library: Path) -> Iterator[None]:
    """`implementation="cuda"` runs on the CPU, through the real adapter and handlers, over plain loops."""
    with host.installed(host_library):
        yield
