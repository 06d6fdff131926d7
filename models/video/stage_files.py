"""What passes from one stage to the next, in memory and in safetensors files: text embeddings and latents."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32

Family = Literal["wan", "hunyuan_video"]
Arrays = Mapping[str, np.ndarray]

EMBEDDINGS_FORMAT = "fgattn_jax.prompt_embeddings.v1"
LATENTS_FORMAT = "fgattn_jax.video_latents.v1"
FIELDS: Mapping[Family, Mapping[str, int]] = {
    "wan": {"text": 3},
    "hunyuan_video": {"text": 3, "lengths": 1, "pooled": 2},
}
"""Arrays of one encoded prompt and their ranks, by family."""


@dataclasses.dataclass(frozen=True)
class PromptEmbeddings:
    """What the text stage gives.

    Attributes:
        family: Whose text encoders made it.
        prompt: The text.
        negative_prompt: The text of the unconditional branch; None where that branch was not encoded.
        branches: Arrays by name, of the prompt and, where it was encoded, of the negative prompt. Wan: `text`
            `[1, 512, D]`, zeros behind the tokens. HunyuanVideo: `text` `[1, 256, D]`, `lengths` int32 `[1]` (valid
            tokens, the first ones) and `pooled` `[1, P]`. All but `lengths` are float32, which holds what
            the encoders computed in 16 bits exactly.

    Raises:
        ValueError: The arrays are not those of the family.
    """

    family: Family
    prompt: str
    negative_prompt: str | None
    branches: tuple[Arrays, ...]

    def __post_init__(self):
        fields = FIELDS[self.family]
        expected = 1 if self.negative_prompt is None else 2
        if len(self.branches) != expected:
            raise ValueError(f"expected {expected} branches of prompt embeddings, got {len(self.branches)}")
        for arrays in self.branches:
            if set(arrays) != set(fields):
                raise ValueError(
                    f"expected the arrays {sorted(fields)} in prompt embeddings of {self.family}, got {sorted(arrays)}"
                )
            for name, rank in fields.items():
                if arrays[name].ndim != rank or arrays[name].shape[0] != 1:
                    raise ValueError(
                        f"expected `{name}` of prompt embeddings to have {rank} axes, the first one of length 1; got "
                        f"shape={arrays[name].shape}"
                    )
            if "lengths" in arrays and not 0 <= int(arrays["lengths"][0]) <= arrays["text"].shape[1]:
                raise ValueError(
                    f"expected `lengths` of prompt embeddings in 0 .. {arrays['text'].shape[1]}, got "
                    f"{int(arrays['lengths'][0])}"
                )


@dataclasses.dataclass(frozen=True)
class SavedLatents:
    """Latents of a clip on their way to the VAE.

    Attributes:
        family: Whose VAE decodes them.
        latents: float32 `[1, C, F, Y, X]` as the sampler gives them.
        facts: Anything JSON holds: prompt, seed, options.
    """

    family: Family
    latents: Float32[np.ndarray, "1 C F Y X"]
    facts: Mapping[str, object]


def save_embeddings(path: Path, embeddings: PromptEmbeddings) -> None:
    """Write prompt embeddings; the file is replaced in one move."""
    tensors = {
        f"{prefix}.{name}": np.ascontiguousarray(array)
        for prefix, arrays in zip(("prompt", "negative_prompt"), embeddings.branches, strict=False)
        for name, array in arrays.items()
    }
    metadata = {"format": EMBEDDINGS_FORMAT, "family": embeddings.family, "prompt": embeddings.prompt}
    if embeddings.negative_prompt is not None:
        metadata["negative_prompt"] = embeddings.negative_prompt
    _save(path, tensors, metadata)


def load_embeddings(path: Path) -> PromptEmbeddings:
    """Read prompt embeddings.

    Raises:
        OSError: The file is missing or cannot be read.
        ValueError: It is no file of `save_embeddings`, or its arrays are not those of its family.
    """
    tensors, metadata = _load(path, EMBEDDINGS_FORMAT, "prompt embeddings", "--save-embeddings")
    negative = metadata.get("negative_prompt")
    branches = []
    for prefix in ("prompt", "negative_prompt")[: 1 if negative is None else 2]:
        start = f"{prefix}."
        branches.append({name.removeprefix(start): each for name, each in tensors.items() if name.startswith(start)})
    try:
        return PromptEmbeddings(_family(metadata), metadata.get("prompt", ""), negative, tuple(branches))
    except ValueError as error:
        raise ValueError(f"{error}; in {str(path)!r}") from error


def save_latents(path: Path, latents: SavedLatents) -> None:
    """Write latents; the file is replaced in one move."""
    metadata = {"format": LATENTS_FORMAT, "family": latents.family, "facts": json.dumps(dict(latents.facts))}
    _save(path, {"latents": np.ascontiguousarray(latents.latents, np.float32)}, metadata)


def load_latents(path: Path) -> SavedLatents:
    """Read latents.

    Raises:
        OSError: The file is missing or cannot be read.
        ValueError: It is no file of `save_latents`, or holds no latents of one clip.
    """
    tensors, metadata = _load(path, LATENTS_FORMAT, "latents", "--latents-out")
    latents = tensors.get("latents")
    if latents is None or latents.ndim != 5 or latents.shape[0] != 1:
        got = "no such array" if latents is None else f"shape={latents.shape}"
        raise ValueError(f"expected `latents` [1, C, F, Y, X] in {str(path)!r}, got {got}")
    return SavedLatents(_family(metadata), latents.astype(np.float32), json.loads(metadata.get("facts", "{}")))


def _family(metadata: Mapping[str, str]) -> Family:
    family = metadata.get("family")
    for known in FIELDS:
        if family == known:
            return known
    raise ValueError(f"expected a model family, one of {', '.join(FIELDS)}; got {family!r}")


def _save(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    from safetensors.numpy import save

    # NumPy alone reads and writes these files: asking JAX for a device would take a GPU's memory from torch.
    data = save(tensors, metadata=metadata)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def _load(path: Path, wanted: str, what: str, option: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):  # a missing or unreadable file is an OSError, not a wrong format
        pass
    with contextlib.ExitStack() as stack:
        try:
            stored = stack.enter_context(safe_open(str(path), framework="numpy"))
            metadata = dict(stored.metadata() or {})
        except SafetensorError as error:
            raise ValueError(
                f"expected {what} in {str(path)!r} (a file of `fgattn generate {option}`), which is no safetensors "
                f"file or damaged: {error}"
            ) from error
        if metadata.get("format") != wanted:
            raise ValueError(
                f"expected {what} in {str(path)!r} with format={wanted!r}, got format={metadata.get('format')!r}: "
                f"make the file with `fgattn generate {option}`"
            )
        return {name: stored.get_tensor(name) for name in stored.keys()}, metadata  # noqa: SIM118
