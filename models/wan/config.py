"""Sizes of a Wan transformer, from the config.json of a diffusers checkpoint; what is not Wan 2.1 T2V is refused."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fgattn_jax.models.video.layers import Grid

CLASS_NAME = "WanTransformer3DModel"
"""Name of the class in diffusers."""

_FIELDS = {
    "patch_size": "patch",
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "text_dim": "text_dim",
    "freq_dim": "time_features",
    "ffn_dim": "hidden_dim",
    "num_layers": "num_layers",
    "eps": "eps",
    "rope_max_seq_len": "max_positions",
}
"""Names of diffusers and ours."""
_IMAGE_FIELDS = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
# `qk_norm` names the one norm there is; diffusers reads neither it nor the other two.
_WITHOUT_EFFECT = ("qk_norm", "window_size", "add_img_emb")


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan 2.1 text-to-video transformer; wrong ones raise when the config is made. The default is 1.3B.

    Attributes:
        num_layers: transformer blocks, scanned.
        num_heads: attention heads, `N`.
        head_dim: channels of a head, `H`; even, at least 8. Rotary splits it into frame, row and column parts.
        hidden_dim: hidden width of the feed-forward part.
        in_channels: channels of the latents.
        out_channels: channels of the velocity; the same number.
        patch: frames, rows and columns of one token.
        text_dim: channels of the text embedding.
        time_features: sinusoidal features of the timestep; even.
        eps: what every norm adds under its root.
        max_positions: tokens that an axis may have.

    Raises:
        ValueError: a size is out of range or sizes do not fit each other.
    """

    num_layers: int = 30
    num_heads: int = 12
    head_dim: int = 128
    hidden_dim: int = 8960
    in_channels: int = 16
    out_channels: int = 16
    patch: Grid = (1, 2, 2)
    text_dim: int = 4096
    time_features: int = 256
    eps: float = 1e-6
    max_positions: int = 1024

    def __post_init__(self):
        for name in ("num_layers", "num_heads", "hidden_dim", "in_channels", "text_dim", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected `{name}` of at least 1, got {name}={getattr(self, name)}")
        if self.head_dim < 8 or self.head_dim % 2:
            raise ValueError(
                f"expected an even `head_dim` of at least 8 (three rotary axes), got head_dim={self.head_dim}"
            )
        if self.time_features < 2 or self.time_features % 2:
            raise ValueError(f"expected an even, positive `time_features`, got time_features={self.time_features}")
        if self.eps <= 0:
            raise ValueError(f"expected `eps` above 0, got eps={self.eps}")
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise ValueError(
                f"expected three positive sizes (frames, rows, columns) for `patch`, got patch={self.patch}"
            )
        if self.in_channels != self.out_channels:
            raise ValueError(
                f"expected as many channels in as out, got in_channels={self.in_channels}, "
                f"out_channels={self.out_channels}: this is an image-to-video or control checkpoint of Wan; take a "
                "text-to-video one"
            )

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.num_heads * self.head_dim

    @property
    def num_attentions(self) -> int:
        """Self-attentions per forward."""
        return self.num_layers

    @property
    def patch_dim(self) -> int:
        """Values of one patch."""
        return self.patch[0] * self.patch[1] * self.patch[2] * self.in_channels

    @property
    def rope_dims(self) -> Grid:
        """Channels of a head that turn with frame, row and column; they sum to `head_dim`."""
        spatial = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * spatial, spatial, spatial

    def grid(self, frames: int, rows: int, columns: int) -> Grid:
        """Tokens per axis for latents of these sizes.

        Raises:
            ValueError: the latents are not whole patches, or have more of them along an axis than there are positions.
        """
        sizes = {"frames": frames, "rows": rows, "columns": columns}
        tokens = []
        for (name, size), patch in zip(sizes.items(), self.patch, strict=True):
            if size < 1 or size % patch:
                raise ValueError(
                    f"expected latents of whole patches, got {name}={size}, no multiple of {patch} (patch={self.patch})"
                )
            if size // patch > self.max_positions:
                raise ValueError(
                    f"expected at most {self.max_positions} patches along an axis, got {size // patch} "
                    f"({name}={size}, patch={self.patch}): the model knows no further positions"
                )
            tokens.append(size // patch)
        return tokens[0], tokens[1], tokens[2]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "WanConfig":
        """Make a config from what `read_config` gives for a diffusers checkpoint.

        Raises:
            ValueError: it is of another class or of image-to-video, a field is missing, or one is not known and set.
        """
        if fields.get("_class_name") != CLASS_NAME:
            raise ValueError(
                f"expected the config of a {CLASS_NAME}, got _class_name={fields.get('_class_name')!r}: this is "
                "another model"
            )
        image = [name for name in _IMAGE_FIELDS if fields.get(name) is not None]
        if image or fields.get("in_channels") == 36:
            name = (image or ["in_channels"])[0]
            raise ValueError(
                f"expected a text-to-video checkpoint of Wan 2.1, got {name}={fields[name]}: this is an image-to-video "
                "one, which is not supported"
            )
        if not fields.get("cross_attn_norm", True):
            raise ValueError(
                "expected cross_attn_norm=True, as every checkpoint of Wan 2.1 has it, got cross_attn_norm="
                f"{fields['cross_attn_norm']}"
            )
        missing = sorted(_FIELDS.keys() - fields.keys() - {"rope_max_seq_len"})
        if missing:
            raise ValueError(
                f"expected the fields {sorted(_FIELDS)} in the config of a Wan transformer, got no {missing}"
            )
        known = {*_FIELDS, *_IMAGE_FIELDS, *_WITHOUT_EFFECT, "cross_attn_norm"}
        unknown = {name: value for name, value in fields.items() if name not in known and not name.startswith("_")}
        active = sorted(name for name, value in unknown.items() if value not in (None, False))
        if active:
            raise ValueError(
                f"expected the config of a Wan 2.1 transformer, got {active[0]}={unknown[active[0]]!r}, which is not "
                "known: this is a variant that is not supported"
            )
        values = {ours: fields[theirs] for theirs, ours in _FIELDS.items() if theirs in fields}
        return cls(**{**values, "patch": tuple(fields["patch_size"])})

    def to_json(self) -> dict[str, Any]:
        """The config as diffusers writes it: what `from_json` reads."""
        fields = {theirs: getattr(self, ours) for theirs, ours in _FIELDS.items()}
        constant = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", **dict.fromkeys(_IMAGE_FIELDS)}
        return {"_class_name": CLASS_NAME, **fields, **constant, "patch_size": list(self.patch)}


PRESETS = {
    "wan-1.3b": WanConfig(),
    "wan-14b": WanConfig(num_layers=40, num_heads=40, hidden_dim=13824),
}
"""The published sizes by name."""
