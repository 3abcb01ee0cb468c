"""Features of many videos, extracted into a folder with a file for each video.

A folder of features holds
    features/NAME.npy   of one video: (views, D), or with tokens (views, N, D)
    starts/NAME.npy     of windows: (views,) int64, the first frame of each
    index.csv           of each video its path, file, label, frames and views; it is a manifest too
    settings.json       what determines the features: a folder never mixes two settings
    journal.jsonl       a line for each video that is done; a second start goes on from there
    bad_files.csv       videos that do not decode, and why
Files of features are complete or absent, and those that are there need not be computed again.
"""

import contextlib
import hashlib
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hpm_video.config.choices import DecoderChoice
from hpm_video.data.loader import Part, stream_parts
from hpm_video.data.manifest import Manifest
from hpm_video.data.reading import Views
from hpm_video.files.atomic import written_beside
from hpm_video.files.failures import BadFiles, Failure
from hpm_video.files.weights import CheckpointError
from hpm_video.preparation.jobs import claim, write_table
from hpm_video.recognition.inference import Inference
from hpm_video.recognition.trained_model import TrainedModel
from hpm_video.workers.progress_bar import ProgressBar

DType = Literal["float32", "float16"]
UNRELATED = ("hpm_video", "checkpoint", "device", "decoder")
"""Settings that are recorded, but may differ between the starts of one folder."""
LONGEST_NAME = 150
UNSAFE = re.compile(r"[^A-Za-z0-9._/-]")
COLUMNS = ("path", "file", "label", "label_name", "num_frames", "views")


@dataclass(frozen=True)
class Layout:
    """Which features are extracted of each video, and how a file holds them."""

    views: Views
    tokens: bool  # all tokens of the last layer, instead of one vector for each view
    dtype: DType
    view_shape: tuple[int, ...]  # (D,), or with tokens (N, D)

    @classmethod
    def of(cls, encoder: Inference, views: Views, dtype: DType, *, tokens: bool) -> "Layout":
        shape = (encoder.model.grid.num_tokens,) * tokens + (encoder.model.settings.encoder.dim,)
        return cls(views, tokens, dtype, shape)

    @property
    def windows(self) -> bool:
        """Whether the first frames of the views are written down too."""
        return self.views.every is not None


def describe(trained: TrainedModel, encoder: Inference, layout: Layout) -> dict[str, Any]:
    """Return everything that determines features, for the settings of a folder."""
    data, views = encoder.data, layout.views
    chosen: dict[str, Any] = {"clips": views.clips, "crops": views.crops}
    if layout.windows:
        chosen = {"window_stride": views.every}
    return {
        **trained.describe(),
        **chosen,
        "checkpoint": str(trained.path.resolve()),
        "features": "tokens" if layout.tokens else "pooled",
        "dtype": layout.dtype,
        "view_shape": list(layout.view_shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "device": encoder.device.type,
        "precision": encoder.precision,
    }


def extract(
    encoder: Inference,
    folder: "FeatureFolder",
    *,
    decoder: DecoderChoice = "auto",
    workers: int = 0,
) -> list[Failure]:
    """Compute the features that a claimed folder lacks. -> the videos that do not decode

    The clips of a pass are of one video, so that its features do not depend on others by a bit.
    """
    places, layout = folder.missing(), folder.layout
    stream = stream_parts(
        folder.manifest,
        places,
        replace(encoder.data, decoder=decoder),
        layout.views,
        clips_per_part=encoder.clips_per_pass,
        workers=min(workers, len(places)),
    )
    bad = BadFiles(folder.bad_files, num_files=len(folder.manifest), max_bad_share=1.0)
    growing: dict[int, GrowingFile] = {}
    try:
        with closing(ProgressBar(len(places), "videos", "clips/s")) as bar, closing(stream):
            for place, part in stream:
                if isinstance(part, Failure):
                    bad.note([part])
                    if place in growing:
                        growing.pop(place).close(complete=False)
                    bar.advance(0)
                    continue
                features = _features(encoder, layout, part, folder.manifest.files[place])
                if place not in growing:
                    path = folder.features_of(folder.manifest.files[place])
                    growing[place] = GrowingFile(path, part.num_views, layout)
                growing[place].add(features, part.frames[:, 0])
                if is_last := growing[place].views == part.num_views:
                    folder.finish(place, growing.pop(place), part.num_frames)
                bar.advance(len(part.clips), is_last=is_last)
    finally:
        for unfinished in growing.values():
            unfinished.close(complete=False)
        folder.write_index()
    return sorted(bad.failures.values(), key=lambda failure: failure.path)


def _features(
    encoder: Inference, layout: Layout, part: Part, video: str
) -> NDArray[np.floating[Any]]:
    values = (encoder.tokens if layout.tokens else encoder.pooled)(part.clips).cpu()
    features: NDArray[np.floating[Any]] = values.to(getattr(torch, layout.dtype)).numpy()
    if not np.isfinite(features).all():
        raise CheckpointError(
            f"features of {video} reach {values.abs().max():g}, and {layout.dtype} ends at "
            f"{np.finfo(layout.dtype).max}; take --dtype float32 and --precision fp32"
        )
    return features


class FeatureFolder:
    """A folder with features of the videos of a manifest."""

    def __init__(self, path: Path, manifest: Manifest, base: Path, layout: Layout) -> None:
        """``base``: files are named by the paths of videos from there on."""
        self.path = path
        self.bad_files = path / "bad_files.csv"
        self.manifest = manifest
        self.layout = layout
        self._names = file_names(manifest.files, base)
        self._entries: dict[str, tuple[int, int]] = {}  # frames and views of each that is done

    def __len__(self) -> int:
        """Videos whose features are there."""
        return len(self._entries)

    def features_of(self, video: str) -> Path:
        return self.path / "features" / f"{self._names[video]}.npy"

    def starts_of(self, video: str) -> Path:
        return self.path / "starts" / f"{self._names[video]}.npy"

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Lock the folder for these settings as :func:`jobs.claim`, and find what is there."""
        self._journal = claim(self.path, settings, holds="features", unrelated=UNRELATED)
        self.close = weakref.finalize(self, self._journal.close)
        self.bad_files.unlink(missing_ok=True)  # they are tried again
        for record in self._journal.read():
            with contextlib.suppress(KeyError, TypeError, ValueError):  # of something else
                video, views = record["path"], int(record["views"])
                if video in self._names and self._is_there(video, views):
                    self._entries[video] = int(record["num_frames"]), views
        self.write_index()

    def missing(self) -> list[int]:
        """Return the positions in the manifest of videos without features, each video once."""
        first = {video: place for place, video in reversed([*enumerate(self.manifest.files)])}
        return sorted(place for video, place in first.items() if video not in self._entries)

    def finish(self, place: int, growing: "GrowingFile", num_frames: int) -> None:
        video = self.manifest.files[place]
        if self.layout.windows:
            with written_beside(self.starts_of(video)) as beside:
                np.save(beside, np.concatenate(growing.starts))
        growing.close(complete=True)
        self._entries[video] = num_frames, growing.views
        self._journal.append({"path": video, "num_frames": num_frames, "views": growing.views})

    def write_index(self) -> None:
        """Write ``index.csv`` in the order of the manifest."""
        rows: list[list[object]] = []
        names = self.manifest.label_names or ()
        for video, label in zip(self.manifest.files, self.manifest.labels, strict=True):
            if video in self._entries:
                name = names[label] if 0 <= label < len(names) else ""
                file = f"{self._names[video]}.npy"
                rows.append([video, f"features/{file}", label, name, *self._entries[video]])
                rows[-1] += [f"starts/{file}"] * self.layout.windows
        header = [*COLUMNS, *["starts"] * self.layout.windows]
        write_table(self.path / "index.csv", header, rows)

    def _is_there(self, video: str, views: int) -> bool:
        """Whether the arrays are there; a file that is cut short does not map."""
        try:
            features = np.load(self.features_of(video), mmap_mode="r")
            starts = np.load(self.starts_of(video)) if self.layout.windows else range(views)
        except (OSError, ValueError, EOFError):
            return False
        found = features.shape, str(features.dtype), len(starts)
        return found == ((views, *self.layout.view_shape), self.layout.dtype, views)


class GrowingFile:
    """The features of one video, written part by part; the file appears when it is complete."""

    def __init__(self, path: Path, views: int, layout: Layout) -> None:
        self._stack = ExitStack()
        beside = self._stack.enter_context(written_beside(path))
        self._file = self._stack.enter_context(beside.open("wb"))
        shape = (views, *layout.view_shape)
        header = {"descr": np.dtype(layout.dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self.starts: list[NDArray[np.int64]] = []
        self.views = 0

    def add(self, features: NDArray[np.floating[Any]], starts: NDArray[np.int64]) -> None:
        """Append the features of some views: (R, ...) and (R,)"""
        self._file.write(features.tobytes())
        self.starts.append(starts)
        self.views += len(features)

    def close(self, *, complete: bool) -> None:
        """Move the file to its place, or leave nothing behind."""
        stop = None if complete else InterruptedError()
        self._stack.__exit__(type(stop) if stop else None, stop, None)


def file_names(files: Iterable[str], base: Path) -> dict[str, str]:
    """Return a file name for each video that no other video has: its path from ``base`` on.

    Where that will not do (odd characters, too many characters, or another path that differs only
    in capitals) a part of the digest of the path follows.
    """
    start = str(base).rstrip("/") + "/"
    paths = {file: str(Path(file)).removeprefix(start) for file in files}
    alike = Counter(path.casefold() for path in paths.values())
    names = {}
    for file, path in paths.items():
        name = UNSAFE.sub("_", path).replace("/", "+")
        is_same = name.replace("+", "/") == path
        if not is_same or len(name) > LONGEST_NAME or alike[path.casefold()] > 1:
            mark = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:10]
            name = f"{name[-LONGEST_NAME:]}-{mark}"
        names[file] = name
    return names
