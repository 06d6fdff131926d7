"""Progress of `fgattn generate` on standard error: tqdm bars on a terminal, plain lines elsewhere or without tqdm."""

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator

StepProgress = Callable[[int, str, float, float], None]
"""Called after a step with its number, kind, density and seconds."""
LeafProgress = Callable[[str, int, int], None]
"""Called after a parameter was read with its name, its bytes and the bytes of all."""

_LINES = 10
_QUIET_SECONDS = 5.0


def say(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


def bytes_text(count: int) -> str:
    """A number of bytes with its unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size // 4:
            return f"{count / size:.2f} {unit}"
    return f"{count / 2**10:.1f} KiB"


@contextlib.contextmanager
def steps_progress(title: str, total: int) -> Iterator[StepProgress]:
    """A bar over denoising steps, or a line every few steps.

    Args:
        title: Name of the run.
        total: Steps.

    Yields:
        A function to call after every step.
    """
    if not _bars():
        stride, started = max(1, total // _LINES), time.perf_counter()

        def line(step: int, kind: str, density: float, seconds: float) -> None:
            if (step + 1) % stride == 0 or step + 1 == total or step == 0:
                elapsed = time.perf_counter() - started
                say(
                    f"{title}: step {step + 1} of {total}, {kind}, density {density:.3f}, {seconds:.2f} s a step, "
                    f"{elapsed:.1f} s"
                )

        yield line
        return
    import tqdm

    with tqdm.tqdm(total=total, desc=title, unit="step", file=sys.stderr, dynamic_ncols=True) as bar:

        def advance(step: int, kind: str, density: float, seconds: float) -> None:
            del step
            bar.set_postfix_str(f"{kind}, density {density:.3f}, {seconds:.2f} s a step")
            bar.update()

        yield advance


@contextlib.contextmanager
def leaves_progress(title: str) -> Iterator[LeafProgress]:
    """A bar over the bytes of a checkpoint, or a line every few seconds.

    Yields:
        A function to call after every parameter.
    """
    if not _bars():
        started = said = time.perf_counter()
        done = 0

        def line(name: str, num_bytes: int, total: int) -> None:
            nonlocal said, done
            del name
            done += num_bytes
            now = time.perf_counter()
            if now - said > _QUIET_SECONDS or (done >= total and now - started > _QUIET_SECONDS):
                said = now
                say(f"{title}: {bytes_text(done)} of {bytes_text(total)}, {now - started:.0f} s")

        yield line
        return
    import tqdm

    with tqdm.tqdm(desc=title, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True) as bar:

        def advance(name: str, num_bytes: int, total: int) -> None:
            del name
            bar.total = total
            bar.update(num_bytes)

        yield advance


def _bars() -> bool:
    return sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
