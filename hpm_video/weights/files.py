"""Files of weights, read without running anything that is in them.

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

ORIGIN = "origin.json"
"""File of an imported folder that tells where its weights come from and what was done to them."""
PICKLED = (".pth", ".pt", ".bin", ".pyth", ".ckpt", ".tar")
FILES_OF_A_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Of a model that transformers or timm saved; the first that is there is read."""
NUMBERS_OF_NUMPY = (
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtypes.Float64DType",
    "numpy.dtypes.Float32DType",
    "numpy.dtypes.Int64DType",
)
"""Such as learning rates beside the weights. They are not needed, and an empty object takes their
place."""
ALLOWED: tuple[type, ...] = (argparse.Namespace,)
"""Classes that a pickle may hold beside tensors and plain values. VideoMAE and MAE keep the
arguments of the run in a Namespace."""


@dataclass(frozen=True)
class Source:
    """What is in a file of weights."""

    path: Path
    entries: dict[str, Tensors]
    """State dicts by their key in the file; ``""`` where the file is one itself."""
    config: dict[str, Any] = field(default_factory=dict)
    """Of a folder: config.json."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the run that wrote it, where the file holds them."""
    preprocessor: dict[str, Any] = field(default_factory=dict)
    """Of a folder: preprocessor_config.json."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Of a folder that an import wrote: origin.json."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Of a file of safetensors."""
    epoch: int | None = None
    beside: tuple[str, ...] = ()
    """Keys of what else is in the file, such as the optimizer's state."""


def read_source(path: Path) -> Source:
    """Everything that is of use in a file of weights or the folder of a model.

    The file of weights in such a folder stands for it: without its config.json it says too little.

    Raises:
        CheckpointError: there is none, it is not whole, or it holds objects that are not allowed.
    """
    source = _read(path.expanduser())
    for entry, tensors in source.entries.items():
        odd = [name for name in (entry, *tensors) if not name.isprintable()]
        if odd:
            raise CheckpointError(
                f"{path} has a tensor of the name {odd[0]!r}, with characters that control a "
                f"terminal; no model has such names"
            )
    return source


def _read(path: Path) -> Source:
    in_a_folder = path.name in FILES_OF_A_FOLDER and (path.parent / "config.json").is_file()
    if path.is_dir() or in_a_folder:
        return _read_folder(path if path.is_dir() else path.parent)
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; give a file of weights or the folder of a model. Nothing is "
            f"downloaded, so fetch it beforehand"
        )
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        return Source(path, {"": tensors}, metadata=metadata)
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
    metadata: dict[str, str] = {}
    if file.suffix == ".json":
        tensors = _read_shards(file)
    elif file.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(file)
    else:
        tensors = _only_entry(_sort(file, _read_pickle(file)))
    return Source(
        folder,
        {"": tensors},
        config=_read_json(folder / "config.json"),
        preprocessor=_read_json(folder / "preprocessor_config.json"),
        origin=_read_json(folder / ORIGIN),
        metadata=metadata,
    )


def _only_entry(source: Source) -> Tensors:
    if list(source.entries) != [""]:
        raise CheckpointError(
            f"{source.path} must be a state dict, as save_pretrained writes it, got a file with "
            f"{', '.join(source.entries)}; give that file instead of its folder"
        )
    return source.entries[""]


def _read_shards(index: Path) -> Tensors:
    """The tensors of several files, which ``index`` names."""
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict):
        raise CheckpointError(f"{index} must have a table weight_map; fetch the folder anew")
    tensors: Tensors = {}
    for name in dict.fromkeys(map(str, where.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(
                f"{index} names the file {name!r}, which is not in its folder; fetch all files"
            )
        shard = index.parent / name
        pickled = shard.suffix != ".safetensors"
        tensors |= (
            _only_entry(_sort(shard, _read_pickle(shard)))
            if pickled
            else _read_safetensors(shard)[0]
        )
    lacking = [key for key in where if key not in tensors]
    if lacking:
        raise CheckpointError(
            f"the files that {index} names lack {', '.join(lacking[:5])}; fetch them anew"
        )
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    """A table in a file, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it anew") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a table, got {type(content).__name__}")
    return content


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as stored:
            names = stored.keys()
            return {name: stored.get_tensor(name) for name in names}, stored.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}; fetch it anew"
        ) from error


class _SetAside:
    """Takes the place of an object that is not needed, whatever it is made of."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read_pickle(path: Path) -> object:
    """What is in a file of torch.save, of either format; no code in it is run."""
    zipped = zipfile.is_zipfile(path)
    if zipped and _is_program(path):
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
    stand_ins: list[Any] = [(_SetAside, name) for name in NUMBERS_OF_NUMPY]
    try:
        with torch.serialization.safe_globals([*ALLOWED, *stand_ins]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols, before it is refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # noqa: BLE001 - of many kinds, where a file is broken
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> CheckpointError:
    found = re.search(r"GLOBAL (\S+)|[Uu]nsupported class (\S+)", str(error))
    stranger = (found[1] or found[2]).rstrip(".,") if found else ""
    unpickling = isinstance(error, pickle.UnpicklingError)
    if unpickling and not stranger:
        stranger = _stranger_in(path)
    if stranger:
        return CheckpointError(
            f"{path} holds an object of {stranger}, and only tensors, plain values and "
            f"{', '.join(f'{kind.__module__}.{kind.__name__}' for kind in ALLOWED)} are read: "
            f"anything else could run code. If you trust the file, load it where it was made and "
            f"save the state dict alone with torch.save, or as .safetensors"
        )
    # What torch says of a pickle is the advice to run what is in it.
    advice = unpickling or "weights_only" in str(error)
    reason = "" if advice else f": {str(error).partition(chr(10))[0]}"
    return CheckpointError(
        f"{path} is not a whole file of torch.save, or cannot be read ({type(error).__name__}"
        f"{reason}); fetch it anew, or convert it to .safetensors"
    )


def _stranger_in(path: Path) -> str:
    """The first class that a pickle of any protocol names; nothing in it is run."""
    texts: list[str] = []
    with suppress(Exception), _open_pickle(path) as stream:
        for code, argument, _ in pickletools.genops(stream):
            if code.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if code.name == "STACK_GLOBAL" and texts[1:]:
                return ".".join(texts[-2:])
            if isinstance(argument, str):
                texts.append(argument)
    return ""


def _open_pickle(path: Path) -> IO[bytes]:
    if not zipfile.is_zipfile(path):
        return path.open("rb")
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        return archive.open(name)


def _is_program(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(entry.endswith("/constants.pkl") for entry in archive.namelist())


def _sort(path: Path, content: object) -> Source:
    """What is in a file, by what it is."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} must hold a state dict, got {type(content).__name__}; save the model's "
            f"state_dict()"
        )
    entries: dict[str, Tensors] = {}
    beside: list[str] = []
    for key, value in content.items():
        found = _tensors_of(value)
        if found:
            entries[str(key)] = found
            beside += [f"{key}.{name}" for name in value if name not in found]
        else:
            beside.append(str(key) if str(key).isprintable() else repr(key))
    bare = _tensors_of(content)
    if bare and not entries:
        return Source(
            path, {"": bare}, beside=tuple(str(key) for key in content if key not in bare)
        )
    if not entries:
        kinds = [f"{key} ({type(value).__name__})" for key, value in content.items()]
        raise CheckpointError(
            f"{path} must hold a state dict, got {', '.join(kinds) or 'nothing'}; save the model's "
            f"state_dict()"
        )
    epoch = content.get("epoch")
    arguments = content.get("args")
    plain = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    return Source(
        path,
        entries,
        arguments=dict(plain) if isinstance(plain, Mapping) else {},
        epoch=epoch if isinstance(epoch, int) else None,
        beside=tuple(beside),
    )


def _tensors_of(value: object) -> Tensors:
    """The tensors of a state dict, which may have a few plain values among them."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return {}
    tensors = {name: item for name, item in value.items() if isinstance(item, Tensor)}
    return tensors if 2 * len(tensors) > len(value) else {}
