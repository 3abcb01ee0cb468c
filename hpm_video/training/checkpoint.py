"""The state of a run on disk: complete or absent, and readable without this package.

A checkpoint is a folder ``update-00001600`` of
    model.safetensors, teacher.safetensors   weights (of a classifier: model and average)
    optimizer.safetensors                    what resuming needs beside them, by parameter
    state.json                               the next update, the best score, what wrote it, and the
                                             SHA-256 of each file above
    config.yaml                              the experiment
    labels.txt                               of a classifier: the name of class i in line i
It is written under another name and renamed once it is on the disk.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hpm_video.files.first_names import by_current_names
from hpm_video.files.weights import OF_ANOTHER_PROJECT, CheckpointError
from hpm_video.tokens.grid import Size3
from hpm_video.training.optim import OptimizerState

log = logging.getLogger(__name__)
NAME = re.compile("update-[0-9]{8}")
"""Name of a checkpoint's folder; its number is the update in its ``state.json``."""
UNFINISHED = ".writing-"
OPTIMIZER = "optimizer.safetensors"


def save_checkpoint(
    folder: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    *,
    optimizer: OptimizerState,
    state: dict[str, Any],
    attached: Iterable[Path],
) -> None:
    """Write one checkpoint, complete or not at all, with copies of the files ``attached``.

    ``weights``: of each module, by its name.

    Raises:
        CheckpointError: the weights are not finite, or the disk does not take them. What was
            there before is untouched.
    """
    for name, values in weights.items():
        broken = [key for key, value in values.items() if not value.isfinite().all()]
        if broken:
            raise CheckpointError(
                f"{name} has weights that are not finite, such as {broken[0]}; it is not saved"
            )
    writing = folder.parent / f"{UNFINISHED}{folder.name}"
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        for name, values in weights.items():
            save_file(on_host(values), writing / f"{name}.safetensors")
        _write_optimizer(optimizer, writing / OPTIMIZER)
        state = {**state, "sha256": checksums_of(writing)}
        (writing / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        for path in attached:
            shutil.copyfile(path, writing / path.name)
        flush(writing)
        writing.rename(folder)
        flush(folder.parent, recursive=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the checkpoint {folder}: {error}. Earlier checkpoints are untouched: "
            f"make room and start the same command again"
        ) from error


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; without a ``state.json`` it is none."""
    named = sorted(path for path in folder.glob("*") if NAME.fullmatch(path.name))
    return [path for path in named if (path / "state.json").is_file()]


def checkpoint_path(folder: Path, update: int) -> Path:
    """Return the folder of the state before ``update``."""
    return folder / f"update-{update:08d}"


def remove_superseded(folder: Path, keep_last: int) -> None:
    """Point to the newest and the best; keep them, the newest ``keep_last`` and those marked."""
    point_to_newest_and_best(folder)
    best = (folder / "best").readlink().name if (folder / "best").is_symlink() else ""
    for path in checkpoints_in(folder)[:-keep_last]:
        if path.name != best and not read_state(path).get("keep", False):
            # Under another name: half deleted, it is no checkpoint.
            _delete(path.rename(path.with_name(f"{UNFINISHED}{path.name}")))


def mend(folder: Path) -> None:
    """Delete what interrupted saves left of checkpoints, and make sure of the others.

    Raises:
        CheckpointError: what has the name of a checkpoint is none, is damaged or is another one.
    """
    for path in folder.glob(f"{UNFINISHED}*"):
        _delete(path)
    for path in folder.glob("*"):
        if NAME.fullmatch(path.name):
            read_state(path)
    point_to_newest_and_best(folder)


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def point_to(link: Path, target: Path) -> None:
    """Make ``link`` a symbolic link to its neighbour ``target``, at once."""
    if link.exists() and not link.is_symlink():
        raise CheckpointError(
            f"{link} must be a link to a checkpoint, but is a copy of one; delete it to resume"
        )
    fresh = link.with_name(f"{UNFINISHED}{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target.name)
    fresh.replace(link)


def read_state(checkpoint: Path, *, of_run: bool = False) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint. ``of_run``: it must be one that a run wrote.

    Raises:
        CheckpointError: it cannot be read, lacks something, or is of another checkpoint.
    """
    path = checkpoint / "state.json"
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        name = checkpoint_path(checkpoint.parent, state["update"]).name
        if best := state.get("best"):
            _ = best["update"], best["score"]
        if of_run:
            _ = state["facts"]["precision"], state["data"], state["best"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, f"cannot be read, or lacks something ({error!r})") from error
    if NAME.fullmatch(checkpoint.name) and checkpoint.name != name:
        raise _damaged(path, f"says that it is {name}")
    return state


def _damaged(file: Path, reason: str) -> CheckpointError:
    folder = file.parent.resolve()
    return CheckpointError(
        f"{folder} is not a complete checkpoint: {file.name} {reason}. Copy the folder again if "
        f"it is a copy, or delete it to resume its run from the checkpoint before"
    )


def checksums_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of tensors, by its name."""
    return {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))}


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            found.update(block)
    return found.hexdigest()


def _verify(file: Path) -> None:
    """Refuse a file of a checkpoint that is not as it was written, in a machine's first process."""
    if not (file.parent / "state.json").is_file() or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    state = read_state(file.parent)
    if "facts" in state and "sha256" not in state:
        _say_unverified(file.parent.resolve())
    written = state.get("sha256", {}).get(file.name)
    if written is not None and file.is_file() and (now := sha256_of(file)) != written:
        raise _damaged(
            file,
            f"has the SHA-256 {now}, not {written} as when it was written (if you changed it "
            f"on purpose, take its line out of state.json)",
        )


@cache
def _say_unverified(checkpoint: Path) -> None:
    log.info("%s was written before checksums were kept: its files are not checked", checkpoint)


def point_to_newest_and_best(folder: Path) -> None:
    """Make ``last`` and ``best`` agree with the newest checkpoint."""
    for newest in checkpoints_in(folder)[-1:]:
        point_to(folder / "last", newest)
        best = read_state(newest).get("best")
        if best and checkpoint_path(folder, best["update"]).exists():
            point_to(folder / "best", checkpoint_path(folder, best["update"]))


def _write_optimizer(state: OptimizerState, path: Path) -> None:
    tensors = {
        f"{kind}.{name}": value
        for kind, of_parameters in state.moments.items()
        for name, value in of_parameters.items()
    }
    save_file(on_host(tensors), path, metadata={"step": str(state.step)})


def read_optimizer(checkpoint: Path, patch_size: Size3) -> OptimizerState:
    """The optimizer's state, whatever engine wrote it, by the names of today.

    A file is mapped into memory: a process takes the room of the tensors that it uses.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = checkpoint / OPTIMIZER
    _verify(path)
    moments: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as stored:
            step = int(stored.metadata()["step"])
        for key, value in load_file(path).items():
            kind, name = key.split(".", 1)
            moments.setdefault(kind, {})[name] = value
        current = {kind: by_current_names(own, patch_size) for kind, own in moments.items()}
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"is not complete ({str(error).splitlines()[0]})") from error
    return OptimizerState(step, current)


def read_weights(path: Path, patch_size: Size3, name: str = "model") -> dict[str, Tensor]:
    """Weights of a checkpoint folder, or of a .safetensors file, by the names of today.

    ``patch_size``: of the model, which tells how the patch embedding of older files lies.

    Raises:
        CheckpointError: there is no such file, it is not one of safetensors, or it is damaged.
    """
    file = _weights_file(path, name)
    _verify(file)
    try:
        return by_current_names(load_file(file), patch_size)
    except (SafetensorError, KeyError) as error:
        if (file.parent / "state.json").is_file():
            raise _damaged(file, f"is not complete ({error})") from error
        raise CheckpointError(
            f"{file} is not a complete safetensors file: {error}. {OF_ANOTHER_PROJECT}"
        ) from error


def weights_digest(path: Path, name: str = "model") -> str:
    """SHA-256 of the file of weights, in hexadecimal: equal where the weights are.

    Raises:
        CheckpointError: there is no such file.
    """
    return sha256_of(_weights_file(path, name))


def _weights_file(path: Path, name: str) -> Path:
    file = path / f"{name}.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            f"{file} does not exist; give a checkpoint folder of a run (it holds "
            f"model.safetensors) or a .safetensors file"
        )
    return file


def on_host(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as ``save_file`` takes them."""
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


def flush(path: Path, *, recursive: bool = True) -> None:
    """Wait until files and their names are on the disk; who may read the folder may read them."""
    for item in [*(path.iterdir() if recursive else ()), path]:
        if item.is_file():
            item.chmod(path.stat().st_mode & 0o666)
        descriptor = os.open(item, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
