"""A model in one file of safetensors, with all texts of its checkpoint folder.

The metadata of the file holds those texts by the names of their files; under ``weights`` the name
that the file of weights has there; under ``kind`` what it is.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hpm_video.files.atomic import temporary_folder
from hpm_video.files.weights import OF_ANOTHER_PROJECT, CheckpointError

KIND = "hpm_video"  # how the ``kind`` of such a file begins
TEXTS = ("config.yaml", "state.json", "labels.txt", "origin.json")
NAMES = ("model", "teacher", "average")  # names of files of weights in a checkpoint folder


def write_single_file(
    file: Path, tensors: Mapping[str, Tensor], name: str, kind: str, texts: Mapping[str, str]
) -> None:
    """Write one model. ``name``: of its file in a folder; ``kind``: what it is, in words."""
    on_cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = {"format": "pt", "kind": f"{KIND} {kind}", "weights": name, **texts}
    save_file(on_cpu, file, metadata=metadata)


@contextmanager
def as_folder(path: Path) -> Iterator[Path]:
    """A checkpoint folder as it is, or a temporary one that stands for a single file.

    Raises:
        CheckpointError: it is a file, but not one of a model of this package.
    """
    if not path.is_file():
        yield path
        return
    try:
        with safe_open(path, framework="pt") as stored:
            metadata: dict[str, str] = stored.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file: {error}. {OF_ANOTHER_PROJECT}"
        ) from error
    ours = metadata.get("kind", "").startswith(KIND) and metadata.get("weights") in NAMES
    if not ours or not {"config.yaml", "state.json"} <= metadata.keys():
        raise CheckpointError(
            f"{path} holds weights without the config that they need; give the checkpoint folder "
            f"that it lies in, or make one file of it all: python tools/weights.py export FOLDER "
            f"FILE.safetensors --to file"
        )
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as temporary:
        folder = Path(temporary)
        for text in TEXTS:
            if text in metadata:
                (folder / text).write_text(metadata[text], encoding="utf-8")
        (folder / f"{metadata['weights']}.safetensors").symlink_to(path.resolve())
        yield folder
