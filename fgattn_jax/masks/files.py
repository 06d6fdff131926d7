"""Masks in files: safetensors, with the static numbers in its metadata (docs/mask_format.md)."""

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fgattn_jax.masks.slice_mask import SliceMask

_FORMAT = "fgattn_jax.slice_mask"
_VERSION = "1"
_STATIC = ("query_block", "num_keys", "num_queries")
_DTYPES = {"bits": np.uint32, "query_order": np.int32}


def save_mask(path: str | os.PathLike[str], mask: SliceMask) -> None:
    """Write a mask, stacked or not, to a safetensors file, replacing one that is there only once all is written.

    Raises:
        ValueError: If the mask is wrong (see `SliceMask.check`) or traced.
        OSError: If the file cannot be written.
    """
    from safetensors.numpy import save

    mask.check()
    tensors = {"bits": np.ascontiguousarray(mask.bits)}
    if mask.query_order is not None:
        tensors["query_order"] = np.ascontiguousarray(mask.query_order)
    metadata = {"format": _FORMAT, "format_version": _VERSION}
    metadata |= {name: str(getattr(mask, name)) for name in _STATIC}
    data = save(tensors, metadata=metadata)
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def load_mask(path: str | os.PathLike[str]) -> SliceMask:
    """Read a mask that `save_mask` wrote, and check its values.

    Raises:
        ValueError: If the file is no safetensors file, is cut off, holds something else than a mask, has another
            format version, or if its contents are no mask. Names the file and what is wrong.
        OSError: If the file cannot be read, for instance `FileNotFoundError`.
    """
    metadata, tensors = _read(Path(path))
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"expected a mask file with format={_FORMAT!r} in its metadata, got format={metadata.get('format')!r} in "
            f"`{path}`; write mask files with `save_mask`"
        )
    if metadata.get("format_version") != _VERSION:
        raise ValueError(
            f"expected format_version={_VERSION!r}, got format_version={metadata.get('format_version')!r} in `{path}`; "
            "read it with the version of fgattn_jax that wrote it"
        )
    if not {"bits"} <= set(tensors) <= set(_DTYPES):
        raise ValueError(f"expected the tensors `bits` and perhaps `query_order`, got {sorted(tensors)} in `{path}`")
    numbers = {name: metadata.get(name, "") for name in _STATIC}
    for name, text in numbers.items():
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"expected `{name}` in the metadata to be a number, got {name}={text!r} in `{path}`")
    for name, tensor in tensors.items():
        if tensor.dtype != _DTYPES[name]:  # before JAX sees it: 64-bit values would become 32-bit ones
            raise ValueError(f"expected `{name}` of dtype {_DTYPES[name].__name__}, got {tensor.dtype} in `{path}`")
    query_block, num_keys, num_queries = (int(text) for text in numbers.values())
    order = tensors.get("query_order")
    try:
        mask = SliceMask(
            jnp.asarray(tensors["bits"]),
            None if order is None else jnp.asarray(order),
            query_block=query_block,
            num_keys=num_keys,
            num_queries=num_queries,
        )
        return mask.check()
    except ValueError as error:
        raise ValueError(f"no mask in `{path}`: {error}") from error


def _read(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):  # a missing or unreadable file is an OSError, not a wrong format
        pass
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError) as error:
        raise ValueError(
            f"expected a whole safetensors file, got `{path}` with {path.stat().st_size} bytes, which cannot be read "
            f"({error}); write it again with `save_mask`"
        ) from error
