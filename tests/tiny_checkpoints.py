"""Whole checkpoint directories with tiny random weights, made offline: tokenizers, text encoders, VAE, transformer.

Needs torch, diffusers and transformers. What is written has the layout and the classes of the published checkpoints:
`WanPipeline.from_pretrained` and `HunyuanVideoPipeline.from_pretrained` load it.
"""

from pathlib import Path
from typing import Any

TEXT_WIDTH = 32
POOLED_WIDTH = 24
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"


def save_tiny_wan(directory: Path, *, seed: int = 0) -> Path:
    """Write a Wan 2.1 checkpoint directory of about 0.7 MB; the directory is returned."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -2.0)]
    pieces += [(letter, -3.0 - number / 100) for number, letter in enumerate(_ALPHABET)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, additional_special_tokens=[])
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=64, d_model=TEXT_WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    )
    # Embeddings start small in T5; prompts must differ by more than rounding.
    text_encoder.shared.weight.data.normal_(0.0, 1.0)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        ffn_dim=64,
        num_layers=2,
        freq_dim=256,
    )
    _roughen(transformer)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder.eval(), vae=vae, scheduler=scheduler, transformer=transformer
    ).save_pretrained(directory)
    return directory


def save_tiny_hunyuan(directory: Path, *, seed: int = 0) -> Path:
    """Write a HunyuanVideo checkpoint directory of about 2 MB; the directory is returned."""
    import torch
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    torch.manual_seed(seed)
    tokenizer, clip_tokenizer = _llama_tokenizer(), _clip_tokenizer()
    text_encoder = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    text_encoder.embed_tokens.weight.data.normal_(0.0, 1.0)
    text_encoder_2 = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=POOLED_WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    transformer = HunyuanVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    _roughen(transformer)
    HunyuanVideoPipeline(
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=clip_tokenizer,
    ).save_pretrained(directory)
    return directory


def _roughen(transformer: Any) -> None:
    """Norms and tables as training leaves them: neither ones nor zeros, so that leaving one out shows."""
    import torch

    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 1 or "table" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


def _llama_tokenizer() -> Any:
    """Bytes, and the system prompt in as many tokens as the published tokenizer cuts it into.

    The pipeline crops that number of tokens off: with another one the prompt itself would be cropped, or the system
    prompt be left in.
    """
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import AddedToken
    from transformers import LlamaTokenizerFast

    template = DEFAULT_PROMPT_TEMPLATE["template"]
    head, tail = template.split("{}")
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for letter in ["\u2581", *_ALPHABET]:
        vocab[letter] = len(vocab)
    tokenizer = LlamaTokenizerFast(vocab=vocab, merges=[], pad_token="</s>", padding_side="right")
    # Pieces of one length and one long piece at the end: the longest match from the left is the cut that is meant.
    num_pieces = DEFAULT_PROMPT_TEMPLATE["crop_start"]
    length = len(head) // num_pieces
    last = (num_pieces - 1) * length
    pieces = [*(head[start : start + length] for start in range(0, last, length)), head[last:]]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in dict.fromkeys([*pieces, tail])])
    assert len(tokenizer(head).input_ids) == num_pieces
    return tokenizer


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = [*_ALPHABET, *(f"{letter}</w>" for letter in _ALPHABET)]
    vocab = {letter: number for number, letter in enumerate(letters)}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
