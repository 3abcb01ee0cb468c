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


def prepare(options: argparse.Namespace) -> tuple[Sequence[str], list[Split]]:
    """Write the images of both splits."""
    sources, splits = read(options.source), []
    for split, data in sources.items():
        found: list[tuple[Path, int]] = []
        for number, (pixels, label) in enumerate(zip(data.data, data.targets, strict=True)):
            path = options.output / SPLITS[split] / data.classes[label] / f"{number:05}.png"
            with written_beside(path) as beside:
                Image.fromarray(pixels).save(beside, "PNG")
            found.append((path, label))
        splits.append(Split(split, found))
    return sources["train"].classes, splits


main = partial(run_recipe, __doc__, __file__, OPTIONS, prepare, kind="image")

if __name__ == "__main__":
    sys.exit(main())
