"""Tiny random HunyuanVideo models in diffusers, and what their modules give. Needs torch and diffusers."""

import copy
import pathlib

import torch  # pyright: ignore[reportMissingImports]
from diffusers import HunyuanVideoTransformer3DModel  # pyright: ignore[reportMissingImports]

TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_refiner_layers": 2,
    "mlp_ratio": 3.0,  # not the 4 of the refiner
    "text_embed_dim": 12,
    "pooled_projection_dim": 10,
    "rope_axes_dim": (2, 2, 4),
}
"""Odd sizes where there is a choice; all axes count."""


def make_model(seed=0, **changes):
    """A model in float32 in which every parameter counts, with values that 16 bits hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    model = HunyuanVideoTransformer3DModel(**{**TINY, **changes}).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            values = 0.3 * values
        elif parameter.ndim == 1:
            values = 1 + 0.3 * values
        else:
            values = values * parameter[0].numel() ** -0.5
        parameter.copy_(values.bfloat16())
    return model


def in_16_bits(model, folder):
    """The model as `from_pretrained(torch_dtype=torch.bfloat16)` gives it, by way of a checkpoint in `folder`."""
    folder = pathlib.Path(folder) / "transformer"
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    return HunyuanVideoTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()


def make_inputs(model, size, num_text, lengths, seed=1):
    """Inputs of a forward; values that 16 bits hold, but for timesteps and guidance scales."""
    generator = torch.Generator().manual_seed(seed)
    config, batch = model.config, len(lengths)

    def normal(*shape):
        return torch.randn(shape, generator=generator).bfloat16().float()

    return {
        "latents": normal(batch, config.in_channels, *size),
        "timestep": torch.tensor([437.31, 999.0, 12.6][:batch]),
        "text": normal(batch, num_text, config.text_embed_dim),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "pooled": normal(batch, config.pooled_projection_dim),
        "guidance": torch.tensor([6.0, 4.5, 1.0][:batch]),
    }


def text_mask(inputs):
    """The mask of the text tokens, as the pipeline passes it."""
    return torch.arange(inputs["text"].shape[1]) < inputs["lengths"][:, None]


def _guidance(model, x):
    return {"guidance": x["guidance"] * 1000} if model.config.guidance_embeds else {}


def _patch(model, x):
    return model.x_embedder(x["latents"])


def _conditioning(model, x):
    return model.time_text_embed(x["timestep"], x["pooled"], **_guidance(model, x))[0]


def _refiner(model, x):
    return model.context_embedder(x["text"], x["timestep"], text_mask(x))


def _joint_mask(x):
    valid = torch.cat([torch.ones(x["video"].shape[:2], dtype=torch.bool), text_mask({**x, "text": x["tokens"]})], 1)
    return valid[:, None, None, :]


def _dual(model, x):
    block, rope = model.transformer_blocks[0], model.rope(x["latents"])
    return torch.cat(block(x["video"], x["tokens"], x["vector"], _joint_mask(x), rope), 1)


def _single(model, x):
    block, rope = model.single_transformer_blocks[0], model.rope(x["latents"])
    return torch.cat(block(x["video"], x["tokens"], x["vector"], _joint_mask(x), rope), 1)


def _final(model, x):
    return model.proj_out(model.norm_out(x["video"], x["vector"]))


def _whole(model, x):
    return model(
        x["latents"], x["timestep"], x["text"], text_mask(x), x["pooled"], return_dict=False, **_guidance(model, x)
    )[0]


MODULES = {
    "patch": _patch,
    "conditioning": _conditioning,
    "refiner": _refiner,
    "dual": _dual,
    "single": _single,
    "final": _final,
    "whole": _whole,
}


@torch.no_grad()
def run_modules(model, model_16, inputs):
    """What every module gives for the same inputs in both dtypes, by "module/dtype"; beside them the inputs.

    The tokens that modules further behind are given are the first dual block's, rounded to 16 bits.
    """
    inputs = dict(inputs)
    inputs["vector"] = _conditioning(model, inputs).bfloat16().float()
    inputs["video"] = _patch(model, inputs).bfloat16().float()
    inputs["tokens"] = _refiner(model, inputs).bfloat16().float()
    exact = {"timestep", "guidance", "lengths"}
    rounded = {name: value if name in exact else value.bfloat16() for name, value in inputs.items()}
    outputs = {}
    for name, module in MODULES.items():
        outputs[f"{name}/float32"] = module(model, inputs)
        outputs[f"{name}/bfloat16"] = module(model_16, rounded)
        assert outputs[f"{name}/bfloat16"].dtype == torch.bfloat16
    return {**{f"input/{name}": value for name, value in rounded.items()}, **outputs}
