"""Features of many videos, written into a folder."""

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.config.choices import DecoderChoice
from hpm_video.data.clip_stream import Part, stream_parts
from hpm_video.data.loader import end_workers
from hpm_video.data.reading import Views
from hpm_video.files.failures import BadFiles, Failure
from hpm_video.files.weights import CheckpointError
from hpm_video.recognition.feature_folder import DType, FeatureFolder, Form, GrowingFile
from hpm_video.recognition.inference import FILE_OF, Extractor, WeightsOf
from hpm_video.training.checkpoint import weights_digest
from hpm_video.workers.progress_bar import ProgressBar


@dataclass(frozen=True)
class Wanted:
    """What is wanted of each video."""

    views: Views
    tokens: bool = False
    """Every token of the last layer, instead of one vector for each view."""
    dtype: DType = "float32"

    def form(self, extractor: Extractor) -> Form:
        """What the file of a video then holds."""
        shape = extractor.model.shape
        of_view = (shape.grid.num_tokens, shape.size.dim) if self.tokens else (shape.size.dim,)
        return Form(of_view, self.dtype, windows=self.views.every is not None)


def describe(
    extractor: Extractor, checkpoint: Path, weights: WeightsOf, wanted: Wanted
) -> dict[str, Any]:
    """Everything that decides about features, for the settings of a folder."""
    spec, views = extractor.spec, wanted.views
    return {
        "checkpoint": str(checkpoint.resolve()),
        "weights": weights,
        "weights_sha256": weights_digest(checkpoint, FILE_OF.get(weights, weights)),
        **(
            {"window_stride": views.every}
            if views.every is not None
            else {"clips": views.clips, "crops": views.crops}
        ),
        "features": "tokens" if wanted.tokens else "pooled",
        "dtype": wanted.dtype,
        "view_shape": list(wanted.form(extractor).view_shape),
        "num_frames": spec.num_frames,
        "frame_stride": spec.frame_stride,
        "frame_size": list(spec.frame_size),
        "sampling": spec.sampling,
        "mean": list(extractor.mean),
        "std": list(extractor.std),
        "device": extractor.device.type,
        "precision": extractor.precision,
    }


def extract(
    extractor: Extractor,
    wanted: Wanted,
    folder: FeatureFolder,
    *,
    decoder: DecoderChoice = "auto",
    workers: int = 0,
) -> list[Failure]:
    """Compute what ``folder``, which was claimed, lacks. -> the videos that do not decode

    The clips of a forward pass are of one video, so that the last bit of its features does not
    depend on which other videos are computed.
    """
    places = folder.missing()
    stream = stream_parts(
        folder.manifest,
        places,
        replace(extractor.spec, decoder=decoder),
        wanted.views,
        clips_per_part=extractor.clips_per_pass,
        workers=min(workers, len(places)),
    )
    bad = BadFiles(folder.bad_files, num_files=len(folder.manifest), max_bad_share=1.0)
    failures: list[Failure] = []
    try:
        with (
            closing(ProgressBar(len(places), "videos", "clips/s")) as bar,
            closing(_Writer(extractor, wanted, folder)) as writer,
            closing(stream) as parts,
        ):
            for place, part in parts:
                if isinstance(part, Failure):
                    failures.append(part)
                    bad.note([part])
                    writer.give_up(place)
                    bar.advance(0)
                else:
                    bar.advance(len(part.clips), is_last=writer.take(place, part))
    finally:
        end_workers()
        folder.write_index()
    return sorted(failures, key=lambda failure: failure.path)


class _Writer:
    """Turns parts of videos into files of features."""

    def __init__(self, extractor: Extractor, wanted: Wanted, folder: FeatureFolder) -> None:
        self._values = extractor.tokens if wanted.tokens else extractor.pooled
        self._dtype = wanted.dtype
        self._folder = folder
        self._growing: dict[int, GrowingFile] = {}

    def give_up(self, place: int) -> None:
        """Throw away what there is of a video."""
        if place in self._growing:
            self._growing.pop(place).give_up()

    def take(self, place: int, part: Part) -> bool:
        """Write the features of a part. -> whether it is the last of its video"""
        features = self._features(place, part)
        if place not in self._growing:
            self._growing[place] = self._folder.begin(place, part.num_views)
        growing = self._growing[place]
        growing.add(features, part.starts)
        if growing.views < part.num_views:
            return False
        self._folder.finish(place, growing, part.num_frames)
        del self._growing[place]
        return True

    def _features(self, place: int, part: Part) -> NDArray[np.floating[Any]]:
        values: Tensor = self._values(part.clips).cpu()
        features: NDArray[np.floating[Any]] = values.to(getattr(torch, self._dtype)).numpy()
        if not np.isfinite(features).all():
            raise CheckpointError(
                f"features of {self._folder.manifest.files[place]} reach "
                f"{values.abs().max():g}, and {self._dtype} ends at {np.finfo(self._dtype).max}; "
                f"take --dtype float32 and --precision fp32"
            )
        return features

    def close(self) -> None:
        """Throw away what is not whole."""
        for growing in self._growing.values():
            growing.give_up()
