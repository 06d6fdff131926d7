"""Writes tests/golden/wan: a tiny random Wan checkpoint, inputs, and what diffusers makes of them.

    python tests/programs/make_wan_golden.py [folder]

Needs torch and diffusers. tests/test_wan_live.py uses the functions on fresh numbers.
"""

import json
import pathlib
import sys

import torch  # pyright: ignore[reportMissingImports]
from diffusers import WanTransformer3DModel  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden" / "wan"
SIZES = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,  # rotary parts of 8, 4 and 4 channels
    "ffn_dim": 40,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 32,
}


def make_model(seed: int, **sizes: int) -> WanTransformer3DModel:
    """A model in which no parameter has a value that hides it: norms are not one, biases and tables not zero."""
    model = WanTransformer3DModel(**{**SIZES, **sizes}).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.3 * values
        elif name.endswith("bias"):
            values = 0.2 * values
        elif name.endswith("weight"):
            values = values * parameter[0].numel() ** -0.5
        else:
            values = 0.5 * values
        parameter.data.copy_(values)
    return model


def make_inputs(seed: int, config: dict, latents: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Two entries with times of their own; text with zeros behind it, as the pipeline pads it."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn((2, 9, config["text_dim"]), generator=generator)
    text[0, 5:], text[1, 7:] = 0, 0
    return {
        "latents": torch.randn((2, config["in_channels"], *latents), generator=generator),
        "timestep": torch.tensor([999, 437]),
        "text": text,
    }


def save_model(model: WanTransformer3DModel, folder: pathlib.Path, max_shard_size: str = "1GB") -> None:
    """Write the checkpoint as the transformer of a pipeline's directory, without a trace of where it was made."""
    model.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
    path = folder / "transformer" / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_model(folder: pathlib.Path, dtype: torch.dtype) -> WanTransformer3DModel:
    """The checkpoint as `from_pretrained(..., torch_dtype=dtype)` gives it to a user.

    That keeps some modules in float32, which `model.to(dtype)` does not, and needs the package accelerate: the same
    casts are made here, by the list of the class. (They were compared once, parameter by parameter.)
    """
    model = WanTransformer3DModel(**WanTransformer3DModel.load_config(folder / "transformer")).eval()
    tensors = {}
    for file in (folder / "transformer").glob("*.safetensors"):
        tensors |= load_file(file)
    model.load_state_dict(tensors)
    kept = set(WanTransformer3DModel._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def record(folder: pathlib.Path, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What comes out of every part in one forward of the checkpoint, loaded in `dtype`."""
    model = load_model(folder, dtype)
    seen: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, given, result):
            # Only the condition embedder gives more than one; its fourth is None without an image.
            results = result[:3] if isinstance(result, tuple) else (result,)
            names = ("output", "modulation", "text")[: len(results)]
            seen.update({f"{name}.{part}": value for part, value in zip(names, results, strict=True)})

        return hook

    parts = {"patches": model.patch_embedding, "condition": model.condition_embedder, "last": model.proj_out}
    parts |= {f"block{i}": block for i, block in enumerate(model.blocks)}
    for name, part in parts.items():
        part.register_forward_hook(keep(name))
    for i, block in enumerate(model.blocks):
        for name, attention in (("self", block.attn1), ("cross", block.attn2)):
            # What the attention gives, heads side by side, is what the linear behind it is given.
            attention.to_out[0].register_forward_pre_hook(
                lambda _, given, key=f"{name}{i}": seen.update({key: given[0]})
            )
    out = model(inputs["latents"].to(dtype), inputs["timestep"], inputs["text"].to(dtype)).sample
    wanted = {
        "tokens": seen["patches.output"].flatten(2).transpose(1, 2),
        "time": seen["condition.output"],
        "modulation": seen["condition.modulation"].unflatten(1, (6, -1)),
        "text": seen["condition.text"],
        **{f"block{i}": seen[f"block{i}.output"] for i in range(len(model.blocks))},
        **{f"{kind}{i}": seen[f"{kind}{i}"] for i in range(len(model.blocks)) for kind in ("self", "cross")},
        "patches": seen["last.output"],
        "velocity": out,
    }
    return {name: value.contiguous() for name, value in wanted.items()}


def main() -> None:
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN
    torch.set_num_threads(1)
    model = make_model(seed=1)
    save_model(model, folder)
    inputs = make_inputs(2, dict(model.config), (3, 6, 10))  # a grid of 3 x 3 x 5 tokens
    save_file(inputs, folder / "inputs.safetensors")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        save_file(record(folder, inputs, dtype), folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
