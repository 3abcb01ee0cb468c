"""Read files of weights without running anything that is in them.

A file of safetensors, a file of torch.save in either of its formats, or a folder as transformers
and timm save a model: config.json, and weights in one file or in several with an index.
"""

import argparse
import json
import pickle
import pickletools
import re
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpm_video.files.weights import CheckpointError

Tensors = dict[str, Tensor]
PICKLED = (".pth", ".pt", ".bin", ".pyth", ".ckpt", ".tar")
FILES_OF_A_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Of a model that transformers or timm saved; the first that is there is read."""
SCALARS = ("dtype", "core.multiarray.scalar", "_core.multiarray.scalar")
DTYPES = ("dtypes.Float64DType", "dtypes.Float32DType", "dtypes.Int64DType")
"""Of numpy, such as learning rates beside the weights; an empty object takes their place."""


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
        odd = [name for name in (entry, *tensors) if not name.isprintable()]
        if odd:
            raise CheckpointError(
                f"{path} has a tensor of the name {odd[0]!r}, with characters that control a "
                f"terminal; no model has such names"
            )
    return source


def _read_file(path: Path) -> Source:
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; give a file of weights or the folder of a model. Nothing is "
            f"downloaded, so fetch it beforehand"
        )
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as stored:
                return Source(path, {"": {name: stored.get_tensor(name) for name in stored.keys()}})  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is not a complete safetensors file: {error}; fetch it anew"
            ) from error
    if path.suffix not in PICKLED:
        raise CheckpointError(
            f"weights must be a file of {', '.join(('.safetensors', *PICKLED))}, or a folder with "
            f"a config.json, got {path}"
        )
    return _sort(path, _read_pickle(path))


def _read_folder(folder: Path) -> Source:
    present = [name for name in FILES_OF_A_FOLDER if (folder / name).is_file()]
    if not present:
        raise CheckpointError(
            f"{folder} holds no weights (none of {', '.join(FILES_OF_A_FOLDER)}); give the folder "
            f"that save_pretrained wrote, or the file of weights itself"
        )
    file = folder / present[0]
    tensors: Tensors = {}
    for part in _shards(file) if file.suffix == ".json" else [file]:
        source = _read_file(part)
        if list(source.entries) != [""]:
            raise CheckpointError(
                f"{part} must be a state dict, as save_pretrained writes it, got a file with "
                f"{', '.join(source.entries)}; give that file instead of its folder"
            )
        tensors |= source.entries[""]
    if file.suffix == ".json":
        lacking = [key for key in _read_json(file)["weight_map"] if key not in tensors]
        if lacking:
            raise CheckpointError(
                f"the files that {file} names lack {', '.join(lacking[:5])}; fetch them anew"
            )
    config, preprocessor = (
        _read_json(folder / f"{name}.json") for name in ("config", "preprocessor_config")
    )
    return Source(folder, {"": tensors}, config=config, preprocessor=preprocessor)


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names."""
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict):
        raise CheckpointError(f"{index} must have a table weight_map; fetch the folder anew")
    names = list(dict.fromkeys(map(str, where.values())))
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(
                f"{index} names the file {name!r}, which is not in its folder; fetch all files"
            )
    return [index.parent / name for name in names]


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


class _SetAside:
    """A placeholder for an object that is not needed, whatever its content."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read_pickle(path: Path) -> object:
    """Return what is in a file of torch.save, of either format; no code in it is run."""
    zipped = zipfile.is_zipfile(path)
    if zipped and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        raise CheckpointError(
            f"{path} is a program (TorchScript), not weights. If you trust it, extract them once: "
            f'torch.save(torch.jit.load("{path.name}", map_location="cpu").state_dict(), '
            f'"weights.pth"), and give weights.pth'
        )
    if not zipped and tarfile.is_tarfile(path):
        raise CheckpointError(
            f"{path} is in the first format of torch.save, a tar archive, which cannot be read "
            f"without running what is in it. If you trust it, load it with the torch that wrote "
            f"it, and save the state dict anew"
        )
    # VideoMAE and MAE keep the options of a run in a Namespace.
    allowed: list[Any] = [argparse.Namespace]
    allowed += [(_SetAside, f"numpy.{name}") for name in SCALARS + DTYPES]
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
    if unpickling and not stranger:
        stranger = _first_class_in(path)
    if stranger:
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
    with suppress(Exception), _open_pickle(path) as stream:
        for code, argument, _ in pickletools.genops(stream):
            if code.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if code.name == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            if isinstance(argument, str):
                texts.append(argument)
    return ""


def _open_pickle(path: Path) -> IO[bytes]:
    if not zipfile.is_zipfile(path):
        return path.open("rb")
    archive = zipfile.ZipFile(path)
    return archive.open(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _sort(path: Path, content: object) -> Source:
    """Separate state dicts, options and the rest of a file."""
    entries: dict[str, Tensors] = {}
    beside: list[str] = []
    kind = type(content).__name__
    if isinstance(content, Mapping):
        for key, value in content.items():
            if found := _tensors_of(value):
                entries[str(key)] = found
                beside += [f"{key}.{name}" for name in value if name not in found]
            else:
                beside.append(str(key) if str(key).isprintable() else repr(key))
        epoch, arguments = content.get("epoch"), content.get("args")
        if isinstance(arguments, argparse.Namespace):
            arguments = vars(arguments)
        if not entries and (bare := _tensors_of(content)):
            entries, beside = {"": bare}, [key for key in beside if key not in bare]
        kind = ", ".join(f"{key} ({type(value).__name__})" for key, value in content.items())
    if not entries:
        raise CheckpointError(
            f"{path} must hold a state dict, got {kind or 'nothing'}; save the model's state_dict()"
        )
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
