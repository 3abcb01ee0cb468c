"""Test a classifier: python tools/evaluate.py CHECKPOINT MANIFEST.

Over several processes, each of which tests a share of the videos:
    python tools/launch.py --processes 4 tools/evaluate.py CHECKPOINT MANIFEST
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpm_video.config.checks import ConfigError
from hpm_video.config.data import DataConfig
from hpm_video.data.loader import default_workers, end_workers
from hpm_video.data.reading import Views
from hpm_video.decoding.registry import decoder_choices
from hpm_video.recognition.inference import ClipChoice, Reading
from hpm_video.recognition.testing import describe, summarise, write_results
from hpm_video.recognition.trained_classifier import describe_test, load_recogniser
from hpm_video.runs.console import EXIT_CODES, not_negative, parse_views, positive, run_processes
from hpm_video.runs.data import open_manifest
from hpm_video.training.device import choose_device, inference_precision
from hpm_video.training.distributed import Processes


def main(command_line: Sequence[str] | None = None) -> int:
    """Test, and print and write the result."""
    arguments = parse_arguments(command_line)
    return run_processes(lambda processes: evaluate(arguments, processes))


def parse_arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder of a fine-tuning run")
    parser.add_argument("manifest", help="manifest or folder of class folders")
    parser.add_argument("--root", help="of relative paths in the manifest")
    parser.add_argument(
        "--views", type=parse_views, help="clips x crops of each video, such as 5x3"
    )
    parser.add_argument("--weights", choices=("model", "average"), help="default: the config's")
    parser.add_argument("--num-frames", type=positive, help="default: as in training")
    parser.add_argument("--frame-stride", type=positive)
    parser.add_argument("--frame-size", type=positive, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument(
        "--exclude-bad-files",
        action="store_true",
        help="count videos that do not decode as wrong, instead of stopping with a list of them",
    )
    parser.add_argument("--output", type=Path, help="default: evaluations/NAME in the run's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result there")
    parser.add_argument("--workers", type=not_negative, default=default_workers())
    parser.add_argument("--decoder", choices=decoder_choices(), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on GPUs")
    return parser.parse_args(command_line)


def evaluate(arguments: argparse.Namespace, processes: Processes) -> None:
    """Test the checkpoint. The first process writes and prints.

    Raises:
        ConfigError, CheckpointError, ManifestError, DeviceError: the test cannot be run.
        BadTestFilesError: videos do not decode.
    """
    output = folder_of(arguments)
    device = choose_device(arguments.device, processes.count)
    size = arguments.frame_size
    config, recogniser = load_recogniser(
        arguments.checkpoint,
        device,
        arguments.precision or inference_precision(device),
        weights=arguments.weights,
        clips=ClipChoice(
            arguments.num_frames, arguments.frame_stride, tuple(size) if size else None
        ),
    )
    recogniser.check_stride(arguments.frame_stride)
    chosen = arguments.views or Views(config.test.clips, config.test.crops)
    manifest = open_manifest(DataConfig(root=arguments.root), arguments.manifest)
    if processes.is_first:
        logging.getLogger().info(
            f"{len(manifest)} videos, {chosen.clips} x {chosen.crops} views of each, on "
            f"{device.type} in {recogniser.precision}"
        )
    reading = Reading(arguments.decoder, arguments.workers, arguments.exclude_bad_files)
    try:
        scores = recogniser.score(manifest, chosen, reading, processes)
    finally:
        end_workers()
    if not processes.is_first:
        return
    what: dict[str, Any] = {
        "checkpoint": str(arguments.checkpoint.resolve()),
        "manifest": str(Path(arguments.manifest).absolute()),
        "exclude_bad_files": arguments.exclude_bad_files,
        **describe_test(arguments.checkpoint, config, recogniser, manifest, chosen),
    }
    result = {"test": what, **summarise(scores, recogniser.label_names)}
    write_results(output, scores, result, recogniser.label_names)
    print(
        f"\n{describe(result)}\n\nwrote result.json, predictions.csv and confusion.png to {output}"
    )


def folder_of(arguments: argparse.Namespace) -> Path:
    """Where the result goes.

    Raises:
        ConfigError: a result is there already.
    """
    checkpoint: Path = arguments.checkpoint.resolve()
    name = f"{checkpoint.name}-{Path(arguments.manifest).stem}"
    output: Path = arguments.output or checkpoint.parent.parent / "evaluations" / name
    if (output / "result.json").exists() and not arguments.overwrite:
        raise ConfigError(f"{output} holds a result already; take another --output, or --overwrite")
    return output


if __name__ == "__main__":
    sys.exit(main())
