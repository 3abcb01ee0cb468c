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
from hpm_video.data.reading import Views
from hpm_video.recognition.testing import (
    describe,
    describe_test,
    score_videos,
    summarise,
    write_results,
)
from hpm_video.recognition.trained_model import TrainedClassifier, open_trained
from hpm_video.runs.console import EXIT_CODES, parse_views, run_processes
from hpm_video.runs.data import open_manifest
from hpm_video.runs.options import (
    add_clip_options,
    add_machine_options,
    check_stride,
    clip_choice,
    load_inference,
    reading_of,
)
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
    add_clip_options(parser)
    parser.add_argument(
        "--exclude-bad-files",
        action="store_true",
        help="count videos that do not decode as wrong, instead of stopping with a list of them",
    )
    parser.add_argument("--output", type=Path, help="default: evaluations/NAME in the run's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result there")
    add_machine_options(parser)
    return parser.parse_args(command_line)


def evaluate(arguments: argparse.Namespace, processes: Processes) -> None:
    """Test the checkpoint. The first process writes and prints.

    Raises:
        ConfigError, CheckpointError, ManifestError, DeviceError: the test cannot be run.
        BadFilesError: videos do not decode.
    """
    output = folder_of(arguments)
    trained = open_trained(
        arguments.checkpoint, TrainedClassifier, arguments.weights, clips=clip_choice(arguments)
    )
    check_stride(trained, arguments)
    classifier = load_inference(trained, arguments, processes.count)
    test, names = trained.config.test, trained.label_names
    views = arguments.views or Views(test.clips, test.crops)
    manifest = open_manifest(DataConfig(root=arguments.root), arguments.manifest)
    if processes.is_first:
        logging.getLogger().info(
            f"{len(manifest)} videos, {views.clips} x {views.crops} views of each, on "
            f"{classifier.device.type} in {classifier.precision}"
        )
    reading = reading_of(arguments, exclude_bad_files=arguments.exclude_bad_files)
    scores = score_videos(classifier, names, manifest, views, reading, processes)
    if not processes.is_first:
        return
    what: dict[str, Any] = {
        "checkpoint": str(arguments.checkpoint.resolve()),
        "manifest": str(Path(arguments.manifest).absolute()),
        "exclude_bad_files": arguments.exclude_bad_files,
        **describe_test(trained, classifier, manifest, views),
    }
    result = {"test": what, **summarise(scores, names)}
    write_results(output, scores, result, names)
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
