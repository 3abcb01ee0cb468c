"""Turn CIFAR-10, as it is published, into images and manifests.

    python datasets/cifar10/prepare.py cifar-10-python.tar.gz

takes the archive of the Python version, or its folder cifar-10-batches-py.
Writes train/<class>/00000.png ..., test/..., train.csv, validation.csv (the test images) and
labels.txt beside this script. See README.md there.
"""

import argparse
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpm_video.files.atomic import temporary_folder, written_beside
from hpm_video.preparation.recipes import RecipeError, Split, run_recipe

OPTIONS = {
    "source": {"type": Path, "metavar": "SOURCE", "help": "archive, or a folder; see README.md"}
}
SPLITS = {"train": "train", "validation": "test"}  # manifest -> folder of its images


def read(source: Path) -> dict[str, Any]:
    """Read the images of each split.

    The files are pickles, which can run any code when loaded: torchvision loads those alone whose
    MD5 is that of the published ones.
    """
    from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory(dir=temporary_folder()) as temporary:
        folder = source.parent if source.name == CIFAR10.base_folder else source
        try:
            if source.is_file():
                folder = Path(temporary)
                with tarfile.open(source) as archive:
                    archive.extractall(folder, filter="data")
            return {split: CIFAR10(folder, train=split == "train") for split in SPLITS}
        except (tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError) as error:
            raise RecipeError(
                f"{source} is not what is published: {' '.join(str(error).split())}. Name "
                f"{CIFAR10.filename} or {CIFAR10.base_folder}, in which the MD5 of each file is "
                "right"
            ) from error


def write_split(split: str, data: Any, output: Path) -> Split:
    """Write the missing images of a split.

    Raises:
        RecipeError: another image is there.
    """
    found: list[tuple[Path, int]] = []
    for number, (pixels, label) in enumerate(zip(data.data, data.targets, strict=True)):
        path = output / SPLITS[split] / data.classes[label] / f"{number:05}.png"
        found.append((path, label))
        if not path.exists():
            with written_beside(path) as beside:
                Image.fromarray(pixels).save(beside, "PNG")
            continue
        try:
            with Image.open(path) as image:
                same = np.array_equal(np.asarray(image), pixels)
        except (OSError, SyntaxError):
            same = False
        if not same:
            raise RecipeError(
                f"{path} is there and is another picture than that of the archive. Move the images "
                "away that are there, or name another folder by --output"
            )
    return Split(split, found)


def prepare(options: argparse.Namespace) -> tuple[Sequence[str], list[Split]]:
    """Write the images of both splits."""
    read_splits, output = read(options.source), options.output.absolute()
    splits = [write_split(split, data, output) for split, data in read_splits.items()]
    return read_splits["train"].classes, splits


main = partial(run_recipe, __doc__, __file__, OPTIONS, prepare, kind="image")

if __name__ == "__main__":
    sys.exit(main())
