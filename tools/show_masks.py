"""Draw where a video or an image is hard: python tools/show_masks.py CHECKPOINT FILE.

The paper's Figure 2, for video too: input, true error averaged over random masks, difficulty that
the teacher predicts, a mask drawn from it, and the reconstruction.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hpm_video.config.data import DataConfig
from hpm_video.data.batch import ClipBatch
from hpm_video.data.sampling import train_indices, view_indices
from hpm_video.data.transforms import held_out_crops
from hpm_video.decoding.registry import DecodeError, DecoderError, decoder_choices, open_video
from hpm_video.files.weights import CheckpointError
from hpm_video.mining.pictures import draw_animation, draw_sheet, save_animation, save_sheet
from hpm_video.mining.study import study_clips
from hpm_video.randomness import key_of
from hpm_video.runs.pretraining import load_run
from hpm_video.training.device import choose_device

EXPECTED = (CheckpointError, DecodeError, DecoderError, OSError, ValueError)
ANIMATIONS = {"gif": (".gif",), "mp4": (".mp4",), "both": (".gif", ".mp4"), "none": ()}


def main(command_line: Sequence[str] | None = None) -> int:
    """Draw, and say what was written."""
    arguments = parse_arguments(command_line)
    try:
        written = show_masks(arguments)
    except EXPECTED as error:
        print(f"error: {shorten(str(error))}", file=sys.stderr)
        return 2
    for path in written:
        print(f"wrote {path}")
    return 0


def parse_arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Draw what is hard, and what is hidden")
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder of a pre-training run")
    parser.add_argument("video", type=Path, help="a video or an image")
    parser.add_argument(
        "--source", default="", help="of the run, where it mixes several; default: the main one"
    )
    parser.add_argument(
        "--feature-weights",
        type=Path,
        help="of the model whose features were the target; default: as in the run",
    )
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="folder to write to")
    parser.add_argument("--start", type=int, help="first frame, from 0; default: a middle clip")
    parser.add_argument(
        "--stride", type=int, help="frames from one to the next; default: the run's"
    )
    parser.add_argument(
        "--masks", type=int, default=10, help="masks that the error is averaged over"
    )
    parser.add_argument(
        "--hard-fraction",
        type=float,
        help="share of the hidden patches picked by difficulty; default: as at the end of the run",
    )
    parser.add_argument(
        "--without-ground-truth",
        action="store_true",
        help="estimate mean and contrast of hidden patches from visible ones, not from the input",
    )
    parser.add_argument("--animation", choices=ANIMATIONS, default="gif")
    parser.add_argument("--fps", type=float, default=6, help="of the animation")
    parser.add_argument("--decoder", choices=decoder_choices(), default="auto")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(command_line)


def show_masks(arguments: argparse.Namespace) -> list[Path]:
    """Write the pictures that are asked for. -> their paths

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be used.
        DecodeError, DecoderError: the video cannot be read.
        ValueError: an argument is out of range.
    """
    if not arguments.video.is_file():
        raise ValueError(f"there is no video {arguments.video}")
    if arguments.fps <= 0:
        raise ValueError(f"--fps must be positive, got {arguments.fps:g}")
    device = choose_device(arguments.device)
    moved = arguments.feature_weights
    overrides = [] if moved is None else [f"mining.feature_weights={moved}"]
    config, student, objective = load_run(arguments.checkpoint, device, overrides)
    if arguments.source not in config.sources:
        raise ValueError(
            f'--source must be one of {[*config.sources]} ("" is the main one), got '
            f"{arguments.source!r}"
        )
    batch = read_clip(arguments, config.sources[arguments.source])
    (study,) = study_clips(
        objective,
        student,
        batch.to(device),
        num_masks=arguments.masks,
        hard_fraction=arguments.hard_fraction,
        ground_truth_statistics=not arguments.without_ground_truth,
    )
    ending = f"-{arguments.source}" if arguments.source else ""
    ending += "-without-ground-truth" if arguments.without_ground_truth else ""
    path = arguments.output / f"{arguments.video.stem}{ending}.png"
    if path.exists() and path.samefile(arguments.video):
        raise ValueError(f"the sheet would overwrite {path} itself; name another folder: --output")
    save_sheet(draw_sheet(study), path)
    written = [path]
    if ANIMATIONS[arguments.animation] and study.grid.time > 1:
        frames = draw_animation(study)
        for suffix in ANIMATIONS[arguments.animation]:
            written.append(path.with_name(f"{arguments.video.stem}{ending}{suffix}"))
            save_animation(frames, written[-1], arguments.fps)
    return written


def read_clip(arguments: argparse.Namespace, data: DataConfig) -> ClipBatch:
    """The clip that the arguments name: the middle of the frames, resized, as a batch of one.

    Raises:
        DecodeError, DecoderError, ValueError: see ``show_masks``.
    """
    stride = data.frame_stride if arguments.stride is None else arguments.stride
    start = arguments.start
    with open_video(str(arguments.video), arguments.decoder) as video:
        if start is None:
            (indices,) = view_indices(video.num_frames, data.num_frames, stride, num_views=1)
        elif 0 <= start < video.num_frames:
            rest = video.num_frames - start
            indices = start + train_indices(rest, data.num_frames, stride, start_draw=0.0)
        else:
            raise ValueError(f"--start must lie in 0..{video.num_frames - 1}, got {start}")
        frames = video.read(indices)
    (clip,) = held_out_crops(frames, data, 1)
    return ClipBatch(
        clips=clip[None],
        keys=torch.tensor([key_of("show masks", arguments.video.name)]),
        labels=torch.tensor([-1]),
        files=(str(arguments.video),),
        failures=(),
        source=arguments.source,
    )


def shorten(message: str) -> str:
    """On one line, and no more than a few details of a list."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    more = f" (and {len(lines) - 4} more)" if len(lines) > 4 else ""
    return "; ".join(lines[:4]).replace(":;", ":") + more


if __name__ == "__main__":
    sys.exit(main())
