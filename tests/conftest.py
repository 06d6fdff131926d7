"""Options and fixtures of the whole suite."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fgattn_jax")
    group.addoption("--require-gpu", action="store_true", help="run on the GPU, and fail at once where there is none")
    group.addoption("--min-passed", type=int, default=0, metavar="N", help="fail unless at least N tests passed")


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports jax: the CPU lane must not find a GPU by chance.
    if config.getoption("--require-gpu"):
        os.environ["JAX_PLATFORMS"] = "cuda,cpu"
        import jax

        try:
            jax.devices("cuda")
        except RuntimeError as error:
            pytest.exit(f"--require-gpu: JAX finds no GPU here: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_sessionfinish(session: pytest.Session) -> None:
    wanted = session.config.getoption("--min-passed")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    # Workers of pytest-xdist have no reporter: the controller counts for all.
    if not wanted or reporter is None or hasattr(session.config, "workerinput"):
        return
    passed = len(reporter.stats.get("passed", ()))
    if passed < wanted:
        reporter.write_line(f"--min-passed: only {passed} tests passed, {wanted} expected", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Returns a function that runs Python code in a process of its own, on the CPU, and returns what it printed.

    The function takes the code, `devices` (emulated CPU devices), `platform` (with a name that does not exist, touching
    any device fails), `cwd` and `timeout` (seconds); it fails the test with the process's whole output if the process
    fails.
    """

    def run(code: str, *, devices: int = 1, platform: str = "cpu", cwd: Path = ROOT, timeout: float = 120.0) -> str:
        env = os.environ | {
            "JAX_PLATFORMS": platform,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            pytest.fail(f"process ended with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
        return done.stdout

    return run
