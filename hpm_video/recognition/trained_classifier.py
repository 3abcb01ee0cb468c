"""A trained classifier that is put to use: probabilities of clips, tests on videos."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hpm_video.config.loading import load_config
from hpm_video.config.schema import FinetuneConfig
from hpm_video.data.manifest import Manifest
from hpm_video.data.reading import Views
from hpm_video.files.weights import CheckpointError, load_weights
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.from_config import build_classifier, source_grid_of
from hpm_video.recognition.inference import ClipChoice, Extractor, Reading, WeightsOf
from hpm_video.recognition.labels import check_labels, check_same_names, read_label_names
from hpm_video.recognition.testing import Scores
from hpm_video.training.checkpoint import read_state, read_weights, weights_digest
from hpm_video.training.device import Precision
from hpm_video.training.distributed import Processes

CLASSIFIER = ("model", "average")


@dataclass(frozen=True)
class Recogniser(Extractor):
    """A classifier, ready for clips."""

    label_names: tuple[str, ...] = ()

    def probabilities(self, clips: Tensor) -> Tensor:
        """Softmax over the classes: (B, C, T, H, W) uint8 on any device -> (B, classes) float32"""
        return self._in_passes(self.model, clips).softmax(dim=-1)

    def score(
        self, manifest: Manifest, views: Views, reading: Reading, processes: Processes
    ) -> Scores:
        """What it says of every video of a manifest, each scored once by one of the processes.

        Raises:
            BadTestFilesError: videos do not decode, and are not to be excluded.
            ManifestError: a video has no label, or one that the classifier does not know.
        """
        check_labels(manifest, len(self.label_names), "the videos of the test")
        check_same_names(self.label_names, manifest)
        return Scores(
            manifest,
            self._over_videos(self.probabilities, manifest, views, reading, processes),
        )


def describe_test(
    checkpoint: Path,
    config: FinetuneConfig,
    recogniser: Recogniser,
    manifest: Manifest,
    views: Views,
) -> dict[str, Any]:
    """Everything that decides about the result of a test. ``config`` names the weights."""
    spec, weights = recogniser.spec, config.test.weights
    return {
        "update": read_state(checkpoint)["update"],
        "weights": weights,
        "weights_sha256": weights_digest(checkpoint, weights),
        "videos_sha256": manifest.digest,
        "clips": views.clips,
        "crops": views.crops,
        "num_frames": spec.num_frames,
        "sampling": spec.sampling,
        "frame_stride": spec.frame_stride,
        "frame_size": list(spec.frame_size),
        "short_side": spec.held_out_short_side,
        "interpolation": spec.interpolation,
        "precision": recogniser.precision,
    }


def load_recogniser(
    checkpoint: Path,
    device: torch.device,
    precision: Precision,
    *,
    weights: WeightsOf | None = None,
    clips: ClipChoice = ClipChoice(),  # noqa: B008 - it is frozen
) -> tuple[FinetuneConfig, Recogniser]:
    """A classifier and its config out of a checkpoint folder of a fine-tuning run.

    The weights are by default those that the config tests (``test.weights``), and are named in the
    config that is returned.

    Raises:
        ConfigError, CheckpointError: the folder is not a whole checkpoint of such a run.
    """
    if not (checkpoint / "labels.txt").is_file():
        raise CheckpointError(
            f"{checkpoint} is no checkpoint of a classifier (it has no labels.txt). Where it is of "
            f"pre-training, train a classifier on it first:\n"
            f"  ./run_finetune.sh CONFIG init_weights={checkpoint}\n"
            f"(see configs/README.md), and give RUN/checkpoints/last of that run"
        )
    config = load_config(FinetuneConfig, checkpoint / "config.yaml", [])
    chosen = config.test.weights if weights is None else _of_classifier(weights)
    if not (checkpoint / f"{chosen}.safetensors").is_file():
        there = [name for name in CLASSIFIER if (checkpoint / f"{name}.safetensors").is_file()]
        raise CheckpointError(
            f"{checkpoint} has no weights of {chosen!r}; take --weights {' or '.join(there)}"
        )
    config = replace(
        config,
        test=replace(config.test, weights=chosen),
        data=clips.of(config.data),
        model=replace(config.model, pretrained_grid=source_grid_of(config)),
    )
    names = read_label_names(checkpoint / "labels.txt")
    model = build_classifier(config, len(names))
    load_weights(model, read_weights(checkpoint, chosen), checkpoint)
    return config, recogniser_of(config, model.to(device).eval(), names, device, precision)


def _of_classifier(weights: WeightsOf) -> Literal["model", "average"]:
    """The same name, if a classifier may have such weights."""
    if weights == "model" or weights == "average":
        return weights
    raise CheckpointError(f"a classifier has no weights of {weights!r}; take model or average")


def recogniser_of(
    config: FinetuneConfig,
    model: ClipClassifier,
    label_names: Sequence[str],
    device: torch.device,
    precision: Precision,
) -> Recogniser:
    """A model, which is on ``device``, with what the config says of its clips."""
    return Recogniser(
        model,
        config.data,
        config.data.mean,
        config.data.std,
        device,
        precision,
        config.test.clips_per_pass,
        tuple(label_names),
    )
