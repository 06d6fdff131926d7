"""The stages around denoising, in torch through diffusers: prompts to embeddings, latents to frames.

Each loads what it needs from a checkpoint directory, runs it, and releases its memory. Nothing is downloaded. torch,
diffusers and transformers come with the extra `torch`; importing this module needs none of them.
"""
# Nor does checking its types.
# pyright: reportMissingImports=false

import contextlib
import gc
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from fgattn_jax.models.video.stage_files import Arrays, Family, PromptEmbeddings

TorchDtype = Literal["float32", "bfloat16", "float16"]

_PIPELINES: dict[Family, str] = {"wan": "WanPipeline", "hunyuan_video": "HunyuanVideoPipeline"}
_VAES: dict[Family, str] = {"wan": "AutoencoderKLWan", "hunyuan_video": "AutoencoderKLHunyuanVideo"}
_ENCODER_FOLDERS: dict[Family, tuple[str, ...]] = {
    "wan": ("tokenizer", "text_encoder"),
    "hunyuan_video": ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
}
_WAN_TEXT_TOKENS = 512


def check_stage(directory: Path, family: Family, stage: Literal["encode", "decode"]) -> None:
    """Refuse a checkpoint directory that lacks what a stage reads, before anything is loaded.

    Args:
        directory: The checkpoint directory, with `model_index.json`.
        family: Of the checkpoint.
        stage: "encode" needs tokenizers and text encoders, "decode" the VAE.

    Raises:
        ValueError: A folder or file is missing. Names all of them.
    """
    wanted = ["vae/config.json"] if stage == "decode" else ["model_index.json", *_ENCODER_FOLDERS[family]]
    missing = [name for name in wanted if not (directory / name).exists()]
    if missing:
        what = "the text encoders" if stage == "encode" else "the VAE"
        other = "`--from-embeddings`" if stage == "encode" else "`--latents-out` without `--out`"
        raise ValueError(
            f"expected {what} in the checkpoint directory {str(directory)!r}, missing are {', '.join(missing)}: "
            f"download the whole repository, or use {other}"
        )


def encode_prompt(
    directory: Path, family: Family, prompt: str, negative_prompt: str | None = None, *, dtype: TorchDtype = "float32"
) -> PromptEmbeddings:
    """Encode a prompt with the text encoders of a checkpoint directory, as diffusers' pipelines do.

    Args:
        directory: The checkpoint directory, with `model_index.json`.
        family: Of the checkpoint.
        prompt: What is to be seen.
        negative_prompt: The text of the unconditional branch, "" for none; None leaves that branch out.
        dtype: Of the text encoders' weights.

    Returns:
        Embeddings on the host.

    Raises:
        ModuleNotFoundError: The extra `torch` is not installed.
        ValueError: The directory lacks the text encoders, or its tokenizer pads prompts at their start.
    """
    check_stage(directory, family, "encode")
    import diffusers
    import torch

    with _quiet(), _released():
        pipeline = (
            getattr(diffusers, _PIPELINES[family])
            .from_pretrained(
                str(directory),
                transformer=None,
                vae=None,
                scheduler=None,
                torch_dtype=getattr(torch, dtype),
                local_files_only=True,
                low_cpu_mem_usage=False,  # needs accelerate, and saves nothing where transformers loads
            )
            .to(_device())
        )
        encode = _encode_wan if family == "wan" else _encode_hunyuan
        texts = [prompt] if negative_prompt is None else [prompt, negative_prompt]
        with torch.no_grad():
            branches = tuple(encode(pipeline, text) for text in texts)
        del pipeline
    return PromptEmbeddings(family, prompt, negative_prompt, branches)


def _encode_wan(pipeline: Any, text: str) -> Arrays:
    embeddings, _ = pipeline.encode_prompt(
        text, do_classifier_free_guidance=False, max_sequence_length=_WAN_TEXT_TOKENS
    )
    return {"text": _host(embeddings)}


def _encode_hunyuan(pipeline: Any, text: str) -> Arrays:
    embeddings, pooled, mask = pipeline.encode_prompt(text)
    valid = mask.cpu().numpy().astype(bool)
    lengths = valid.sum(axis=1).astype(np.int32)
    if not (valid == (np.arange(valid.shape[1]) < lengths[:, None])).all():
        raise ValueError(
            "expected a tokenizer that pads prompts at their end, this one does it elsewhere: set "
            '"padding_side": "right" in tokenizer/tokenizer_config.json of the checkpoint directory'
        )
    return {"text": _host(embeddings), "lengths": lengths, "pooled": _host(pooled)}


def decode_latents(
    directory: Path, family: Family, latents: Float32[np.ndarray, "1 C F Y X"], *, dtype: TorchDtype = "float32"
) -> Float32[np.ndarray, "frames height width 3"]:
    """Decode latents with the VAE of a checkpoint directory, as diffusers' pipelines do.

    The latents are taken off the scale of the transformer first: times `latents_std` plus `latents_mean` (Wan), or
    divided by `scaling_factor` (HunyuanVideo). HunyuanVideo's VAE works in overlapping tiles, whose seams are blended:
    it needs more memory than any GPU has for a whole clip of full size. A clip of one tile is decoded as a whole.

    Args:
        directory: The checkpoint directory, with the folder `vae`.
        family: Of the checkpoint.
        latents: As the sampler gives them.
        dtype: Of the VAE's weights and activations.

    Returns:
        Frames in [0, 1], `4 (F - 1) + 1` of them, with 8 pixels per latent.

    Raises:
        ModuleNotFoundError: The extra `torch` is not installed.
        ValueError: The directory lacks the VAE, or the latents have other channels than it.
    """
    check_stage(directory, family, "decode")
    channels = vae_channels(directory, family)
    if latents.shape[1] != channels:
        raise ValueError(
            f"expected latents of {channels} channels for the VAE in {str(directory)!r}, got shape={latents.shape}: "
            "decode with the checkpoint that made them"
        )
    import diffusers
    import torch

    with _quiet(), _released():
        vae = getattr(diffusers, _VAES[family]).from_pretrained(
            str(directory),
            subfolder="vae",
            torch_dtype=getattr(torch, dtype),
            local_files_only=True,
            low_cpu_mem_usage=False,
        )
        vae = vae.to(_device()).eval()
        if family == "hunyuan_video":
            vae.enable_tiling()
        with torch.no_grad():
            scaled = _to_vae_scale(torch.from_numpy(np.array(latents)).to(vae.device, vae.dtype), vae, family)
            video = vae.decode(scaled, return_dict=False)[0][0]  # [3, frames, height, width]
            # In float32: 16 bits would show as steps in the sky.
            frames = (video.permute(1, 2, 3, 0).float() * 0.5 + 0.5).clamp(0.0, 1.0).cpu().numpy()
        del vae, scaled, video
    return frames


def vae_channels(directory: Path, family: Family) -> int:
    """Channels of the latents that the VAE of a checkpoint directory takes."""
    config = json.loads((directory / "vae" / "config.json").read_text())
    return int(config["z_dim" if family == "wan" else "latent_channels"])


def _to_vae_scale(latents: Any, vae: Any, family: Family) -> Any:
    if family == "hunyuan_video":
        return latents / vae.config.scaling_factor
    import torch

    def per_channel(values: list[float]) -> Any:
        return torch.tensor(values).to(latents.device, latents.dtype)[:, None, None, None]

    # By the inverse, in the dtype of the VAE, as the pipeline has it: in 16 bits the order of roundings shows.
    inverse = 1.0 / per_channel(vae.config.latents_std)
    return latents / inverse + per_channel(vae.config.latents_mean)


def torch_device() -> str:
    """Where the stages run: "cuda" if torch has it, else "cpu"."""
    return str(_device())


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _host(tensor: Any) -> Float32[np.ndarray, "*shape"]:
    return tensor.float().cpu().numpy()


@contextlib.contextmanager
def _released() -> Iterator[None]:
    """What was allocated inside and is no longer referred to goes back to the device at the end."""
    import torch

    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own progress bars over files, and without what newer ones say of `torch_dtype`.

    Older ones know no other name for it.
    """
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    modules = [diffusers_logging, transformers_logging]
    were_on = [module.is_progress_bar_enabled() for module in modules]
    for module in modules:
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype.*")
            yield
    finally:
        for module, was_on in zip(modules, were_on, strict=True):
            if was_on:
                module.enable_progress_bar()
