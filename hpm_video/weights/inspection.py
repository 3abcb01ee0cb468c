"""What a file of weights holds, in a few lines."""

import re
from pathlib import Path

from hpm_video.training.checkpoint import CheckpointError
from hpm_video.weights.families import LICENCES, recognise
from hpm_video.weights.files import Source, Tensors, read_source
from hpm_video.weights.imported import describe_model
from hpm_video.weights.layouts import to_ours
from hpm_video.weights.sizes import Given, cut_of, facts_of, parameters_of


def inspect(path: Path, given: Given = Given()) -> list[str]:  # noqa: B008 - it is frozen
    """Family, size, clips, patches, head, epoch, number of parameters and licence of a file.

    Raises:
        CheckpointError: it cannot be read safely, or is of no known family.
    """
    source = read_source(path)
    recognised = recognise(source, given.entry)
    family, tensors = recognised.family, recognised.tensors
    if family.licence == "ours":
        lines = [f"{family.name}: {family.says}", *_our_size(source, tensors)]
    else:
        cut = cut_of(tensors[family.kernel])
        renamed = to_ours(family.layout, tensors, cut)
        try:
            facts = facts_of(source, family, renamed.tensors, renamed.tables, given, cut)
        except CheckpointError as error:
            raise CheckpointError(f"{path} ({family.says}): {error}") from error
        lines = describe_model(facts, family)
        if facts.assumed:
            lines.append(f"not in the file, taken as usual: {'; '.join(facts.assumed)}")
    where = f" under {recognised.entry!r}" if recognised.entry else ""
    prefix = f", all names begin with {recognised.prefix!r}" if recognised.prefix else ""
    lines.append(
        f"{len(tensors)} tensors{where}{prefix}, {parameters_of(tensors.values()):,} parameters"
    )
    if source.epoch is not None:
        lines.append(f"epoch {source.epoch}")
    others = [name for name in source.entries if name != recognised.entry]
    if others or source.beside:
        lines.append(f"beside them: {', '.join([*others, *source.beside])}")
    return [*lines, f"licence: {LICENCES[family.licence]}"]


def _our_size(source: Source, tensors: Tensors) -> list[str]:
    """Of weights of this package, which have their config beside them."""
    blocks = {
        match[1] for name in tensors if (match := re.match(r"encoder\.blocks\.(\d+)\.", name))
    }
    dim, values = tensors["patch_embed.weight"].shape
    parts = [f"encoder {dim} wide, {len(blocks)} deep; {values} values of a patch"]
    if "head.weight" in tensors:
        parts.append(f"head of {len(tensors['head.weight'])} classes")
    if "reconstructor.head.weight" in tensors:
        width = tensors["reconstructor.head.weight"].shape[1]
        predictor = "difficulty_decoder.head.weight" in tensors
        parts.append(f"decoder {width} wide, {'with a' if predictor else 'without'} loss predictor")
    if (source.path / "config.yaml").is_file():
        parts.append(f"the rest is in {source.path / 'config.yaml'}")
    return parts
