"""What the programs for trained models share: their options, and the model that these choose."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpm_video.runs.console import add_options, positive

if TYPE_CHECKING:
    from hpm_video.data.manifest import Manifest
    from hpm_video.data.reading import Views
    from hpm_video.recognition.inference import Inference, Reading
    from hpm_video.recognition.trained_model import ClipChoice, Trained, TrainedClassifier


def add_model_options(
    parser: argparse.ArgumentParser,
    checkpoint: str,
    weights: Sequence[str],
    *,
    weights_help: str = "default: those that the run tested",
    default_weights: str | None = None,
) -> None:
    """Add a checkpoint, the choice of its weights and of clips, and where and how it runs."""
    add = parser.add_argument
    add("checkpoint", type=Path, help=f"{checkpoint}, or a run, for its last checkpoint")
    add("--weights", choices=weights, default=default_weights, help=weights_help)
    add("--num-frames", type=positive, metavar="T", help="frames per clip; default: as in training")
    stride = "frames of the video from one frame of a clip to the next; default: as in training"
    add("--frame-stride", type=positive, metavar="FRAMES", help=stride)
    size = "height and width of a clip in pixels; default: as in training"
    add("--frame-size", type=positive, nargs=2, metavar=("H", "W"), help=size)
    add_options(parser, "device", "precision", "decoder", "workers")


def clip_choice(arguments: argparse.Namespace) -> ClipChoice:
    """Return which clips the model is to see."""
    from hpm_video.recognition.trained_model import ClipChoice

    size = arguments.frame_size
    return ClipChoice(arguments.num_frames, arguments.frame_stride, tuple(size) if size else None)


def open_inference(
    arguments: argparse.Namespace, wanted: type[Trained], processes: int = 1, *, windows: int = 0
) -> tuple[Trained, Inference]:
    """Open the checkpoint that the arguments name, and build its model on their device.

    ``windows``: frames from one clip to the next, where the clips are windows over whole videos.
    """
    from hpm_video.config.checks import ConfigError
    from hpm_video.recognition.inference import Inference
    from hpm_video.recognition.trained_model import open_trained
    from hpm_video.training.device import choose_device, inference_precision

    clips = clip_choice(arguments)
    trained = open_trained(arguments.checkpoint, wanted, arguments.weights, clips=clips)
    if trained.data.sampling == "segments" and bool(clips.frame_stride) != bool(windows):
        remedy = "give --frame-stride for windows" if windows else "leave out --frame-stride"
        raise ConfigError(
            f"{trained.path} has data.sampling=segments, which has no stride; {remedy}"
        )
    device, precision = choose_device(arguments.device, processes), arguments.precision
    chosen = inference_precision(device) if precision == "auto" else precision
    return trained, Inference.load(trained, device, chosen)


def open_classifier(
    arguments: argparse.Namespace, manifest: Manifest, processes: int = 1
) -> tuple[TrainedClassifier, Inference, Views, str]:
    """Open the classifier that the arguments name. -> with the views, and the pass in words"""
    from hpm_video.data.clips import decoder_for
    from hpm_video.data.reading import Views
    from hpm_video.recognition.inference import describe_pass
    from hpm_video.recognition.trained_model import TrainedClassifier

    decoder_for(arguments.decoder, manifest)
    trained, classifier = open_inference(arguments, TrainedClassifier, processes)
    test = trained.config.test
    views = Views(*arguments.views or (test.clips, test.crops))
    return trained, classifier, views, describe_pass(len(manifest), views, trained, classifier)


def reading_of(arguments: argparse.Namespace, *, exclude_bad_files: bool = False) -> Reading:
    """Return how videos are read."""
    from hpm_video.recognition.inference import Reading
    from hpm_video.workers.room import default_workers

    workers = default_workers() if arguments.workers is None else arguments.workers
    return Reading(arguments.decoder, workers, exclude_bad_files)
