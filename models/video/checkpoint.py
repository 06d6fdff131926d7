"""Diffusers checkpoints: parameters read from safetensors into stacked host arrays, and written back.

A model says where its parameters stand (`Source` by leaf name) and gives a template of shapes (`nnx.eval_shape`): no
parameter is ever drawn to be overwritten. Leaf after leaf is filled on the host and placed on its devices, so that the
host holds one leaf beside the mapped files and no device more than its share.
"""

import contextlib
import dataclasses
import gc
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import jax
import numpy as np

from fgattn_jax.models._leaves import leaf_name, named_leaves
from fgattn_jax.models.video.layout import (
    WEIGHTS,
    of_original_layout,
    read_config,
    read_pipeline,
    transformer_folder,
    what_else,
)

__all__ = [
    "Placement",
    "Progress",
    "Source",
    "load_stacked",
    "placement",
    "read_config",
    "read_pipeline",
    "save_diffusers",
]

Progress = Callable[[str, int, int], None]
"""Called after every leaf with its name, its bytes and the bytes of all leaves: `bar.total = total; bar.update(n)`."""
Placement = Any
"""None (the default device), a sharding for all, a function of name and shape, or a pytree like the template."""

_DTYPES = ("F64", "F32", "F16", "BF16")  # the names of safetensors
_ROWS = 64  # of a tile: a plain transpose of a 5120 x 13824 matrix took three times as long


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter stands in a checkpoint.

    Attributes:
        name: name of the tensor; `{i}` stands for the number of a layer.
        form: "copy" takes it as it is; "kernel" takes the weight of a torch linear `[out, in]`, or of a convolution
            that cuts patches `[out, C, f, y, x]`, as a kernel `[in, out]`, the axes behind the first one flattened.
        num_layers: layers that are stacked on a new first axis; None where there is but one tensor.
        window: the axes behind the first one of a convolution's weight, whose product is `in`; empty for a linear.
    """

    name: str
    form: Literal["copy", "kernel"] = "copy"
    num_layers: int | None = None
    window: tuple[int, ...] = ()

    def tensors(self) -> list[str]:
        """Names of the tensors, in the order of layers."""
        if self.num_layers is None:
            return [self.name]
        return [self.name.format(i=i) for i in range(self.num_layers)]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each tensor in the file for a leaf of this shape."""
        if self.num_layers is not None:
            shape = shape[1:]
        if self.form == "copy":
            return shape
        return shape[-1], *(self.window or shape[:-1])


def load_stacked(
    directory: str | pathlib.Path,
    names: Mapping[str, Source],
    template: Any,
    *,
    subfolder: str = "transformer",
    ignored: Iterable[str] = (),
    sharding: Placement = None,
    progress: Progress | None = None,
) -> Any:
    """Read the parameters of a model from a diffusers checkpoint.

    Args:
        directory: the pipeline's directory, or the folder of the transformer itself.
        names: where each leaf of the template stands.
        template: pytree of shapes and dtypes (`jax.ShapeDtypeStruct`); values are cast to its dtypes.
        subfolder: folder of the transformer in the pipeline's directory.
        ignored: pieces of names; tensors whose name holds one may stand in the file and are not read.
        sharding: where the leaves go: see `Placement`. Of a sharded leaf each device is sent its own part only.
        progress: see `Progress`.

    Returns:
        The template with arrays on the devices as leaves.

    Raises:
        ValueError: files are missing, corrupt or of another layout; names differ from `names`, either way; or a shape
            or dtype does not fit. All of that is checked before any tensor is read.
    """
    folder = transformer_folder(directory, subfolder)
    leaves = named_leaves(template)
    _check_template(names, leaves)
    place = placement(sharding, template)
    total = sum(_num_bytes(leaf) for leaf in leaves.values())
    with contextlib.ExitStack() as stack:
        files = _open_tensors(folder, stack)
        _check_names(files, names, ignored, folder)
        _check_tensors(files, names, leaves, folder)
        placed = {}
        for name, leaf in leaves.items():
            host = _read_leaf(files, names[name], leaf)
            placed[name] = _put(host, place(name))
            # JAX lets go of what it has sent at a garbage collection only, of whichever generation.
            del host
            gc.collect(0)
            if progress is not None:
                progress(name, _num_bytes(leaf), total)
    return jax.tree_util.tree_map_with_path(lambda path, _: placed[leaf_name(path)], template)


def placement(sharding: Placement, template: Any) -> Callable[[str], jax.sharding.Sharding | None]:
    """The sharding of a leaf by its name, None for the default device, however it was given.

    Raises:
        ValueError: a pytree of shardings has other leaves than the template.
    """
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return lambda name: sharding
    if callable(sharding):
        leaves = named_leaves(template)
        choose = cast(Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None], sharding)
        return lambda name: choose(name, tuple(leaves[name].shape))
    shardings, wanted = named_leaves(sharding), named_leaves(template)
    if shardings.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - shardings.keys()), sorted(shardings.keys() - wanted.keys())
        raise ValueError(
            f"expected `sharding` to be a sharding, a function of name and shape, or a pytree like the parameters, got "
            f"{_some(missing)} missing and {_some(extra)} unknown"
        )
    return shardings.__getitem__


def save_diffusers(
    directory: str | pathlib.Path,
    names: Mapping[str, Source],
    params: Any,
    config: Mapping[str, Any],
    *,
    num_shards: int = 1,
) -> None:
    """Write parameters as the transformer folder of a diffusers checkpoint: what `load_stacked` reads.

    All parameters pass through host memory at once: meant for small models and for tests.

    Args:
        directory: folder to write to; made if need be.
        names: where each leaf goes.
        params: pytree of arrays.
        config: content of `config.json`, `_class_name` among it.
        num_shards: files to spread the tensors over; above 1 with an index.

    Raises:
        ValueError: `names` does not name exactly the leaves of `params`.
    """
    from safetensors.numpy import save_file

    leaves = named_leaves(params)
    _check_template(names, leaves)
    tensors = {}
    for name, leaf in leaves.items():
        source, host = names[name], np.asarray(leaf)
        shape = source.stored_shape(host.shape)
        for i, tensor in enumerate(source.tensors()):
            part = host if source.num_layers is None else host[i]
            tensors[tensor] = np.ascontiguousarray((part.T if source.form == "kernel" else part).reshape(shape))
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
    if num_shards == 1:
        save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
        return
    index = {}
    for shard in range(num_shards):
        part = {tensor: tensors[tensor] for tensor in sorted(tensors)[shard::num_shards]}
        file = WEIGHTS.replace(".safetensors", f"-{shard + 1:05d}-of-{num_shards:05d}.safetensors")
        save_file(part, str(folder / file), metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2, sort_keys=True)
    (folder / f"{WEIGHTS}.index.json").write_text(text + "\n")


def _open_tensors(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """The open file of every tensor by its name; files are mapped, not read."""
    whole, index = folder / WEIGHTS, folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        shards = _read_index(index)
        opened = {file: _open(folder / file, stack) for file in sorted(set(shards.values()))}
        held = {file: set(handle.keys()) for file, handle in opened.items()}
        lost = [tensor for tensor, file in shards.items() if tensor not in held[file]]
        if lost:
            raise ValueError(
                f"expected in {str(folder)!r} every tensor in the file that {index.name} names, got {len(lost)} that "
                f"are not there, such as {lost[0]!r} in {shards[lost[0]]}: download the folder again, whole"
            )
        return {tensor: handle for file, handle in opened.items() for tensor in sorted(held[file])}
    if whole.is_file():
        handle = _open(whole, stack)
        return dict.fromkeys(handle.keys(), handle)
    raise ValueError(f"expected {WEIGHTS} or {index.name} in {str(folder)!r}, got {what_else(folder)}")


def _read_index(index: pathlib.Path) -> dict[str, str]:
    try:
        shards = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected a JSON object with `weight_map` in {str(index)!r}, got one that cannot be read ({error!r}): "
            "download the file again"
        ) from error
    if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
        raise ValueError(
            f"expected `weight_map` of {str(index)!r} to name a file for each tensor, got {type(shards).__name__}: "
            "download the file again"
        )
    gone = sorted({file for file in shards.values() if not (index.parent / file).is_file()})
    if gone:
        raise ValueError(
            f"expected the {len(set(shards.values()))} files that {index.name} names in {str(index.parent)!r}, got "
            f"{len(gone)} missing, such as {gone[0]}: download them"
        )
    return shards


def _open(path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return stack.enter_context(safe_open(str(path), framework="numpy"))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"expected a whole safetensors file at {str(path)!r}, got {path.stat().st_size} bytes that cannot be read "
            f"({error}): download it again"
        ) from error


def _check_template(names: Mapping[str, Source], leaves: Mapping[str, Any]) -> None:
    missing, extra = sorted(leaves.keys() - names.keys()), sorted(names.keys() - leaves.keys())
    if missing or extra:
        raise ValueError(
            f"expected `names` to name the {len(leaves)} leaves of the template, got {_some(missing)} missing and "
            f"{_some(extra)} unknown"
        )


def _check_names(
    files: Mapping[str, Any], names: Mapping[str, Source], ignored: Iterable[str], folder: pathlib.Path
) -> None:
    wanted = {tensor for source in names.values() for tensor in source.tensors()}
    pieces = tuple(ignored)
    found = {tensor for tensor in files if tensor in wanted or not any(piece in tensor for piece in pieces)}
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing or extra:
        raise ValueError(
            f"expected the {len(wanted)} tensors of this model in {str(folder)!r}, got {len(found)}: {_some(missing)} "
            f"missing and {_some(extra)} unknown{of_original_layout(extra)}"
        )


def _check_tensors(
    files: Mapping[str, Any], names: Mapping[str, Source], leaves: Mapping[str, Any], folder: pathlib.Path
) -> None:
    for name, leaf in leaves.items():
        source = names[name]
        if source.num_layers is not None and leaf.shape[:1] != (source.num_layers,):
            raise ValueError(
                f"expected {source.num_layers} layers in front of `{name}`, got shape={leaf.shape} in the template"
            )
        if source.window and math.prod(source.window) != math.prod(leaf.shape[-2:-1]):
            raise ValueError(f"expected a window of {leaf.shape[-2]} values for `{name}`, got window={source.window}")
        shape = source.stored_shape(tuple(leaf.shape))
        for tensor in source.tensors():
            came = tuple(files[tensor].get_slice(tensor).get_shape())
            if came != shape:
                raise ValueError(
                    f"expected shape={shape} for {tensor!r} in {str(folder)!r}, got shape={came}: config.json and the "
                    "weights are of different models"
                )
            dtype = files[tensor].get_slice(tensor).get_dtype()
            if dtype not in _DTYPES:
                raise ValueError(
                    f"expected {tensor!r} in {str(folder)!r} to be of {', '.join(_DTYPES)}, got dtype={dtype}: "
                    "quantised checkpoints are not supported"
                )


def _read_leaf(files: Mapping[str, Any], source: Source, leaf: Any) -> np.ndarray:
    host = np.empty(leaf.shape, leaf.dtype)
    for i, tensor in enumerate(source.tensors()):
        array = files[tensor].get_tensor(tensor)
        out = host if source.num_layers is None else host[i]
        if source.form == "copy":
            out[...] = array
        else:
            rows = array.reshape(array.shape[0], -1)  # [out, in]
            for start in range(0, len(rows), _ROWS):
                out[:, start : start + _ROWS] = rows[start : start + _ROWS].T
    return host


def _put(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Place a leaf and wait until it is there: the host's copy must be free before the next one is filled."""
    if sharding is None:
        array = jax.device_put(host)
    else:
        # Each process and device takes its own part of the host's array, whichever devices there are.
        array = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    return jax.block_until_ready(array)


def _num_bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "0"
