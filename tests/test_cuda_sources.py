"""Sources of the CUDA kernel that a script wrote."""

import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "xla_ffi" / "csrc"


def test_the_generated_header_is_what_its_script_writes():
    done = subprocess.run([sys.executable, SOURCES / "make_wgmma.py"], capture_output=True, text=True, check=True)
    assert done.stdout == (SOURCES / "wgmma.cuh").read_text()
