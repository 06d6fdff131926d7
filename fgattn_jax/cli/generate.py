"""`fgattn generate`: from a prompt to a clip with Wan 2.1 or HunyuanVideo, dense or with slice masks."""

import argparse
from pathlib import Path

_PREDICTORS = ("exact", "exact-mass", "mean-query")
_DTYPES = ("bfloat16", "float32")
_VAE_DTYPES = ("float32", "bfloat16", "float16")

_EPILOG = """\
Three stages, each of which releases its memory: text encoders (torch), denoising (JAX), VAE (torch). The first and the
last need pip install 'fgattn-jax[torch]', mp4 files 'fgattn-jax[video]'. Files can stand in for stages, so that torch
and JAX need not share a machine. DIR is a downloaded diffusers checkpoint directory, with model_index.json, of either
family: the command sees which. It downloads nothing.

attention:
  cached       masks are made at refresh steps, which run dense, and reused by the steps after them (the default)
  mean-query   masks are made at every step from mean queries, no step but --dense-steps is dense
  dense        no masks

examples:
  fgattn generate --model DIR --prompt "A cat surfs at dusk." --out cat.mp4
  fgattn generate --model DIR --prompt "A cat surfs at dusk." --out cat.mp4 --size 720p --dense-steps 5 --tau 1
  fgattn generate --model DIR --prompt "A cat surfs at dusk." --out cat.mp4 --attention mean-query --density 0.4
  fgattn generate --model DIR --prompt "A cat surfs at dusk." --out cat.mp4 --compare-dense --report run.json
  fgattn generate --model DIR --prompt "A cat surfs at dusk." --out cat.mp4 --devices 2 --split-weights

stage by stage:
  fgattn generate --model DIR --prompt "A cat surfs at dusk." --save-embeddings cat.safetensors
  fgattn generate --model DIR --from-embeddings cat.safetensors --latents-out latents.safetensors
  fgattn generate --model DIR --decode latents.safetensors --out cat.mp4

without weights, for timing:
  fgattn generate --random-weights wan-tiny                      seconds on a CPU: to see that everything works
  fgattn generate --random-weights wan-1.3b-480p --density 0.35 --steps 4 --compare-dense --report run.json
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the options of `fgattn generate`; an option that was not given is None or False."""
    from fgattn_jax.cli._generate_families import RANDOM_MODELS

    parser = subparsers.add_parser(
        "generate",
        description="Make a clip from a prompt with Wan 2.1 or HunyuanVideo, with sparse attention.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", type=Path, metavar="DIR", help="diffusers checkpoint directory")
    group.add_argument(
        "--random-weights",
        choices=tuple(RANDOM_MODELS),
        metavar="NAME",
        help=f"random weights and embeddings instead, for timing: {', '.join(RANDOM_MODELS)}",
    )
    group.add_argument("--dtype", choices=_DTYPES, help="of the model (default: bfloat16, on a CPU float32)")
    group.add_argument(
        "--match-diffusers-bf16",
        action="store_true",
        help="round outside of the model where diffusers' pipelines do, to get their clips",
    )

    group = parser.add_argument_group("text and files")
    group.add_argument("--prompt", metavar="TEXT", help="what is to be seen")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what is not to be seen (default: empty)")
    group.add_argument("--from-embeddings", type=Path, metavar="FILE", help="instead of --prompt; needs no torch")
    group.add_argument("--save-embeddings", type=Path, metavar="FILE", help="keep the embeddings of the prompt")
    group.add_argument("--out", type=Path, metavar="FILE", help="the clip, .mp4 or .gif")
    group.add_argument("--latents-out", type=Path, metavar="FILE", help="keep what is denoised; needs no torch")
    group.add_argument("--decode", type=Path, metavar="FILE", help="latents of an earlier run to --out; nothing else")
    group.add_argument("--fps", type=float, metavar="N", help="frames per second (default: 16 Wan, 24 HunyuanVideo)")
    group.add_argument(
        "--vae-dtype", choices=_VAE_DTYPES, help="of the VAE (default: float32, for HunyuanVideo on a GPU float16)"
    )
    group.add_argument("--report", type=Path, metavar="FILE", help="options, times, densities, memory as JSON")

    group = parser.add_argument_group("sampling (defaults: those of diffusers)")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: 50)")
    group.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="Wan: classifier-free guidance, two forwards a step, 1 is off (default: 5); HunyuanVideo: the scale that "
        "the model takes as an input (default: 6)",
    )
    group.add_argument(
        "--true-guidance", type=float, metavar="W", help="HunyuanVideo: classifier-free guidance on top (default: off)"
    )
    group.add_argument(
        "--flow-shift", type=float, metavar="S", help="default: Wan 3 at 480p and 5 at 720p, HunyuanVideo 7"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the noise, which is not torch's (default: 0)")
    group.add_argument("--frames", type=int, metavar="N", help="4 k + 1 (default: 81 Wan, 129 HunyuanVideo)")
    group.add_argument(
        "--size", metavar="HxW", help="pixels, multiples of 16; or 480p or 720p (default: 480p Wan, 720p HunyuanVideo)"
    )

    group = parser.add_argument_group("devices")
    group.add_argument("--devices", type=int, metavar="N", help="make the clip on N devices together (default: 1)")
    group.add_argument(
        "--divide",
        choices=("tokens", "heads"),
        help="what each device has a part of: tokens, and in attention heads (Ulysses); or heads and hidden channels "
        "(default: tokens)",
    )
    group.add_argument(
        "--split-weights",
        action="store_true",
        help="with tokens, keep every parameter in parts, too, and gather it when used",
    )

    group = parser.add_argument_group("attention")
    group.add_argument(
        "--attention", choices=("cached", "mean-query", "dense"), help="how steps attend, see below (default: cached)"
    )
    group.add_argument("--dense-steps", type=int, metavar="N", help="dense steps before the first masks (default: 0)")
    group.add_argument("--dense-layers", metavar="I,J", help="layers that are always dense; -1 is the last")
    group.add_argument("--refresh-every", type=int, metavar="N", help="steps between refreshes (default: 15)")
    group.add_argument(
        "--predictor",
        choices=_PREDICTORS,
        help="how masks are made: largest probability above a threshold; smallest set of keys with a share of the "
        "mass; key against the mean query (default: what the rule below needs)",
    )
    group.add_argument("--tau", type=float, metavar="C", help="keep above C / keys (default: 0.5, mean-query 0.1)")
    group.add_argument("--mass", type=float, metavar="P", help="keep this share of the probability mass of every row")
    group.add_argument("--top-k", type=int, metavar="K", help="keep K keys of every row")
    group.add_argument("--density", type=float, metavar="D", help="keep this share of the keys of every row")
    group.add_argument("--query-block", type=int, choices=(16, 32, 64, 128), help="queries per slice (default: 128)")
    group.add_argument(
        "--query-order", metavar="NAME", help="raster, cubes, cubes_2x8x8, hilbert or morton (default: cubes)"
    )
    group.add_argument(
        "--shared-masks", action="store_true", help="one set of masks for both branches of classifier-free guidance"
    )
    group.add_argument(
        "--masks-on-host", action="store_true", help="keep masks in host memory, one layer at a time on the device"
    )
    group.add_argument(
        "--compare-dense",
        action="store_true",
        help="run dense, too, from the same noise; speed, and PSNR, SSIM and LPIPS (where installed) per frame; "
        "the dense clip is NAME.dense.mp4",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the stages that the options ask for; returns 0."""
    from fgattn_jax.cli import _generate_options

    job = _generate_options.read_options(args)
    from fgattn_jax.cli import _generate_stages

    if isinstance(job, _generate_options.DecodeJob):
        _generate_stages.decode_file(job)
    elif isinstance(job, _generate_options.EncodeJob):
        _generate_stages.encode_file(job)
    else:
        _generate_stages.generate(job, args)
    return 0
