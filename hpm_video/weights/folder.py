"""Folders and files that are complete or absent, and the origin of imported weights."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from hpm_video.config.loading import save_config
from hpm_video.files.weights import CheckpointError
from hpm_video.recognition.trained_model import TrainedModel
from hpm_video.training.checkpoint import checksums_of, flush, on_host, sha256_of
from hpm_video.weights.importing import Imported

ORIGIN = "origin.json"
"""File of an imported folder with the origin of its weights and what was done to them."""


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Return a folder to write ``out`` in: at the end all of its content is moved out, or nothing.

    Raises:
        CheckpointError: something of that name exists, or the disk does not take it.
    """
    writing = out.with_name(f".writing-{out.name}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        yield writing
        written = sorted(writing.iterdir())
        for folder in (*filter(Path.is_dir, written), writing):
            flush(folder)
        for path in written:
            if (out.parent / path.name).exists():
                raise CheckpointError(f"{out.parent / path.name} exists already; give another name")
        for path in written:
            path.rename(out.parent / path.name)
        flush(out.parent, recursive=False)
    except CheckpointError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {out}: {error}. Make room, and start the same command again"
        ) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def write_folder(imported: Imported, folder: Path, parity: dict[str, Any]) -> None:
    """Write what ``init_weights`` and the programs of ``tools/`` read.

    Raises:
        CheckpointError: the folder exists, or the disk does not take it.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; give another folder, or delete it")
    model = imported.model
    with staged(folder) as staging:
        writing = staging / folder.name
        writing.mkdir()
        tensors = model.tensors
        if imported.fresh:
            tensors = model.make().state_dict() | tensors
        save_file(on_host(tensors), writing / "model.safetensors")
        if imported.teacher is not None:
            save_file(on_host(imported.teacher), writing / "teacher.safetensors")
        for name, text in texts_of(model).items():
            (writing / name).write_text(text, encoding="utf-8")
        state = {"update": 0, "imported_from": imported.family.name}
        write_json(writing / "state.json", {**state, "sha256": checksums_of(writing)})
        write_json(writing / ORIGIN, _origin(imported))
        write_json(writing / "parity.json", parity)


def texts_of(model: TrainedModel) -> dict[str, str]:
    """Return the files of a checkpoint folder beside weights: their texts by name."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        save_config(model.config, file)
        found = {"config.yaml": file.read_text(encoding="utf-8")}
    found["state.json"] = json.dumps({"update": model.update}) + "\n"
    if model.label_names:
        found["labels.txt"] = "".join(f"{name}\n" for name in model.label_names)
    return found | ({ORIGIN: model.origin} if model.origin else {})


def _origin(imported: Imported) -> dict[str, Any]:
    """Return where the weights come from, and what was done to them."""
    path, recognised = imported.source.path, imported.recognised
    endings = (".safetensors", ".bin", ".json")
    files = [path] if path.is_file() else [p for p in sorted(path.iterdir()) if p.suffix in endings]
    return {
        "family": imported.family.name,
        "source": str(path.absolute()),
        "sha256": {file.name: sha256_of(file) for file in files},
        "state_dict": recognised.entry,
        "prefix": recognised.prefix,
        "epoch": imported.source.epoch,
        "licence": imported.family.licence,
        "assumed": list(imported.assumed),
        "left_out": imported.left_out,
        "start_fresh": list(imported.fresh),
        "positions": imported.model.config.model.positions,
    }


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Write a table as JSON."""
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
