"""Turn CIFAR-10, as it is published, into images and manifests.

    python datasets/cifar10/prepare.py cifar-10-python.tar.gz

takes cifar-10-python.tar.gz, cifar-10-binary.tar.gz, the folder of either, or a folder of class
folders, train/<class>/ and test/<class>/. Writes train.csv, validation.csv (the test images) and
labels.txt beside this script; and from the archives train/<class>/00000.png ..., test/... there.
See README.md there.
"""

import argparse
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpm_video.files.atomic import temporary_folder, written_beside
from hpm_video.preparation import sources
from hpm_video.preparation.recipes import Prepared, run_recipe
from hpm_video.preparation.sources import RecipeError

OPTIONS = {
    "source": {"type": Path, "metavar": "SOURCE", "help": "archive, or a folder; see README.md"}
}
SPLITS = {"train": "train", "validation": "test"}  # manifest -> folder of its images
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "validation": ["test_batch"]}
META, BINARY_META = "batches.meta", "batches.meta.txt"
SIDE = 32
PIXELS = 3 * SIDE * SIDE
PUBLISHED = (
    "cifar-10-python.tar.gz, cifar-10-binary.tar.gz, the folder cifar-10-batches-py or "
    "cifar-10-batches-bin, or a folder that holds train/<class>/ and test/<class>/. Other archives "
    f"are unpacked first, in a folder of .tar files by: {sources.UNPACK}"
)

Pictures = tuple[NDArray[np.uint8], Sequence[int]]  # images (N, H, W, 3) and their labels


def unpack(source: Path, folder: Path) -> None:
    """Extract an archive."""
    try:
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"{source} cannot be read: {reason}. Download it again, or name {PUBLISHED}"
        ) from error


def read_pickles(folder: Path, source: Path) -> tuple[list[str], dict[str, Pictures]]:
    """Read class names and the images of each split from the Python version.

    Its files are pickles, which can run any code when loaded, so their MD5 must be that of the
    published ones.
    """
    from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]
    from torchvision.datasets.utils import check_integrity  # type: ignore[import-untyped]

    meta = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])
    for name, md5 in [meta, *CIFAR10.train_list, *CIFAR10.test_list]:
        if not check_integrity(folder / name, md5):
            state = "is not the published one" if (folder / name).exists() else "is missing"
            raise RecipeError(
                f"{source}: the file {name} {state}: its MD5 must be {md5}. Download it again"
            )
    here = type("Published", (CIFAR10,), {"base_folder": folder.name})
    read = {split: here(folder.parent, train=split == "train") for split in SPLITS}
    pictures = {split: (every.data, every.targets) for split, every in read.items()}
    return read["train"].classes, pictures


def read_binary(folder: Path, source: Path) -> tuple[list[str], dict[str, Pictures]]:
    """Read the same from the binary version: for each image a byte with its label, and pixels."""
    names = (folder / BINARY_META).read_text(encoding="utf-8").split()
    pictures = {}
    for split, batches in BATCHES.items():
        data = [(folder / f"{name}.bin").read_bytes() for name in batches]
        for name, each in zip(batches, data, strict=True):
            if not each or len(each) % (1 + PIXELS) or max(each[:: 1 + PIXELS]) >= len(names):
                raise RecipeError(
                    f"{source}: {name}.bin: need {1 + PIXELS} bytes for each image, the first a "
                    f"label of 0 to {len(names) - 1}, got {len(each)} bytes. Download it again"
                )
        rows = np.frombuffer(b"".join(data), np.uint8).reshape(-1, 1 + PIXELS)
        planes = rows[:, 1:].reshape(-1, 3, SIDE, SIDE)
        pictures[split] = planes.transpose(0, 2, 3, 1), rows[:, 0].tolist()
    return names, pictures


def write_split(
    split: str, pictures: Pictures, names: Sequence[str], output: Path
) -> sources.Split:
    """Write the missing images of a split.

    Raises:
        RecipeError: another image is there.
    """
    found: list[tuple[sources.Clip, Path]] = []
    for number, (picture, label) in enumerate(zip(*pictures, strict=True)):
        shown = f"{names[label]}/{number:05}.png"
        path, same = output / SPLITS[split] / shown, True
        if path.exists():
            try:
                with Image.open(path) as image:
                    same = np.array_equal(np.asarray(image), picture)
            except (OSError, SyntaxError):
                same = False
        else:
            with written_beside(path) as beside:
                Image.fromarray(picture).save(beside, "PNG")
        if not same:
            raise RecipeError(
                f"{path} is there and is another picture than that of the archive. Move the images "
                "away that are there, or name another folder by --output"
            )
        found.append((sources.Clip("", shown, (shown,), names[label], label), path))
    return sources.Split(split, found)


def prepare(options: argparse.Namespace) -> Prepared:
    """Write the images of an archive, or find those of class folders."""
    source, output = options.source, options.output.absolute()
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as temporary:
        folder = Path(temporary) if source.is_file() else source
        if source.is_file():
            unpack(source, folder)
        for meta, read in {META: read_pickles, BINARY_META: read_binary}.items():
            for found in (*folder.glob(meta), *folder.glob(f"*/{meta}")):
                names, pictures = read(found.parent, source)
                return Prepared(names, [write_split(s, pictures[s], names, output) for s in SPLITS])
    if not all((source / folder).is_dir() for folder in SPLITS.values()):
        raise RecipeError(f"{source} is none of what is published: name {PUBLISHED}")
    images = {
        name: sources.Videos(
            source / folder, sources.folder_and_name, suffix=options.suffix, kind="image"
        )
        for name, folder in SPLITS.items()
    }
    there = {file.parent.name for file in images["train"].files}
    classes = sources.Classes(sorted(there), str(images["train"].folder))
    remedy = "Training and test images must have the same classes"
    splits = [
        sources.split_of(name, every, classes, None, "", remedy) for name, every in images.items()
    ]
    return Prepared(classes.names, splits)


main = partial(run_recipe, __doc__, __file__, OPTIONS, prepare, kind="image")

if __name__ == "__main__":
    sys.exit(main())
