"""What a file of weights holds, in a few lines."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hpm_video.files.single_file import NAMES, as_folder
from hpm_video.files.weights import CheckpointError
from hpm_video.recognition.trained_model import WeightsOf
from hpm_video.weights.families import LICENCES, Recognised, recognise
from hpm_video.weights.files import ORIGIN, Source, Tensors, read_source
from hpm_video.weights.importing import describe_decoder, describe_encoder, describe_model
from hpm_video.weights.layouts import to_ours
from hpm_video.weights.own import OwnModel, load_own
from hpm_video.weights.sizes import Given, cut_of, facts_of, parameters_of


def inspect(path: Path, given: Given = Given()) -> list[str]:  # noqa: B008 - it is frozen
    """Family, size, clips, patches, head, epoch, number of parameters and licence of a file.

    Raises:
        CheckpointError: it cannot be read safely, or is of no known family.
    """
    source = read_source(path)
    recognised = recognise(source, given.entry)
    family, tensors = recognised.family, recognised.tensors
    try:
        *lines, licence = _lines(source, recognised, replace(given, looks=True))
    except CheckpointError as error:
        raise CheckpointError(f"{path} ({family.says}): {error}") from error
    where = f" under {recognised.entry!r}" if recognised.entry else ""
    count = parameters_of(tensors.values())
    lines += [f"{len(tensors)} tensors{where}, {count:,} parameters", *recognised.told()]
    if source.epoch is not None:
        lines.append(f"epoch {source.epoch}")
    others = [name for name in source.entries if name != recognised.entry]
    if others or source.beside:
        lines.append(f"beside them: {', '.join([*others, *source.beside])}")
    return [*lines, licence]


def _lines(source: Source, recognised: Recognised, given: Given) -> list[str]:
    """Of the model, and last of its licence."""
    family, tensors = recognised.family, recognised.tensors
    if family.licence == "ours":
        return [f"{family.name}: {family.says}", *_of_ours(source, tensors)]
    cut = cut_of(tensors[family.kernel])
    renamed = to_ours(family.layout, tensors, cut)
    facts = facts_of(source, family, renamed, given, cut)
    lines = describe_model(facts, family)
    if facts.assumed:
        lines.append(f"not in the file, taken as usual: {'; '.join(facts.assumed)}")
    return [*lines, f"licence: {LICENCES[family.licence]}"]


def _of_ours(source: Source, tensors: Tensors) -> list[str]:
    """Of weights of this package: what the config beside them or in them says."""
    with _folder_of(source) as folder:
        if folder is not None:
            own = load_own(folder, OF_FILES.get(source.path.stem))
            return [*_described(own), f"licence: {own.licence}"]
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


OF_FILES: dict[str, WeightsOf] = {"teacher": "teacher", "average": "average"}
"""Whose weights are asked for where one of these files of a folder is."""


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


def _described(own: OwnModel) -> list[str]:
    lines = [describe_encoder(own.shape.size, own.shape.patch_size, own.clip_size)]
    if own.decoder is not None:
        predictor = any(name.startswith("difficulty_decoder.") for name in own.tensors)
        lines.append(describe_decoder(own.decoder, predictor=predictor))
    if own.is_classifier:
        lines.append(f"head of {len(own.label_names)} classes on {own.pooling}")
    lines.append(f"positions {own.shape.positions}, frame stride {own.frame_stride}")
    if ORIGIN in own.texts:
        origin = json.loads(own.texts[ORIGIN])
        epoch = "" if origin["epoch"] is None else f", epoch {origin['epoch']}"
        return [
            *lines,
            f"{own.weights}, imported from {origin['source']} ({origin['family']}{epoch})",
        ]
    return [*lines, f"{own.weights} at update {own.update} of a run of {own.epochs} epochs"]
