"""Names of the leaves of a pytree."""

from typing import Any

import jax


def named_leaves(tree: Any) -> dict[str, Any]:
    """Flatten a pytree to leaves by names joined by dots, e.g. `blocks.qkv.kernel`."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def leaf_name(path: tuple) -> str:
    """Name of a leaf from its key path; the trailing `value` of an NNX variable is left out."""
    parts = [_key_text(key) for key in path]
    if parts and parts[-1] == "value":
        parts = parts[:-1]
    return ".".join(parts)


def _key_text(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
