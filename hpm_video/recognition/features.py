"""Extraction of the features of many videos into a folder."""

from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpm_video.config.choices import DecoderChoice
from hpm_video.data.loader import Part, end_workers, stream_parts
from hpm_video.data.reading import Views
from hpm_video.files.failures import BadFiles, Failure
from hpm_video.files.weights import CheckpointError
from hpm_video.recognition.feature_folder import DType, FeatureFolder, FileLayout, GrowingFile
from hpm_video.recognition.inference import Inference
from hpm_video.recognition.trained_model import TrainedModel
from hpm_video.workers.progress_bar import ProgressBar


@dataclass(frozen=True)
class FeatureChoice:
    """Which features are extracted of each video."""

    views: Views
    tokens: bool = False
    """All tokens of the last layer, instead of one vector for each view."""
    dtype: DType = "float32"

    def layout(self, encoder: Inference) -> FileLayout:
        """Return the layout of the file of a video."""
        tokens, dim = encoder.model.grid.num_tokens, encoder.model.settings.encoder.dim
        of_view = (tokens, dim) if self.tokens else (dim,)
        return FileLayout(of_view, self.dtype, windows=self.views.every is not None)


def describe(trained: TrainedModel, encoder: Inference, choice: FeatureChoice) -> dict[str, Any]:
    """Return everything that determines features, for the settings of a folder."""
    data, views = encoder.data, choice.views
    if views.every is not None:
        chosen: dict[str, Any] = {"window_stride": views.every}
    else:
        chosen = {"clips": views.clips, "crops": views.crops}
    return {
        **trained.describe(),
        **chosen,
        "checkpoint": str(trained.path.resolve()),
        "features": "tokens" if choice.tokens else "pooled",
        "dtype": choice.dtype,
        "view_shape": list(choice.layout(encoder).view_shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "device": encoder.device.type,
        "precision": encoder.precision,
    }


def extract(
    encoder: Inference,
    choice: FeatureChoice,
    folder: FeatureFolder,
    *,
    decoder: DecoderChoice = "auto",
    workers: int = 0,
) -> list[Failure]:
    """Compute the features that a claimed folder lacks. -> the videos that do not decode

    The clips of a forward pass are of one video, so that the last bit of its features does not
    depend on which other videos are computed.
    """
    places = folder.missing()
    stream = stream_parts(
        folder.manifest,
        places,
        replace(encoder.data, decoder=decoder),
        choice.views,
        clips_per_part=encoder.clips_per_pass,
        workers=min(workers, len(places)),
    )
    bad = BadFiles(folder.bad_files, num_files=len(folder.manifest), max_bad_share=1.0)
    failures: list[Failure] = []
    growing: dict[int, GrowingFile] = {}
    try:
        with closing(ProgressBar(len(places), "videos", "clips/s")) as bar, closing(stream):
            for place, part in stream:
                if isinstance(part, Failure):
                    failures.append(part)
                    bad.note([part])
                    if place in growing:
                        growing.pop(place).close(complete=False)
                    bar.advance(0)
                    continue
                features = _features(encoder, choice, part, folder.manifest.files[place])
                if place not in growing:
                    growing[place] = folder.begin(place, part.num_views)
                growing[place].add(features, part.starts)
                is_last = growing[place].views == part.num_views
                if is_last:
                    folder.finish(place, growing.pop(place), part.num_frames)
                bar.advance(len(part.clips), is_last=is_last)
    finally:
        for unfinished in growing.values():
            unfinished.close(complete=False)
        end_workers()
        folder.write_index()
    return sorted(failures, key=lambda failure: failure.path)


def _features(
    encoder: Inference, choice: FeatureChoice, part: Part, video: str
) -> NDArray[np.floating[Any]]:
    values = (encoder.tokens if choice.tokens else encoder.pooled)(part.clips).cpu()
    features: NDArray[np.floating[Any]] = values.to(getattr(torch, choice.dtype)).numpy()
    if not np.isfinite(features).all():
        raise CheckpointError(
            f"features of {video} reach {values.abs().max():g}, and {choice.dtype} ends at "
            f"{np.finfo(choice.dtype).max}; take --dtype float32 and --precision fp32"
        )
    return features
