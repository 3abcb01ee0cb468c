"""Test a classifier: python tools/evaluate.py CHECKPOINT MANIFEST.

With several processes, each of which tests a share of the videos:
    python tools/launch.py --processes 4 tools/evaluate.py CHECKPOINT MANIFEST
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpm_video.config.checks import ConfigError
from hpm_video.config.choices import OF_CLASSIFIER
from hpm_video.data.manifest import read_manifest
from hpm_video.runs.console import add_options, make_parser, run_processes
from hpm_video.runs.options import add_model_options, open_classifier, reading_of

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
    output = {"help": "default: evaluations/NAME in the run's folder"}
    add_options(parser, "views", "root", output=output)
    arguments = parser.parse_args(command_line)
    return run_processes(lambda processes: evaluate(arguments, processes))


def evaluate(arguments: argparse.Namespace, processes: "Processes") -> None:
    """Test the checkpoint. The first process writes and prints."""
    from hpm_video.recognition import testing

    manifest, excludes = arguments.manifest, arguments.exclude_bad_files
    videos = read_manifest(manifest, arguments.root)
    trained, classifier, views, pass_ahead = open_classifier(arguments, videos, processes.count)
    checkpoint, names = trained.path.resolve(), trained.label_names
    of_run = checkpoint.parent.parent / "evaluations" / f"{checkpoint.name}-{manifest.stem}"
    output: Path = arguments.output or of_run
    if (output / "result.json").exists() and not arguments.overwrite:
        raise ConfigError(f"{output} holds a result already; take another --output, or --overwrite")
    if processes.is_first:
        print(pass_ahead)
    reading = reading_of(arguments, exclude_bad_files=excludes)
    scores = testing.score_videos(classifier, names, videos, views, reading, processes)
    if processes.is_first:
        of_files = {"checkpoint": str(checkpoint), "manifest": str(manifest.absolute())}
        how = testing.describe_test(trained, classifier, videos, views)
        what = {**of_files, "exclude_bad_files": excludes, **how}
        result = {"test": what, **testing.summarise(scores, names)}
        testing.write_results(output, scores, result, names)
        print(f"\n{testing.describe(result)}\n")
        print(f"wrote result.json, predictions.csv and confusion.png to {output}")


if __name__ == "__main__":
    sys.exit(main())
