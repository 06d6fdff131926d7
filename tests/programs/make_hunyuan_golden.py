"""Write the golden files of HunyuanVideo: `python tests/programs/make_hunyuan_golden.py`. Needs torch and diffusers.

In tests/golden/hunyuan_video: `transformer/`, a tiny random checkpoint as diffusers writes it, and
`modules.safetensors`, inputs and outputs of every module in float32 and in bfloat16.
"""

import pathlib
import sys

from safetensors.torch import save_file

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

import hunyuan_torch  # noqa: E402

LIMIT = 400_000


def main():
    folder = TESTS / "golden" / "hunyuan_video"
    folder.mkdir(parents=True, exist_ok=True)
    model = hunyuan_torch.make_model()
    model_16 = hunyuan_torch.in_16_bits(model, folder)
    # 45 video tokens; one text token beside a full line of them.
    inputs = hunyuan_torch.make_inputs(model, size=(3, 6, 10), num_text=7, lengths=(1, 7))
    arrays = hunyuan_torch.run_modules(model, model_16, inputs)
    save_file({name: value.contiguous() for name, value in arrays.items()}, folder / "modules.safetensors")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{len(arrays)} arrays, {size:,} bytes")
    assert size < LIMIT


if __name__ == "__main__":
    main()
