"""Libraries that tests compile: once, also where several workers of pytest-xdist need them."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def build_once(
    factory: pytest.TempPathFactory, name: str, build: Callable[[Path], Path], *, timeout: float = 240
) -> Path:
    """`build` in a new folder `name` by the first worker that asks; others wait for it.

    Args:
        factory: Knows the folder of this run of the tests.
        name: Of the folder; one for each library.
        build: Makes the library in the folder that it is given.
        timeout: Seconds that others wait at most.

    Returns:
        The library, which lies in that folder.

    Raises:
        RuntimeError: If `build` raises, with its words, or the time is over.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    library, words = folder / "shared.so", folder / "refused.txt"
    try:
        folder.mkdir()
    except FileExistsError:
        limit = time.monotonic() + timeout
        while not library.exists():
            if words.exists():
                raise RuntimeError(words.read_text()) from None
            if time.monotonic() > limit:
                raise RuntimeError(f"no library in {folder} within timeout={timeout:g} s: see its builder") from None
            time.sleep(0.2)
        return library
    try:
        build(folder).rename(library)  # at once: nobody loads half of it
    except Exception as error:
        (folder / "words").write_text(str(error))
        (folder / "words").rename(words)
        raise
    return library
