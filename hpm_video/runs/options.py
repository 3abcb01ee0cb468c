"""Options that the programs for trained models share, and what they lead to."""

import argparse

from hpm_video.config.checks import ConfigError
from hpm_video.data.loader import default_workers
from hpm_video.recognition.inference import Inference, Reading
from hpm_video.recognition.trained_model import ClipChoice, TrainedModel
from hpm_video.runs.console import add_options, positive
from hpm_video.training.device import choose_device, inference_precision


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose clips."""
    add = parser.add_argument
    add("--num-frames", type=positive, metavar="T", help="of a clip; default: as it was trained")
    add("--frame-stride", type=positive, metavar="FRAMES", help="default: as it was trained")
    add("--frame-size", type=positive, nargs=2, metavar=("H", "W"), help="likewise")


def clip_choice(arguments: argparse.Namespace) -> ClipChoice:
    """Return the clips that were chosen."""
    size = arguments.frame_size
    return ClipChoice(arguments.num_frames, arguments.frame_stride, tuple(size) if size else None)


def check_stride(trained: TrainedModel, arguments: argparse.Namespace) -> None:
    """Make sure that a frame stride that was given plays a part.

    Raises:
        ConfigError: the clips are of segments, and have none.
    """
    if arguments.frame_stride and trained.data.sampling == "segments":
        raise ConfigError(
            f"{trained.path} was trained on clips that span the whole video "
            f"(data.sampling=segments), where --frame-stride plays no part; leave it out"
        )


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where and how is computed."""
    workers = {"default": default_workers()}
    add_options(parser, "device", "precision", "decoder", workers=workers)


def load_inference(
    trained: TrainedModel, arguments: argparse.Namespace, processes: int = 1
) -> Inference:
    """Build a model where and as the arguments say."""
    device = choose_device(arguments.device, processes)
    precision = arguments.precision
    return Inference.load(
        trained, device, inference_precision(device) if precision == "auto" else precision
    )


def reading_of(arguments: argparse.Namespace, *, exclude_bad_files: bool = False) -> Reading:
    """Return how videos are read."""
    return Reading(arguments.decoder, arguments.workers, exclude_bad_files)
