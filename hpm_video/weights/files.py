"""Read files of weights without running anything that is in them.

A file of safetensors, a file of torch.save in either of its formats, or a folder as transformers
and timm save a model: weights, config.json and, of transformers, preprocessor_config.json.
"""

import argparse
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

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
    config: dict[str, Any] = field(default_factory=dict)
    """The content of config.json."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Options of the run that wrote it."""
    preprocessor: dict[str, Any] = field(default_factory=dict)
    """The content of preprocessor_config.json."""
    epoch: int | None = None
    beside: tuple[str, ...] = ()
    """Keys of what else is in the file, such as the optimizer's state."""


def read_source(path: Path) -> Source:
    """Read a file of weights or the folder of a model.

    The file of weights in such a folder stands for it: without its config.json too little is known.

    Raises:
        CheckpointError: there is none, it is incomplete, or it holds objects that are not allowed.
    """
    path = path.expanduser()
    if path.name in FILES_OF_A_FOLDER and (path.parent / "config.json").is_file():
        path = path.parent
    source = _read_folder(path) if path.is_dir() else _read_file(path)
    for entry, tensors in source.entries.items():
        for name in (entry, *tensors):
            if not name.isprintable():
                raise CheckpointError(
                    f"{path} has a tensor of the name {name!r}, with characters that control a "
                    f"terminal; no model has such names"
                )
    return source


def _read_file(path: Path) -> Source:
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; give a file of weights or the folder of a model. Nothing is "
            f"downloaded, so fetch it beforehand"
        )
    if path.suffix in PICKLED:
        return _sort(path, _read_pickle(path))
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"weights must be a file of {', '.join(('.safetensors', *PICKLED))}, or a folder with "
            f"a config.json, got {path}"
        )
    try:
        return Source(path, {"": load_file(path)})
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file: {error}; fetch it anew"
        ) from error


def _read_folder(folder: Path) -> Source:
    present = [folder / name for name in FILES_OF_A_FOLDER if (folder / name).is_file()]
    if not present:
        raise CheckpointError(
            f"{folder} holds no weights (none of {', '.join(FILES_OF_A_FOLDER)}); give the folder "
            f"that save_pretrained wrote, in one file of weights, or that file itself"
        )
    config, pixels = (_read_json(folder / f"{n}.json") for n in ("config", "preprocessor_config"))
    found = _read_file(present[0])
    return replace(found, path=folder, config=config, preprocessor=pixels)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the table in a file, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it anew") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a table, got {type(content).__name__}")
    return content


# --- Pickles --------------------------------------------------------------------------------------


class _SetAside:
    """A placeholder for an object that is not needed, whatever its content."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read_pickle(path: Path) -> object:
    """Return what is in a file of torch.save, of either format; no code in it is run."""
    zipped = zipfile.is_zipfile(path)
    members = zipfile.ZipFile(path).infolist() if zipped else []
    if (inflated := sum(member.file_size for member in members)) > path.stat().st_size:
        raise CheckpointError(
            f"{path} has {path.stat().st_size:,} bytes, and what is packed in it {inflated:,}. "
            f"torch.save compresses nothing, so somebody else packed it; if you trust it, unpack "
            f"it and pack it anew without compression (zip -0)"
        )
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise CheckpointError(
            f"{path} is a program (TorchScript), not weights. If you trust it, extract them once: "
            f'torch.save(torch.jit.load("{path.name}", map_location="cpu").state_dict(), '
            f'"weights.pth"), and give weights.pth'
        )
    # VideoMAE and MAE keep the options of a run in a Namespace.
    allowed: list[Any] = [argparse.Namespace, *((_SetAside, f"numpy.{name}") for name in NUMPY)]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols, before it is refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # noqa: BLE001 - of many kinds, where a file is broken
        raise CheckpointError(_refusal(path, error)) from error


def _refusal(path: Path, error: Exception) -> str:
    named = re.search(r"GLOBAL (\S+)|[Uu]nsupported class (\S+)", str(error))
    stranger = (named[1] or named[2]).rstrip(".,") if named else ""
    unpickling = isinstance(error, pickle.UnpicklingError)
    if stranger or (unpickling and (stranger := _first_class_in(path))):
        return (
            f"{path} holds an object of {stranger}, and only tensors, plain values and "
            f"argparse.Namespace are read: anything else could run code. If you trust the file, "
            f"load it where it was made and save the state dict alone with torch.save, or as "
            f".safetensors"
        )
    # What torch says of a pickle is the advice to run what is in it.
    advice = unpickling or "weights_only" in str(error)
    reason = "" if advice else f": {str(error).partition(chr(10))[0]}"
    return (
        f"{path} is not a complete file of torch.save, or cannot be read ({type(error).__name__}"
        f"{reason}); fetch it anew, or convert it to .safetensors"
    )


def _first_class_in(path: Path) -> str:
    """Return the first class that a pickle of any protocol names; nothing in it is run."""
    texts: list[str] = []
    with suppress(Exception), path.open("rb") as plain:
        stream: IO[bytes] = plain
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            stream = archive.open(next(n for n in archive.namelist() if n.endswith("data.pkl")))
        for code, argument, _ in pickletools.genops(stream):
            if code.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if code.name == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            if isinstance(argument, str):
                texts.append(argument)
    return ""


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
    beside: list[str] = []
    for key, value in table.items():
        if tensors := entries.get(str(key)):
            beside += [f"{key}.{name}" for name in value if name not in tensors]
        else:
            beside.append(str(key) if str(key).isprintable() else repr(key))
    epoch, arguments = table.get("epoch"), table.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    return Source(
        path,
        entries,
        arguments=dict(arguments) if isinstance(arguments, Mapping) else {},
        epoch=epoch if isinstance(epoch, int) else None,
        beside=tuple(beside),
    )


def _tensors_of(value: object) -> Tensors:
    """Return the tensors of a state dict, which may have a few plain values among them."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return {}
    tensors = {name: item for name, item in value.items() if isinstance(item, Tensor)}
    return tensors if 2 * len(tensors) > len(value) else {}
