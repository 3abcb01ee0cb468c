"""Turn CIFAR-10, as it is published, into images and manifests.

    python datasets/cifar10/prepare.py cifar-10-python.tar.gz

takes cifar-10-python.tar.gz, cifar-10-binary.tar.gz, the folder of either, or a folder of class
folders, train/<class>/ and test/<class>/. Writes train.csv, validation.csv (the test images) and
labels.txt beside this script; and from the archives train/<class>/00000.png ..., test/... there.
See README.md there.
"""

import argparse
import io
import math
import pickle
import re
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpm_video.files.atomic import written_beside
from hpm_video.preparation.recipes import (
    UNPACK,
    Classes,
    Clip,
    RecipeError,
    Split,
    Videos,
    folder_and_name,
    match,
    report,
    run_recipe,
    write,
)

SPLITS = {"train": "train", "validation": "test"}
"""Manifest -> folder of its images."""
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "validation": ["test_batch"]}
SIDE = 32
PIXELS = 3 * SIDE * SIDE

PUBLISHED = "cifar-10-python.tar.gz or cifar-10-binary.tar.gz"

Batch = tuple[NDArray[np.uint8], list[int]]
"""Images (N, H, W, 3) and their labels."""
Read = Callable[[str], bytes]
"""Name of a file of the archive -> its content."""

_TAR = re.compile(r"\.(?:tar(?:\.\w+)?|tgz)$")


# --- The archives --------------------------------------------------------------------------------


class _Bytes:
    """Stands for NumPy's type of 8-bit numbers while a pickle is read."""

    def __new__(cls, code: object = None, *_: object) -> "_Bytes":
        if code not in ("u1", b"u1", "|u1", b"|u1"):
            raise RecipeError(f"it wants numbers of the kind {code!r}, not those of 8 bits, 'u1'")
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Byte order, fields and the like, of which 8-bit numbers have none."""
        if not isinstance(state, tuple) or len(state) < 5 or state[2:5] != (None, None, None):
            raise RecipeError("it wants numbers with fields, not those of 8 bits, 'u1'")


class _Array:
    """Stands for an array while a pickle is read.

    NumPy's own would be called with whatever the pickle says, and can be made to crash.
    """

    pixels: NDArray[np.uint8] | None = None

    def __new__(cls, *arguments: object) -> "_Array":
        if arguments:
            raise RecipeError("it calls numpy.ndarray, which no file of CIFAR-10 needs")
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Takes version, shape, type, whether columns come first, and the bytes."""
        match state:
            case (1, tuple(shape), _Bytes(), bool(by_columns), bytes(data)):
                pass
            case _:
                raise RecipeError("it holds an array that is not one of 8-bit numbers")
        if not all(type(side) is int and side >= 0 for side in shape) or (
            math.prod(shape) != len(data)
        ):
            raise RecipeError(f"it holds an array of the shape {shape} with {len(data)} bytes")
        flat = np.frombuffer(data, np.uint8)
        self.pixels = flat.reshape(shape, order="F" if by_columns else "C")


def _empty_array(kind: object, *_: object) -> _Array:
    """In the place of NumPy's ``_reconstruct``."""
    if kind is not _Array:
        raise RecipeError("it wants an array of another kind than numpy.ndarray")
    return _Array()


class _OnlyArrays(pickle.Unpickler):
    """Makes stand-ins for arrays and what Python has built in: a pickle can call anything."""

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Bytes,
            ("numpy.core.multiarray", "_reconstruct"): _empty_array,
            ("numpy._core.multiarray", "_reconstruct"): _empty_array,
            ("_codecs", "encode"): _latin_1,  # bytes, as Python 3 writes them for Python 2
        }
        if (module, name) not in allowed:
            raise RecipeError(
                f"it wants {module}.{name}, which no file of CIFAR-10 needs, and might do anything"
            )
        return allowed[module, name]


def _latin_1(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RecipeError(f"it wants text encoded as {encoding}, which no file of CIFAR-10 needs")
    return text.encode("latin-1")


def unpickle(data: bytes, place: str) -> dict[bytes, Any]:
    """The dictionary that a file of the Python version holds.

    Raises:
        RecipeError: it is broken, or holds anything but arrays, numbers and text.
    """
    try:
        content = _OnlyArrays(io.BytesIO(data), encoding="bytes").load()
    except RecipeError as error:
        raise RecipeError(f"{place} is refused: {error}. Download it again") from error
    except Exception as error:  # noqa: BLE001 - broken pickles raise anything
        raise RecipeError(
            f"{place} is no pickle that can be read ({type(error).__name__}: {error}). "
            "Download it again"
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(f"{place} holds a {type(content).__name__}, not a dictionary")
    return {
        name.encode() if isinstance(name, str) else name: (
            value.pixels if isinstance(value, _Array) else value
        )
        for name, value in content.items()
    }


def python_batch(data: bytes, place: str) -> Batch:
    """A batch of the Python version."""
    content = unpickle(data, place)
    pixels, labels = content.get(b"data"), content.get(b"labels")
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape[1:] != (PIXELS,)
        or not isinstance(labels, list)
        or not all(isinstance(label, int) for label in labels)
        or len(labels) != len(pixels)
    ):
        raise RecipeError(
            f"{place}: need data, (N, {PIXELS}) in 8 bits, and a list of N labels. "
            "Download it again"
        )
    return _pictures(pixels), labels


def binary_batch(data: bytes, place: str) -> Batch:
    """A batch of the binary version: of each image its label, a byte, and its pixels."""
    if not data or len(data) % (1 + PIXELS):
        raise RecipeError(
            f"{place}: need {1 + PIXELS} bytes for each image, got {len(data)}. Download it again"
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)
    return _pictures(rows[:, 1:]), rows[:, 0].tolist()


def _pictures(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Red, green and blue planes one after the other -> (N, H, W, 3)"""
    return rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)


@contextmanager
def tar_reader(path: Path) -> Iterator[Read]:
    """Reads from an archive, whatever the folder within; nothing is extracted."""
    with _as_recipe_error(path):
        try:
            archive = tarfile.open(path)  # noqa: SIM115 - closed below
        except tarfile.ReadError as error:
            raise RecipeError(
                f"{path} cannot be read: it is no tar archive, or a broken one. Name "
                f"{PUBLISHED}, downloaded again where it is one of these; any other archive is "
                "unpacked first, and its folder named"
            ) from error
    with archive:
        with _as_recipe_error(path):
            members = {Path(one.name).name: one for one in archive.getmembers() if one.isfile()}

        def read(name: str) -> bytes:
            with _as_recipe_error(path):
                stream = archive.extractfile(members[name]) if name in members else None
                if stream is None:
                    raise RecipeError(f"{path} holds no file {name}. Download it again")
                return stream.read()

        yield read


@contextmanager
def _as_recipe_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path} cannot be read: {reason}. Download it again") from error


@contextmanager
def folder_reader(path: Path) -> Iterator[Read]:
    """Reads from the folder of an extracted archive."""

    def read(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except OSError as error:
            raise RecipeError(
                f"{path / name} cannot be read: {error.strerror}. Extract the archive again"
            ) from error

    yield read


def open_archive(source: Path) -> AbstractContextManager[Read] | None:
    """What reads an archive or its folder; None where ``source`` holds class folders."""
    if source.is_file():
        return tar_reader(source)
    places = (source, source / "cifar-10-batches-py", source / "cifar-10-batches-bin")
    for place in places:
        if (place / "batches.meta").is_file() or (place / "batches.meta.txt").is_file():
            return folder_reader(place)
    if all((source / folder).is_dir() for folder in SPLITS.values()):
        return None
    if archives := sorted(file for file in source.glob("*") if _TAR.search(file.name)):
        raise RecipeError(
            f"{source} holds no images, but {len(archives)} archives, such as {archives[0]}. Name "
            f"the archive itself where it is {PUBLISHED}; unpack others first, into train/<class>/ "
            f"and test/<class>/. In a folder of .tar files: {UNPACK}"
        )
    raise RecipeError(
        f"{source} is none of what is published: name cifar-10-python.tar.gz, "
        "cifar-10-binary.tar.gz, the folder cifar-10-batches-py or cifar-10-batches-bin, or a "
        "folder that holds train/<class>/ and test/<class>/"
    )


def read_archive(read: Read, source: Path) -> tuple[list[str], dict[str, Iterator[Batch]]]:
    """Names of the classes, and for each split its batches, read when they are asked for."""
    try:
        meta, binary = read("batches.meta"), False
    except RecipeError:
        meta, binary = read("batches.meta.txt"), True
    if binary:
        names = meta.decode("utf-8", "replace").split()
    else:
        listed = unpickle(meta, f"{source}: batches.meta").get(b"label_names", [])
        shown = listed if isinstance(listed, list) else []
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in shown]
    if not names or any("/" in name or name.startswith(".") for name in names):
        raise RecipeError(f"{source}: need the names of the classes, got {names}")

    def batches(split: str) -> Iterator[Batch]:
        for name in BATCHES[split]:
            file = f"{name}.bin" if binary else name
            batch = (binary_batch if binary else python_batch)(read(file), f"{source}: {file}")
            if wrong := [label for label in batch[1] if not 0 <= label < len(names)]:
                raise RecipeError(
                    f"{source}: {file}: the label {wrong[0]} is none of 0 to {len(names) - 1}. "
                    "Download it again"
                )
            yield batch

    return names, {split: batches(split) for split in SPLITS}


# --- Images --------------------------------------------------------------------------------------


def write_split(
    name: str, batches: Iterator[Batch], names: Sequence[str], output: Path, source: Path
) -> Split:
    """Write the images of a split that are not there yet."""
    found: list[tuple[Clip, Path]] = []
    for pictures, labels in batches:
        for picture, label in zip(pictures, labels, strict=True):
            shown = f"{names[label]}/{len(found):05}.png"
            path = output / SPLITS[name] / shown
            write_picture(path, picture)
            found.append((Clip(str(source), shown, (shown,), label), path))
    return Split(name, tuple(found), (), "image")


def write_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """A PNG, unless the same picture is there.

    Raises:
        RecipeError: something else is there.
    """
    if not path.exists():
        with written_beside(path) as beside:
            Image.fromarray(picture).save(beside, "PNG")
        return
    try:
        with Image.open(path) as image:
            same = np.array_equal(np.asarray(image), picture)
    except (OSError, SyntaxError):
        same = False
    if not same:
        raise RecipeError(
            f"{path} is there and is another picture than that of the archive. Move the images "
            "away that are there, or name another folder by --output"
        )


def split_of_folders(name: str, images: Videos, classes: Classes) -> Split:
    """The images of class folders."""
    folders = classes.folders(images)
    clips = []
    for file in images.files:
        if file.parent not in folders:
            raise RecipeError(
                f"{file} lies in no folder named like one of the {len(classes.names)} classes of "
                f"{classes.source}. Training and test images must have the same classes"
            )
        shown = folder_and_name(file)
        clips.append(Clip(str(file.parent), shown, (shown,), folders[file.parent]))
    return match(name, clips, images.find, "", "image")


def prepare(options: argparse.Namespace) -> tuple[str, list[Split]]:
    """Write everything, manifests last. Returns the report and the splits."""
    source, output = options.source, options.output.absolute()
    archive = open_archive(source)
    if archive is None:
        images = {
            name: Videos(source / folder, folder_and_name, suffix=options.suffix, kind="image")
            for name, folder in SPLITS.items()
        }
        there = {file.parent.name for file in images["train"].files}
        classes = Classes(sorted(there), str(images["train"].folder))
        splits = [split_of_folders(name, shelf, classes) for name, shelf in images.items()]
        write(output, classes.names, splits)
        return report(output, classes.names, splits, images.values()), splits
    with archive as read:
        names, batches = read_archive(read, source)
        splits = [write_split(name, batches[name], names, output, source) for name in SPLITS]
    write(output, names, splits)
    return report(output, names, splits, []), splits


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="the archive, or a folder; see README.md"
    )
    return run_recipe(parser, arguments, prepare, beside=__file__, kind="image")


if __name__ == "__main__":
    sys.exit(main())
