"""The state of a run on disk: complete or absent, and readable without this package.

A checkpoint is a folder ``update-00001600`` of
    model.safetensors, teacher.safetensors   weights, as any safetensors reader takes them (of a
                                             classifier: model and, if kept, average)
    optimizer.safetensors                    what resuming needs beside them, by parameter
    state.json                               the next update, the best score, what wrote it, and the
                                             SHA-256 of each file above
    config.yaml                              the experiment, so that the folder speaks for itself
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
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hpm_video.files.first_names import ByCurrentNames
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

    ``weights``: of each module, by its name. What stands at ``folder`` is moved aside.

    Raises:
        CheckpointError: the weights are not finite, or the disk does not take them. What was
            there before is untouched.
    """
    for name, values in weights.items():
        broken = [key for key, value in values.items() if not value.isfinite().all()]
        if broken:
            raise CheckpointError(
                f"{name} has weights that are not finite, {broken[0]} for one; it is not saved"
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
        if os.path.lexists(folder):
            _move_aside(folder)
        writing.rename(folder)
        flush(folder.parent, recursive=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the checkpoint {folder}: {error}. Earlier checkpoints are untouched: "
            f"make room and start the same command again"
        ) from error


def checkpoints_in(folder: Path, *, complete: bool = True) -> list[Path]:
    """The checkpoints of a run, oldest first; also what only has the name of one, if asked for."""
    named = sorted(path for path in folder.glob("*") if NAME.fullmatch(path.name))
    return [path for path in named if not complete or (path / "state.json").is_file()]


def checkpoint_path(folder: Path, update: int) -> Path:
    """Return the folder of the state before ``update``."""
    return folder / f"update-{update:08d}"


def remove_superseded(folder: Path, keep_last: int, keep_also: Iterable[Path]) -> None:
    """Delete all but the newest ``keep_last`` checkpoints, those marked to keep, and the given."""
    kept = set(keep_also)
    for path in checkpoints_in(folder)[:-keep_last]:
        if path not in kept and not read_state(path).get("keep", False):
            # Under another name: half deleted, it is no checkpoint.
            _delete(path.rename(path.with_name(f"{UNFINISHED}{path.name}")))


def mend(folder: Path) -> None:
    """Put the checkpoints of a run in order: what interrupted saves left, and what users did.

    What has the name of a checkpoint and is none would stand in the way of one: it is moved aside.

    Raises:
        CheckpointError: a checkpoint is damaged, or has the name of another.
    """
    for path in folder.glob(f"{UNFINISHED}*"):
        _delete(path)
    for path in checkpoints_in(folder, complete=False):
        if (path / "state.json").is_file():
            check_name(path)
        else:
            _move_aside(path)
    point_to_newest_and_best(folder)


def check_name(checkpoint: Path) -> None:
    """Refuse a checkpoint of a run that is not of the update that it is named by.

    Raises:
        CheckpointError: it is not, or cannot be read.
    """
    right = checkpoint_path(checkpoint.parent, read_state(checkpoint)["update"]).name
    if right != checkpoint.name:
        raise CheckpointError(
            f"{checkpoint} says in its state.json that it is {right}, and would be taken for "
            f"another state of the run; move it out of {checkpoint.parent}"
        )


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _move_aside(path: Path) -> None:
    """Rename what stands in the way of a checkpoint or of a name for one."""
    ends = ("" if n == 1 else f"-{n}" for n in count(1))
    places = (path.with_name(f"moved-aside-{path.name}{end}") for end in ends)
    aside = next(place for place in places if not os.path.lexists(place))
    path.rename(aside)
    log.warning(
        "%s stood in the way of a checkpoint of this run; it is now %s, and may be deleted if "
        "nothing in it is needed",
        path,
        aside.name,
    )


def point_to(link: Path, target: Path) -> None:
    """Make ``link`` a symbolic link to its neighbour ``target``, at once."""
    fresh = link.with_name(f"{UNFINISHED}{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target.name)
    if os.path.lexists(link) and not link.is_symlink():  # a copy made without symbolic links
        _move_aside(link)
    fresh.replace(link)


def read_state(checkpoint: Path, *, of_run: bool = False) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint. ``of_run``: it must be one that a run wrote.

    Raises:
        CheckpointError: it cannot be read, or lacks something.
    """
    path = checkpoint / "state.json"
    try:
        state: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    if not isinstance(state, dict):
        raise _damaged(path, f"must hold a JSON object, not {json.dumps(state)[:40]}")
    needed = {"update": int, "sha256": dict}
    if of_run:
        needed |= {"facts": dict, "data": str, "best": dict}
    found = {"sha256": {}, **state}
    wrong = [name for name, kind in needed.items() if type(found.get(name)) is not kind]
    if of_run and not wrong:
        inner = {"facts": ["precision"], "best": ["update", "score"] if state["best"] else []}
        wrong = [
            f"{part}.{name}" for part in inner for name in inner[part] if name not in state[part]
        ]
    if wrong:
        raise _damaged(path, f"lacks {', '.join(wrong)}")
    return state


def _damaged(file: Path, reason: str) -> CheckpointError:
    folder = file.parent.resolve()
    return CheckpointError(
        f"{folder} is not a complete checkpoint: {file.name} {reason}. Copy the folder again if "
        f"it is a copy, or delete it to let its run go on from the checkpoint before"
    )


def checksums_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of tensors, by its name."""
    return {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))}


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            found.update(block)
    return found.hexdigest()


def _verify(file: Path) -> None:
    """Refuse a file of a checkpoint that is not as it was written; others are taken as they are.

    Of the processes on a machine only the first reads the whole file for that.
    """
    if not (file.parent / "state.json").is_file() or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    state = read_state(file.parent)
    if "facts" in state and "sha256" not in state:
        _say_unverified(file.parent.resolve())
    written = state.get("sha256", {}).get(file.name)
    if written is None:
        return
    if not file.is_file():
        raise _damaged(file, "is missing")
    if (now := sha256_of(file)) != written:
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
    saved = checkpoints_in(folder)
    if not saved:
        return
    point_to(folder / "last", saved[-1])
    best = read_state(saved[-1]).get("best", {})
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

    Its tensors are read when they are asked for: with many processes on a machine, all of them in
    each would be many times the size of the model.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = checkpoint / OPTIMIZER
    _verify(path)
    try:
        stored: Any = safe_open(path, framework="pt")
        keys: dict[str, dict[str, str]] = {}
        for key in stored.keys():  # noqa: SIM118 - it is no mapping
            kind, name = key.split(".", 1)
            keys.setdefault(kind, {})[name] = key
        moments = {
            kind: ByCurrentNames(
                own, lambda name, own=own: stored.get_tensor(own[name]), patch_size
            )
            for kind, own in keys.items()
        }
        return OptimizerState(int(stored.metadata()["step"]), moments)
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"is not complete ({str(error).splitlines()[0]})") from error


def read_weights(path: Path, patch_size: Size3, name: str = "model") -> dict[str, Tensor]:
    """Weights of a checkpoint folder, or of a .safetensors file, by the names of today.

    ``patch_size``: of the model, which tells how the patch embedding of older files lies.

    Raises:
        CheckpointError: there is no such file, it is not one of safetensors, or it is damaged.
    """
    file = _weights_file(path, name, verify=True)
    try:
        stored = load_file(file)
        return dict(ByCurrentNames(stored, stored.__getitem__, patch_size))
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


def _weights_file(path: Path, name: str, *, verify: bool = False) -> Path:
    file = path / f"{name}.safetensors" if path.is_dir() else path
    if verify:
        _verify(file)
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
    """Wait until files and their names are on the disk; who may read the folder may read them.

    (safetensors writes files that their owner alone may read.)
    """
    for item in [*(path.iterdir() if recursive else ()), path]:
        if item.is_file():
            item.chmod(path.stat().st_mode & 0o666)
        descriptor = os.open(item, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
