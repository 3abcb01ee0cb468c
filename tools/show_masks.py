"""Draw where a video or an image is hard: python tools/show_masks.py CHECKPOINT FILE.

The paper's Figure 2, also for video: input, true error averaged over random masks, difficulty that
the teacher predicts, a mask drawn from it, and the reconstruction.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hpm_video.config.checks import ConfigError
from hpm_video.config.data import DataConfig
from hpm_video.runs import console

if TYPE_CHECKING:
    from hpm_video.data.batch import ClipBatch

FRAMES_PER_SECOND = 3  # of an animation


def main(command_line: Sequence[str] | None = None) -> int:
    """Draw, and report what was written."""
    parser = console.make_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="checkpoint folder of a pre-training run")
    add("video", type=Path, help="a video or an image")
    add("--source", default="", help="source, if the run mixes several; default: the main one")
    of_target = "weights of the model whose features are the target; default: as in the run"
    add("--feature-weights", type=Path, metavar="PATH", help=of_target)
    start = "first frame, from 0; default: a middle clip"
    add("--start", type=console.not_negative, metavar="FRAME", help=start)
    stride = "frames of the video from one frame of the clip to the next; default: the run's"
    add("--frame-stride", "--stride", type=console.positive, metavar="FRAMES", help=stride)
    masks = "masks that the true error is averaged over (default 10)"
    add("--masks", type=console.positive, default=10, metavar="N", help=masks)
    hard = "share of the hidden patches picked by difficulty; default: as at the end of the run"
    add("--hard-fraction", type=float, metavar="SHARE", help=hard)
    blind = "estimate mean and contrast of hidden patches from visible ones, not from the input"
    add("--without-ground-truth", action="store_true", help=blind)
    add("--animation", choices=("mp4", "none"), default="mp4", help="its format (default mp4)")
    output = {"default": Path("pictures"), "help": "folder to write to (default pictures)"}
    console.add_options(parser, "device", "decoder", output=output)
    arguments = parser.parse_args(command_line)
    return console.run(lambda: show_masks(arguments))


def show_masks(arguments: argparse.Namespace) -> None:
    """Write the requested pictures."""
    from hpm_video.mining import pictures
    from hpm_video.mining.study import study_clips
    from hpm_video.preparation.encode import write_video
    from hpm_video.runs.pretraining import load_run
    from hpm_video.training.device import choose_device

    if not arguments.video.is_file():
        raise ConfigError(f"{arguments.video} is not a file; name a video or an image")
    if not 0 <= (arguments.hard_fraction or 0) <= 1:
        raise ConfigError(f"--hard-fraction must lie in [0, 1], got {arguments.hard_fraction}")
    device = choose_device(arguments.device)
    weights = arguments.feature_weights
    overrides = [] if weights is None else [f"mining.feature_weights={weights}"]
    config, student, objective = load_run(arguments.checkpoint, device, overrides)
    if arguments.source not in config.sources:
        mixed = ", ".join(name for name in config.sources if name)
        rule = f"must be one of {mixed}" if mixed else "is for runs that mix sources"
        raise ConfigError(f"--source {arguments.source} {rule}; leave it out for the main source")
    batch, moments = read_clip(arguments, config.sources[arguments.source])
    (study,) = study_clips(
        objective,
        student,
        batch.to(device),
        num_masks=arguments.masks,
        hard_fraction=arguments.hard_fraction,
        ground_truth_statistics=not arguments.without_ground_truth,
    )
    name = arguments.video.stem + (f"-{arguments.source}" if arguments.source else "")
    name += "-without-ground-truth" if arguments.without_ground_truth else ""
    path, film = (arguments.output / f"{name}.{suffix}" for suffix in ("png", "mp4"))
    if any(each.exists() and each.samefile(arguments.video) for each in (path, film)):
        raise ConfigError(
            f"a picture would overwrite {arguments.video} itself; name another folder: --output"
        )
    title = f"{arguments.checkpoint}, {arguments.video.name}"
    pictures.save_sheet(pictures.draw_sheet(study, title=title, moments=moments), path)
    print(f"wrote {path}")
    if arguments.animation == "mp4" and study.grid.time > 1:
        sheets = pictures.draw_animation(study, title=title, moments=moments)
        write_video(film, sheets, fps=FRAMES_PER_SECOND)
        print(f"wrote {film}")


def read_clip(arguments: argparse.Namespace, data: DataConfig) -> tuple["ClipBatch", list[str]]:
    """Read the clip that the arguments name, as a batch of one. -> with the name of each frame

    Another process decodes it, with limits of time and memory.
    """
    import torch

    from hpm_video.data.batch import ClipBatch
    from hpm_video.data.loader import stream_parts
    from hpm_video.data.manifest import NOT_STATED, UNLABELLED, Manifest
    from hpm_video.data.reading import Views
    from hpm_video.decoding.reader import DecodeError
    from hpm_video.files.failures import Failure
    from hpm_video.randomness import key_of

    path, views = str(arguments.video), Views(first=arguments.start)
    data = replace(data, sampling="dense", max_frame_stride=None, decoder=arguments.decoder)
    if arguments.frame_stride:
        data = replace(data, frame_stride=arguments.frame_stride, fps=None)
    one = Manifest((path,), (UNLABELLED,), (NOT_STATED,))
    ((_, part),) = stream_parts(one, [0], data, views, clips_per_part=1, workers=1)
    if isinstance(part, Failure):
        raise DecodeError(part.reason, path)
    moments = [f"frame {index}" for index in part.frames[0]]
    keys = torch.tensor([key_of("show masks", arguments.video.name)])
    labels = torch.tensor([UNLABELLED])
    return ClipBatch(part.clips, keys, labels, (path,), (), arguments.source), moments


if __name__ == "__main__":
    sys.exit(main())
