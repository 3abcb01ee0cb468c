"""Read files of weights without running anything that is in them.

A file of safetensors, a file of torch.save in either of its formats, or a folder as transformers
and timm save a model: weights, config.json and, of transformers, preprocessor_config.json.
"""

import argparse
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hpm_video.files.weights import CheckpointError

Tensors = dict[str, Tensor]
PICKLED = (".pth", ".pt", ".bin", ".pyth", ".ckpt", ".tar")
FILES_OF_A_FOLDER = ("model.safetensors", "pytorch_model.bin")
"""Of a model that transformers or timm saved; the first that is there is read."""
NUMPY = ("dtype", "core.multiarray.scalar", "_core.multiarray.scalar") + tuple(
    f"dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64")
)
"""Parts of numbers such as learning rates; an empty object takes their place."""


@dataclass(frozen=True)
class Source:
    """The content of a file of weights or the folder of a model."""

    path: Path
    entries: dict[str, Tensors]
    """State dicts by their key in the file; ``""`` where the file is one itself."""
    config: dict[str, Any] = field(default_factory=dict)  # the content of config.json
    arguments: dict[str, Any] = field(default_factory=dict)
    """Options of the run that wrote it, or the content of preprocessor_config.json."""
    epoch: int | None = None
    beside: tuple[str, ...] = ()  # keys of what else is in the file, such as the optimizer's state


def read_source(path: Path) -> Source:
    """Read a file of weights or the folder of a model.

    The file of weights in such a folder stands for it: without its config.json too little is known.

    Raises:
        CheckpointError: there is none, it is incomplete, or it holds objects that are not allowed.
    """
    path = path.expanduser()
    if path.name in FILES_OF_A_FOLDER and (path.parent / "config.json").is_file():
        path = path.parent
    file = next((path / name for name in FILES_OF_A_FOLDER if (path / name).is_file()), path)
    if not file.is_file():
        what = "holds no weights" if file.is_dir() else "does not exist"
        raise CheckpointError(
            f"{file} {what}; give a file of weights, or a folder with one of "
            f"{', '.join(FILES_OF_A_FOLDER)}. Nothing is downloaded, so fetch it beforehand"
        )
    if file.suffix not in (".safetensors", *PICKLED):
        raise CheckpointError(
            f"weights must be a file of {', '.join(('.safetensors', *PICKLED))}, or a folder with "
            f"a config.json, got {file}"
        )
    try:
        source = _sort(path, _read_pickle(file) if file.suffix in PICKLED else load_file(file))
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file: {error}; fetch it anew"
        ) from error
    if not path.is_dir():
        return source
    config, pixels = (_read_json(path / f"{n}.json") for n in ("config", "preprocessor_config"))
    return replace(source, config=config, arguments=pixels)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the table in a file, empty where there is no such file."""
    content: Any = None
    with suppress(ValueError):
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a table in JSON; fetch it anew")
    return content


class _SetAside:
    """A placeholder for an object that is not needed, whatever its content."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read_pickle(path: Path) -> object:
    """Return what is in a file of torch.save, of either format; no code in it is run."""
    # VideoMAE and MAE keep the options of a run in a Namespace.
    allowed: list[Any] = [argparse.Namespace, *((_SetAside, f"numpy.{name}") for name in NUMPY)]
    zipped, size = zipfile.is_zipfile(path), path.stat().st_size
    members = zipfile.ZipFile(path).infolist() if zipped else []
    if (inflated := sum(member.file_size for member in members)) > size:
        raise CheckpointError(
            f"{path} has {size:,} bytes, and what is packed in it {inflated:,}; torch.save "
            f"compresses nothing. If you trust it, pack it anew without compression (zip -0)"
        )
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols, before it is refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # noqa: BLE001 - of many kinds, where a file is broken
        # What torch says of other files may be the advice to run what is in them.
        if named := re.search(r"GLOBAL (\S+)|[Uu]nsupported class (\S+)", str(error)):
            raise CheckpointError(
                f"{path} holds an object of {(named[1] or named[2]).rstrip('.,')}, and only "
                f"tensors, plain values and argparse.Namespace are read: anything else could run "
                f"code. If you trust the file, load it where it was made and save the state dict "
                f"alone"
            ) from error
        raise CheckpointError(
            f"{path} is not a complete file of torch.save with weights alone "
            f"({type(error).__name__}): fetch it anew, or save the state_dict() of its model alone"
        ) from error


def _sort(path: Path, content: object) -> Source:
    """Separate state dicts, options and the rest of a file."""
    table = content if isinstance(content, Mapping) else {}
    entries = {str(key): found for key, value in table.items() if (found := _tensors_of(value))}
    if not entries and (bare := _tensors_of(table)):
        entries, table = {"": bare}, {key: table[key] for key in table if key not in bare}
    if not entries:
        kinds = [f"{key} ({type(value).__name__})" for key, value in table.items()]
        raise CheckpointError(
            f"{path} must hold a state dict, got {', '.join(kinds) or type(content).__name__}; "
            f"save the model's state_dict()"
        )
    beside = [str(key) for key in table if str(key) not in entries]
    for entry, tensors in entries.items():
        beside += [f"{entry}.{name}" for name in table.get(entry, {}) if name not in tensors]
    epoch, arguments = table.get("epoch"), table.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    epoch = epoch if isinstance(epoch, int) else None
    return Source(path, entries, arguments=arguments, epoch=epoch, beside=tuple(beside))


def _tensors_of(value: object) -> Tensors:
    """Return the tensors of a state dict, which may have a few plain values among them."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return {}
    tensors = {name: item for name, item in value.items() if isinstance(item, Tensor)}
    return tensors if 2 * len(tensors) > len(value) else {}


def read_image_tower(path: Path) -> Tensors:
    """Return the weights of the image model in a file, by the names of timm, DINO or OpenAI's CLIP.

    The file holds a state dict, or one under "teacher", "state_dict" or "model".

    Raises:
        CheckpointError: the file cannot be read safely, or holds none.
    """
    entries = read_source(path).entries
    entry = next((name for name in ("teacher", "state_dict", "model", "") if name in entries), None)
    if entry is None:
        raise CheckpointError(
            f"{path} must hold a state dict alone, or one under 'teacher', 'state_dict' or "
            f"'model', got {', '.join(map(repr, entries))}; save the model's state_dict()"
        )
    weights = {name.removeprefix("module."): value for name, value in entries[entry].items()}
    return {name.removeprefix("backbone."): value for name, value in weights.items()}
