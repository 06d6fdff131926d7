"""Writes tests/golden/pipelines: latents of diffusers' pipelines for the tiny checkpoints of tests/golden.

    python tests/programs/make_pipeline_golden.py [folder]

`wan.npz` and `hunyuan_video.npz` hold inputs by name, and final latents by "case/dtype" (see `WAN` and `HUNYUAN`).
Needs torch and diffusers. tests/test_video_pipelines.py uses the functions on other numbers too.
"""

import pathlib
import sys

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel, WanPipeline  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import make_scheduler_golden as schedulers
import make_wan_golden

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WAN = {"guided": 5.0, "alone": 1.0}
"""Cases of Wan: strength of guidance."""
HUNYUAN = {"embedded": 1.0, "guided": 2.5}
"""Cases of HunyuanVideo: strength of true guidance, beside the guidance scale of the model."""
SCALE = 6.0
SHIFTS = {"wan": 3.0, "hunyuan_video": 7.0}


def wan_inputs(config: dict, size: tuple[int, int, int], seed: int) -> dict[str, np.ndarray]:
    """Start and text of both branches, for a batch of two."""
    random = np.random.default_rng(seed)
    noise = random.standard_normal((2, config["in_channels"], *size))
    text, negative = random.standard_normal((2, 2, 9, config["text_dim"]))
    text[0, 5:], negative[:, 3:] = 0, 0
    return {name: x.astype(np.float32) for name, x in {"noise": noise, "text": text, "negative": negative}.items()}


@torch.no_grad()
def run_wan(folder: pathlib.Path, inputs: dict[str, np.ndarray], *, dtype: str, guidance: float, steps: int):
    """Final latents of `WanPipeline`."""
    model = make_wan_golden.load_model(folder, DTYPES[dtype])
    scheduler = schedulers.scheduler("unipc", SHIFTS["wan"], steps)
    schedulers.multiply_as_on_gpus(scheduler)
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=model)
    given = {name: torch.from_numpy(x) for name, x in inputs.items()}
    return _latents(
        pipeline,
        given["noise"],
        prompt_embeds=given["text"],
        negative_prompt_embeds=given["negative"],
        guidance_scale=guidance,
        num_inference_steps=steps,
    )


def hunyuan_inputs(config: dict, size: tuple[int, int, int], seed: int) -> dict[str, np.ndarray]:
    """Start, texts and pooled texts of both branches, for a batch of two; text lengths differ in all of them."""
    random = np.random.default_rng(seed)
    arrays = {"noise": random.standard_normal((2, config["in_channels"], *size))}
    for name in ("", "negative_"):
        arrays[f"{name}text"] = random.standard_normal((2, 7, config["text_embed_dim"]))
        arrays[f"{name}pooled"] = random.standard_normal((2, config["pooled_projection_dim"]))
    lengths = {"lengths": np.asarray([7, 2], np.int32), "negative_lengths": np.asarray([1, 5], np.int32)}
    return {name: x.astype(np.float32) for name, x in arrays.items()} | lengths


@torch.no_grad()
def run_hunyuan(folder: pathlib.Path, inputs: dict[str, np.ndarray], *, dtype: str, guidance: float, steps: int):
    """Final latents of `HunyuanVideoPipeline`."""
    model = HunyuanVideoTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=DTYPES[dtype]).eval()
    scheduler = schedulers.scheduler("euler", SHIFTS["hunyuan_video"], steps)
    schedulers.multiply_as_on_gpus(scheduler)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae", "text_encoder_2", "tokenizer_2"))
    pipeline = HunyuanVideoPipeline(transformer=model, scheduler=scheduler, **parts)
    given = {name: torch.from_numpy(x) for name, x in inputs.items()}
    prompt = {}
    for name in ("", "negative_"):
        prompt[f"{name}prompt_embeds"] = given[f"{name}text"]
        prompt[f"{name}pooled_prompt_embeds"] = given[f"{name}pooled"]
        valid = torch.arange(given["text"].shape[1]) < given[f"{name}lengths"][:, None]
        prompt[f"{name}prompt_attention_mask"] = valid
    return _latents(
        pipeline,
        given["noise"],
        **prompt,
        guidance_scale=SCALE,
        true_cfg_scale=guidance,
        num_inference_steps=steps,
    )


def _latents(pipeline, noise: torch.Tensor, **settings) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    frames, rows, columns = noise.shape[2:]
    size = {"height": 8 * rows, "width": 8 * columns, "num_frames": 4 * (frames - 1) + 1}
    out = pipeline(**settings, **size, latents=noise, output_type="latent", return_dict=False)[0]
    return out.as_subclass(torch.Tensor).float().numpy()


def main() -> None:
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN / "pipelines"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    inputs = wan_inputs(make_wan_golden.SIZES, (3, 4, 6), seed=3)
    arrays = dict(inputs)
    for case, guidance in WAN.items():
        for dtype in DTYPES:
            arrays[f"{case}/{dtype}"] = run_wan(GOLDEN / "wan", inputs, dtype=dtype, guidance=guidance, steps=20)
    np.savez_compressed(folder / "wan.npz", **arrays)
    config = HunyuanVideoTransformer3DModel.load_config(GOLDEN / "hunyuan_video" / "transformer")
    inputs = hunyuan_inputs(config, (3, 4, 6), seed=4)
    arrays = dict(inputs)
    for case, guidance in HUNYUAN.items():
        for dtype in DTYPES:
            where = GOLDEN / "hunyuan_video"
            arrays[f"{case}/{dtype}"] = run_hunyuan(where, inputs, dtype=dtype, guidance=guidance, steps=20)
    np.savez_compressed(folder / "hunyuan_video.npz", **arrays)
    print({file.name: file.stat().st_size for file in folder.iterdir()})


if __name__ == "__main__":
    main()
