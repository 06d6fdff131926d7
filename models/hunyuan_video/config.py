"""Sizes of HunyuanVideo, from the config.json of a diffusers checkpoint or from a preset."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fgattn_jax.models.video.layers import Grid

CLASS_NAME = "HunyuanVideoTransformer3DModel"
"""`_class_name` in the config.json of a transformer that this folder can run."""

TIME_FEATURES = 256
"""Sinusoidal features of the timestep and of the guidance scale; fixed in diffusers."""

REFINER_MLP_RATIO = 4.0
"""Hidden width of the token refiner's feed-forward parts over `width`; fixed in diffusers."""


@dataclasses.dataclass(frozen=True)
class HunyuanVideoConfig:
    """Sizes of a HunyuanVideo text-to-video transformer; the defaults are those of the 13B model.

    Attributes:
        in_channels: channels of the latents; the velocity has as many.
        num_heads: attention heads (`N`).
        head_dim: channels of a head (`H`), even.
        num_dual_layers: blocks with separate weights for video and text.
        num_single_layers: blocks with one set of weights for both.
        num_refiner_layers: blocks over the text alone, before the others.
        mlp_ratio: hidden width of the feed-forward parts over `width`.
        patch: frames, rows and columns of a token, in latents.
        guidance_embeds: whether the model takes a guidance scale as an input.
        text_dim: channels of the text embeddings.
        pooled_dim: channels of the pooled text embedding.
        rope_theta: base of the rotary frequencies.
        rope_dims: channels of a head that turn with frame, row and column; even, `head_dim` together.

    Raises:
        ValueError: a size is out of range or sizes do not fit each other.
    """

    in_channels: int = 16
    num_heads: int = 24
    head_dim: int = 128
    num_dual_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch: Grid = (1, 2, 2)
    guidance_embeds: bool = True
    text_dim: int = 4096
    pooled_dim: int = 768
    rope_theta: float = 256.0
    rope_dims: Grid = (16, 56, 56)

    def __post_init__(self) -> None:
        for name in (
            "in_channels",
            "num_heads",
            "head_dim",
            "num_dual_layers",
            "num_single_layers",
            "num_refiner_layers",
            "text_dim",
            "pooled_dim",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"expected `{name}` to be an integer of at least 1, got {name}={value!r}")
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise ValueError(f"expected `patch` to be three sizes (frames, rows, columns), got patch={self.patch}")
        if len(self.rope_dims) != 3 or any(dim < 2 or dim % 2 for dim in self.rope_dims):
            raise ValueError(f"expected `rope_dims` to be three even numbers, got rope_dims={self.rope_dims}")
        if sum(self.rope_dims) != self.head_dim:
            raise ValueError(
                f"expected `rope_dims` to sum to head_dim={self.head_dim}, got rope_dims={self.rope_dims} with sum="
                f"{sum(self.rope_dims)}"
            )
        if not self.mlp_ratio * self.width >= 1:
            raise ValueError(f"expected `mlp_ratio` to be positive, got mlp_ratio={self.mlp_ratio}")
        if not self.rope_theta > 1:
            raise ValueError(f"expected `rope_theta` to be above 1, got rope_theta={self.rope_theta}")

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        """Hidden channels of the feed-forward parts."""
        return int(self.width * self.mlp_ratio)

    @property
    def refiner_mlp_width(self) -> int:
        """Hidden channels of the token refiner's feed-forward parts."""
        return int(self.width * REFINER_MLP_RATIO)

    @property
    def patch_values(self) -> int:
        """Values of one patch of the latents."""
        return self.in_channels * self.patch[0] * self.patch[1] * self.patch[2]

    @property
    def num_attentions(self) -> int:
        """Joint attentions per forward: those of the dual blocks, then those of the single blocks."""
        return self.num_dual_layers + self.num_single_layers

    def grid(self, frames: int, rows: int, columns: int) -> Grid:
        """Tokens per axis for latents of these sizes.

        Raises:
            ValueError: the latents are not whole patches.
        """
        names = ("frames", "rows", "columns")
        for name, size, patch in zip(names, (frames, rows, columns), self.patch, strict=True):
            if size < 1 or size % patch:
                raise ValueError(
                    f"expected latents of whole patches, {name} a multiple of {patch}, got {name}={size}: choose "
                    f"another size of the video (patch={self.patch})"
                )
        return frames // self.patch[0], rows // self.patch[1], columns // self.patch[2]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "HunyuanVideoConfig":
        """Read the config of a diffusers transformer, as parsed from its config.json.

        Fields that are missing have the defaults of the diffusers class.

        Raises:
            ValueError: the config is of another class, of an image-to-video variant, has a field that this model does
                not know, or sizes that do not fit.
        """
        fields = {name: value for name, value in fields.items() if name == "_class_name" or not name.startswith("_")}
        class_name = fields.pop("_class_name", None)
        if class_name != CLASS_NAME:
            raise ValueError(
                f"expected the config of a {CLASS_NAME}, got _class_name={class_name!r}: other HunyuanVideo models "
                "(1.5, FramePack) have other layers and are not supported"
            )
        condition = fields.pop("image_condition_type", None)
        if condition is not None:
            raise ValueError(
                f"expected a text-to-video HunyuanVideo, got image_condition_type={condition!r}: image-to-video "
                "checkpoints are not supported"
            )
        qk_norm = fields.pop("qk_norm", "rms_norm")
        if qk_norm != "rms_norm":
            raise ValueError(f"expected qk_norm='rms_norm', got qk_norm={qk_norm!r}: other norms are not supported")
        in_channels = fields.pop("in_channels", 16)
        out_channels = fields.pop("out_channels", 16) or in_channels
        if out_channels != in_channels:
            raise ValueError(
                f"expected as many channels of the velocity as of the latents, got in_channels={in_channels} and "
                f"out_channels={out_channels}: models with further input channels are not supported"
            )
        patch_rows, patch_frames = fields.pop("patch_size", 2), fields.pop("patch_size_t", 1)
        sizes = {ours: fields.pop(theirs) for theirs, ours in _SIZES.items() if theirs in fields}
        unknown = sorted(name for name, value in fields.items() if value is not None)
        if unknown:
            raise ValueError(
                f"expected no further fields in the config of a {CLASS_NAME}, got {unknown}: this checkpoint may need "
                "a newer release"
            )
        if "rope_dims" in sizes:
            sizes["rope_dims"] = tuple(sizes["rope_dims"])
        return cls(in_channels=in_channels, patch=(patch_frames, patch_rows, patch_rows), **sizes)


_SIZES = {
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "num_layers": "num_dual_layers",
    "num_single_layers": "num_single_layers",
    "num_refiner_layers": "num_refiner_layers",
    "mlp_ratio": "mlp_ratio",
    "guidance_embeds": "guidance_embeds",
    "text_embed_dim": "text_dim",
    "pooled_projection_dim": "pooled_dim",
    "rope_theta": "rope_theta",
    "rope_axes_dim": "rope_dims",
}
"""Fields of config.json and the attributes they become."""

PRESETS = {"hunyuan-video": HunyuanVideoConfig()}
"""Configs by name, for timing without weights."""
