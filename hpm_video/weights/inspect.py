"""What files of weights hold, in lines for the terminal."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hpm_video.config.choices import TransformerSize, WeightsOf
from hpm_video.config.schema import FinetuneConfig
from hpm_video.files.wording import counted
from hpm_video.recognition.trained_model import TrainedModel, open_trained
from hpm_video.weights.families import licence_of
from hpm_video.weights.geometry import Overrides
from hpm_video.weights.importing import Imported, folder_of, import_weights


def describe(imported: Imported) -> list[str]:
    """Return lines on an import."""
    model, family, prefix = imported.model, imported.family, imported.state.prefix
    own_positions = model.config.model.positions == "given"
    remarks = {
        f"names begin with {prefix!r}, which is left out": prefix,
        "beside them are as many numbers of a teacher": imported.teacher,
        f"epoch {imported.source.epoch}": imported.source.epoch is not None,
        f"not in the file, defaults taken: {'; '.join(imported.assumed)}": imported.assumed,
        f"start fresh: {', '.join(_parts_of(imported.fresh))}": imported.fresh,
        "its positions are its own: they are kept (model.positions=given)": own_positions,
    }
    return [
        f"{family.name}: {family.title}",
        *_describe_model(model),
        f"licence: {family.licence}",
        f"{sum(value.numel() for value in model.tensors.values()):,} numbers taken",
        *(line for line, holds in remarks.items() if holds),
        *describe_left_out(imported.left_out),
    ]


def describe_left_out(left_out: dict[str, str]) -> list[str]:
    """Return lines on what is left out, and why."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return [f"left out: {', '.join(_parts_of(names))}: {why}" for why, names in reasons.items()]


def _describe_model(model: TrainedModel) -> list[str]:
    def lines(size: TransformerSize) -> str:
        return f"{size.dim} wide, {size.depth} deep, {size.num_heads} heads"

    config = model.config
    patches, clips = (
        " x ".join(map(str, size)) for size in (config.model.patch_size, config.data.clip_size)
    )
    encoder = f"encoder {lines(config.model.encoder)}; patches of {patches}; clips of {clips}"
    if isinstance(config, FinetuneConfig):
        return [encoder, f"head of {len(model.label_names)} classes on {config.model.pooling}"]
    predictor = "" if config.mining.predictor == "none" else ", and a loss predictor"
    return [encoder, f"decoder {lines(config.model.decoder)}{predictor}"]


def _parts_of(names: Iterable[str]) -> list[str]:
    """Return the names of tensors, with all blocks as one."""
    kinds = Counter(re.sub(r"((^|[._])(blocks\w*|layers?))\.\d+\..*", r"\1", n) for n in names)
    return [f"{name} ({count} tensors)" if count > 1 else name for name, count in kinds.items()]


def inspect(path: Path, overrides: Overrides | None = None) -> list[str]:
    """Return family, size, clips, patches, head, epoch, number of parameters and licence of a file.

    Raises:
        CheckpointError: it cannot be read safely, or is of no known family.
    """
    folder = folder_of(path)
    if folder is None:
        return describe(import_weights(path, overrides))
    names: dict[str, WeightsOf] = {"teacher": "teacher", "average": "average"}
    model = open_trained(folder, TrainedModel, names.get(path.stem))
    config, origin = model.config, json.loads(model.origin) if model.origin else None
    state = f"{model.kind} of a run of {counted(config.recipe.epochs, 'epoch')}"
    if origin:
        state = f"{model.weights}, imported from {origin['source']} ({origin['family']})"
    return [
        f"ours: {state}",
        *_describe_model(model),
        f"positions {config.model.positions}, frames at {config.data.pace}",
        f"{sum(value.numel() for value in model.tensors.values()):,} parameters",
        f"licence: {licence_of(model.origin)}",
    ]
