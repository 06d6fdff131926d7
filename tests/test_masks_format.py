"""docs/mask_format.md: its code runs, and its table of sizes is what masks take."""

import re
from pathlib import Path

import jax
import pytest

from fgattn_jax import masks

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "mask_format.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if " GB |" in line]


def test_code_and_sizes_are_found():
    assert len(CODE) == 4
    assert len(ROWS) == 4


@pytest.mark.parametrize("code", CODE, ids=["bits", "text tokens", "work order", "file"])
def test_code_runs(code):
    exec(compile(code, "mask_format.md", "exec"), {})


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_sizes_are_those_of_masks(row):
    _, layers_heads, length, shape, one_layer, coarse, fine, lists = row
    layers, heads = (int(number) for number in layers_heads.split(" x "))
    num_tokens = int(length.replace(" ", ""))
    nbytes = {}
    for block in (128, 64):
        sizes = {"query_block": block, "num_queries": num_tokens, "num_keys": num_tokens, "num_heads": heads}
        mask = jax.eval_shape(lambda sizes=sizes: masks.full(**sizes))
        nbytes[block] = mask.nbytes
        if block == 128:
            assert shape == f"{mask.bits.shape[2]} x {mask.bits.shape[3]}"
            assert lists == f"{layers * heads * mask.num_rows * num_tokens * 4 / 1e9:.0f} GB"
    assert one_layer == f"{nbytes[128] / 1e6:.1f} MB"
    assert coarse == f"{layers * nbytes[128] / 1e9:.2f} GB"
    assert fine == f"{layers * nbytes[64] / 1e9:.2f} GB"
