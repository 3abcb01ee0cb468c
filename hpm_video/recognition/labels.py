"""Numbers and names of classes, and checks that manifests agree on them."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hpm_video.data.manifest import Manifest, ManifestError
from hpm_video.files.errors import read_text

log = logging.getLogger(__name__)


def read_label_names(path: Path) -> tuple[str, ...]:
    """Read a list of class names, that of class i in line i. ManifestError: it is no such list."""
    names = [name.strip() for name in read_text(path, ManifestError).rstrip().splitlines()]
    if not all(names) or not names:
        raise ManifestError(f"{path} must have the name of class i in line i, and no empty line")
    return tuple(names)


def check_classes(manifest: Manifest, names: Sequence[str], what: str) -> None:
    """Raise a ManifestError unless every video has a class, numbered as ``names`` does."""
    for file, label in zip(manifest.files, manifest.labels, strict=True):
        if not 0 <= label < len(names):
            has = "no label" if label < 0 else f"label {label}"
            raise ManifestError(
                f"{what} need labels from 0 to {len(names) - 1}, but {file} has {has}; give a "
                f"manifest with a column label, or a folder of class folders"
            )
    for label, (own, other) in enumerate(zip(names, manifest.label_names or (), strict=False)):
        if own != other and str(label) not in (own, other):
            raise ManifestError(
                f"class {label} is {own!r} for training and {other!r} in the validation manifest; "
                f"both must number the classes alike"
            )


def numbered_as(names: Sequence[str] | None, manifest: Manifest) -> Manifest:
    """Number class folders as ``names`` does; they may lack some. ManifestError: one is none."""
    if not (names and manifest.has_class_folders and manifest.label_names):
        return manifest
    own = manifest.label_names
    if further := [name for name in own if name not in names]:
        raise ManifestError(
            f"of the class folders beside {manifest.files[0]}, {len(further)} of {len(own)} are no "
            f"training classes, first {further[0]!r}; move them out"
        )
    number = [names.index(name) for name in own]
    labels = tuple(number[label] for label in manifest.labels)
    return replace(manifest, labels=labels, label_names=tuple(names))


def class_names(
    train: Manifest,
    validation: Manifest | None,
    *,
    count: int | None = None,
    file: str | None = None,
) -> tuple[str, ...]:
    """Return the name of each class: from a file, the training manifest, or else its number.

    ``count``: of the classes, where it is known. ManifestError: labels or names do not fit.
    """
    if file is not None:
        names = read_label_names(Path(file).expanduser())
    else:
        names, found = train.label_names or (), count or max(train.labels, default=-1) + 1
        names += tuple(str(label) for label in range(len(names), found))
    if count is not None and len(names) != count:
        raise ManifestError(
            f"model.num_classes is {count}, but there are names for {len(names)} classes; take "
            f"model.num_classes={len(names)}, or other data.label_names"
        )
    if len(names) < 2:
        raise ManifestError(
            f"a classifier needs two classes at least, and the training videos have {len(names)}; "
            f"give a manifest with a column label, or a folder of class folders"
        )
    check_classes(train, names, "the training videos")
    if validation is not None:
        check_classes(validation, names, "the validation videos")
    if without := [name for label, name in enumerate(names) if label not in {*train.labels}]:
        log.warning("no training video of %d classes: %s", len(without), ", ".join(without[:10]))
    return names
