"""Test a classifier: python tools/evaluate.py CHECKPOINT MANIFEST.

With several processes, each of which tests a share of the videos:
    python tools/launch.py --processes 4 tools/evaluate.py CHECKPOINT MANIFEST
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpm_video.config.checks import ConfigError
from hpm_video.config.choices import OF_CLASSIFIER
from hpm_video.data.manifest import read_manifest
from hpm_video.runs.console import add_options, make_parser, run_processes
from hpm_video.runs.options import add_model_options, describe_pass, open_inference, reading_of

if TYPE_CHECKING:
    from hpm_video.training.distributed import Processes


def main(command_line: Sequence[str] | None = None) -> int:
    """Test, and print and write the result."""
    parser = make_parser(__doc__)
    add_model_options(parser, "checkpoint folder of a fine-tuning run", OF_CLASSIFIER)
    add = parser.add_argument
    add("manifest", type=Path, help="manifest or folder of class folders")
    of_bad = "count videos that do not decode as wrong, instead of stopping with a list of them"
    add("--exclude-bad-files", action="store_true", help=of_bad)
    add("--overwrite", action="store_true", help="replace an earlier result in --output")
    add_options(
        parser, "views", "root", output={"help": "default: evaluations/NAME in the run's folder"}
    )
    arguments = parser.parse_args(command_line)
    return run_processes(lambda processes: evaluate(arguments, processes))


def evaluate(arguments: argparse.Namespace, processes: Processes) -> None:
    """Test the checkpoint. The first process writes and prints.

    Raises:
        ConfigError, CheckpointError, ManifestError, DeviceError: the test cannot be run.
        BadFilesError: videos do not decode.
    """
    from hpm_video.data.reading import Views
    from hpm_video.recognition.testing import (
        describe,
        describe_test,
        score_videos,
        summarise,
        write_results,
    )
    from hpm_video.recognition.trained_model import TrainedClassifier

    manifest = read_manifest(arguments.manifest, arguments.root)
    trained, classifier = open_inference(arguments, TrainedClassifier, processes.count)
    checkpoint = trained.path.resolve()
    name = f"{checkpoint.name}-{arguments.manifest.stem}"
    output: Path = arguments.output or checkpoint.parent.parent / "evaluations" / name
    if (output / "result.json").exists() and not arguments.overwrite:
        raise ConfigError(f"{output} holds a result already; take another --output, or --overwrite")
    test, names = trained.config.test, trained.label_names
    views = Views(*arguments.views or (test.clips, test.crops))
    if processes.is_first:
        logging.getLogger().info(describe_pass(len(manifest), views, trained, classifier))
    reading = reading_of(arguments, exclude_bad_files=arguments.exclude_bad_files)
    scores = score_videos(classifier, names, manifest, views, reading, processes)
    if not processes.is_first:
        return
    what = {
        "checkpoint": str(checkpoint),
        "manifest": str(arguments.manifest.absolute()),
        "exclude_bad_files": arguments.exclude_bad_files,
        **describe_test(trained, classifier, manifest, views),
    }
    result = {"test": what, **summarise(scores, names)}
    write_results(output, scores, result, names)
    print(
        f"\n{describe(result)}\n\nwrote result.json, predictions.csv and confusion.png to {output}"
    )


if __name__ == "__main__":
    sys.exit(main())
