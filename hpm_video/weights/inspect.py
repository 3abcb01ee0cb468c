"""What a file of weights holds, in a few lines."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpm_video.config.checks import ConfigError
from hpm_video.files.single_file import NAMES, as_folder
from hpm_video.files.weights import CheckpointError
from hpm_video.recognition.trained_model import WeightsOf
from hpm_video.weights.families import LICENCES
from hpm_video.weights.files import Source, Tensors, read_source
from hpm_video.weights.geometry import Inferred, Overrides, infer
from hpm_video.weights.importing import describe_assumed, describe_model, describe_sizes
from hpm_video.weights.layouts import read
from hpm_video.weights.model import TrainedModel, load_model
from hpm_video.weights.recognise import Recognised, recognise

WEIGHTS_OF: dict[str, WeightsOf] = {"teacher": "teacher", "average": "average"}
"""Whose weights are asked for where one of these files of a folder is."""


def inspect(path: Path, overrides: Overrides | None = None) -> list[str]:
    """Return family, size, clips, patches, head, epoch, number of parameters and licence of a file.

    Raises:
        CheckpointError: it cannot be read safely, or is of no known family.
    """
    overrides = overrides or Overrides()
    source = read_source(path)
    recognised = recognise(source, overrides.entry)
    family, tensors = recognised.family, recognised.tensors
    try:
        *lines, licence = _lines(source, recognised, overrides)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path} ({family.says}): {error}") from error
    where = f" under {recognised.entry!r}" if recognised.entry else ""
    count = sum(value.numel() for value in tensors.values())
    lines += [f"{len(tensors)} tensors{where}, {count:,} parameters", *recognised.lines()]
    if source.epoch is not None:
        lines.append(f"epoch {source.epoch}")
    others = [name for name in source.entries if name != recognised.entry]
    if others or source.beside:
        lines.append(f"beside them: {', '.join([*others, *source.beside])}")
    return [*lines, licence]


def _lines(source: Source, recognised: Recognised, overrides: Overrides) -> list[str]:
    """Tell of the model, and last of its licence."""
    family, tensors = recognised.family, recognised.tensors
    if family.ours:
        return [f"{family.name}: {family.says}", *_of_ours(source, tensors)]
    inferred = infer(source, family, read(family.layout, tensors), overrides, look=True)
    lines = describe_model(inferred, family) + describe_assumed(inferred.assumed)
    return [*lines, f"licence: {family.licence}"]


def _of_ours(source: Source, tensors: Tensors) -> list[str]:
    """Tell of weights of this package what the config beside them or in them says."""
    with _folder_of(source) as folder:
        if folder is not None:
            model = load_model(folder, WEIGHTS_OF.get(source.path.stem))
            return [*_described(model), f"licence: {model.licence}"]
    blocks = {
        match[1] for name in tensors if (match := re.match(r"encoder\.blocks\.(\d+)\.", name))
    }
    dim, values = tensors["patch_embed.weight"].shape
    lines = [f"encoder {dim} wide, {len(blocks)} deep; {values} values of a patch"]
    if "head.weight" in tensors:
        lines.append(f"head of {len(tensors['head.weight'])} classes")
    return [
        *lines,
        "heads, frames and patches: not in the file, and no config.yaml lies beside it",
        f"licence: {LICENCES['ours']}",
    ]


@contextmanager
def _folder_of(source: Source) -> Iterator[Path | None]:
    """The checkpoint folder that weights lie in, or are; none where they lie alone."""
    path = source.path
    if path.is_dir() or "config.yaml" in source.metadata:
        with as_folder(path) as folder:
            yield folder
    else:
        beside = path.stem in NAMES and (path.parent / "config.yaml").is_file()
        yield path.parent if beside else None


def _described(model: TrainedModel) -> list[str]:
    config = model.config
    lines = [
        *describe_sizes(Inferred(config, model.label_names, (), ())),
        f"positions {config.model.positions}, frame stride {config.data.frame_stride}",
    ]
    if model.origin:
        origin = json.loads(model.origin)
        epoch = "" if origin["epoch"] is None else f", epoch {origin['epoch']}"
        came = f"imported from {origin['source']} ({origin['family']}{epoch})"
        return [*lines, f"{model.weights}, {came}"]
    epochs = config.recipe.epochs
    return [*lines, f"{model.weights} at update {model.update} of a run of {epochs} epochs"]
