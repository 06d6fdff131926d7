"""What lies in a checkpoint directory: the layout of diffusers, or another one that is refused by name."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""Name of the one file of weights; its index has `.index.json` behind it."""

_ORIGINAL_FILES = ("*.pth", "*.pt", "*/*.pth", "*/*.pt", "*/*/mp_rank_*.pt")
_ORIGINAL_CLASSES = ("WanModel", "HYVideoDiffusionTransformer")
_ORIGINAL_TENSORS = ("blocks.0.self_attn.q.weight", "double_blocks.0.img_attn_qkv.weight", "head.modulation")
_ADVICE = (
    "the original layout of the authors, which is not supported: take the repository in the layout of diffusers (for "
    'Wan its name ends in "-Diffusers")'
)


def transformer_folder(directory: str | pathlib.Path, subfolder: str = "transformer") -> pathlib.Path:
    """The folder with config.json and weights of the transformer.

    Args:
        directory: the pipeline's directory, or the folder itself.
        subfolder: its name in the pipeline's directory.

    Raises:
        ValueError: there is no such directory, or no transformer in it.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise ValueError(
            f"expected the directory of a downloaded diffusers checkpoint, got {str(directory)!r}, which is "
            f"{'a file' if directory.exists() else 'not there'}: nothing is downloaded here; download the repository "
            "and give its directory"
        )
    if (directory / subfolder).is_dir():
        return directory / subfolder
    if (directory / "config.json").is_file():
        return directory
    raise ValueError(
        f"expected a diffusers checkpoint with {subfolder}/config.json or config.json in {str(directory)!r}, got "
        f"{what_else(directory)}"
    )


def read_config(
    directory: str | pathlib.Path, subfolder: str = "transformer", *, class_name: str | None = None
) -> dict[str, Any]:
    """The config.json of a transformer in a diffusers checkpoint.

    Args:
        directory: the pipeline's directory, or the folder of the transformer itself.
        subfolder: folder of the transformer in the pipeline's directory.
        class_name: what `_class_name` must be; None takes any.

    Raises:
        ValueError: there is no such file, it is no JSON object, or it is of another class.
    """
    folder = transformer_folder(directory, subfolder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"expected config.json in {str(folder)!r}, got {what_else(folder)}")
    config = _read_object(folder / "config.json")
    came = config.get("_class_name")
    if came in _ORIGINAL_CLASSES:
        raise ValueError(f"expected a diffusers checkpoint in {str(folder)!r}, got _class_name={came!r}: {_ADVICE}")
    if class_name is not None and came != class_name:
        raise ValueError(
            f"expected _class_name={class_name!r} in {str(folder / 'config.json')!r}, got {came!r}: this is a "
            "checkpoint of another model"
        )
    return config


def read_pipeline(directory: str | pathlib.Path, subfolder: str = "transformer") -> dict[str, Any]:
    """The model_index.json of a pipeline; empty where only the transformer's folder was kept.

    Args:
        directory: the pipeline's directory, or the folder of the transformer in it.
        subfolder: folder of the transformer in the pipeline's directory.

    Raises:
        ValueError: the file is no JSON object.
    """
    directory = pathlib.Path(directory)
    above = [directory.absolute().parent] if directory.absolute().name == subfolder else []
    for place in (directory, *above):
        if (place / "model_index.json").is_file():
            return _read_object(place / "model_index.json")
    return {}


def of_original_layout(tensors: Iterable[str]) -> str:
    """Words that end a message about unexpected names: that they are of the original layout, or none."""
    return f": these are names of {_ADVICE}" if set(tensors) & set(_ORIGINAL_TENSORS) else ""


def what_else(folder: pathlib.Path) -> str:
    """Words that end a message: what a folder holds in place of what was expected."""
    original = sorted({path.name for pattern in _ORIGINAL_FILES for path in folder.glob(pattern)})
    if original:
        return f"{original[0]}: {_ADVICE}"
    files = sorted(path.name for path in folder.iterdir())
    variants = [name for name in files if name.startswith("diffusion_pytorch_model.") and name != WEIGHTS]
    if variants:
        return f"{variants[0]}: only {WEIGHTS} and its shards are read; convert it with save_pretrained of diffusers"
    held = f"{len(files)} other files, such as {files[0]}" if files else "an empty folder"
    return f"{held}: download the checkpoint again, or give its directory"


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a JSON object in {str(path)!r}, got a file that cannot be read ({error}): download it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {str(path)!r}, got {type(content).__name__}: download it again")
    return content
