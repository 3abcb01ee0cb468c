"""Name the action in videos: python tools/predict.py CHECKPOINT VIDEO [VIDEO ...]."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpm_video.data.clips import settle_decoder
from hpm_video.data.manifest import NOT_STATED, UNLABELLED, Manifest, read_manifest
from hpm_video.data.reading import Views
from hpm_video.files.atomic import written_beside
from hpm_video.files.failures import BadFilesError, Failure
from hpm_video.recognition.inference import Inference, each_video
from hpm_video.recognition.trained_model import TrainedClassifier, open_trained
from hpm_video.runs.console import parse_views, positive, run
from hpm_video.runs.options import add_machine_options, load_inference, reading_of

EXIT_CODES = """exit codes:
  0    every video has a prediction
  1    a fault of this program
  2    a wrong input, or some videos do not decode: they are listed, the others have predictions
  130  stopped by Ctrl-C
"""


class Guess(NamedTuple):
    """A class that a video may be of."""

    label: int
    name: str
    probability: float


def main(command_line: Sequence[str] | None = None) -> int:
    """Predict, and print what is most probable."""
    arguments = parse_arguments(command_line)
    return run(lambda: name_actions(arguments))


def parse_arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Name the action in videos, the most probable classes first.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        help="checkpoint folder of a fine-tuning run, or one file made of it by "
        "tools/weights.py export --to file",
    )
    add("videos", nargs="+", metavar="VIDEO", help="a video, or a folder: all videos in it")
    add("--top", type=positive, default=5, metavar="N", help="classes of each video (default 5)")
    add("--json", type=Path, metavar="FILE", help="write the predictions there too")
    add(
        "--views",
        type=parse_views,
        metavar="CLIPSxCROPS",
        help="views of each video that are averaged over, such as 5x3; default: the config's test",
    )
    add("--weights", choices=("model", "average"), help="default: those that the run tested")
    add_machine_options(parser)
    return parser.parse_args(command_line)


def name_actions(arguments: argparse.Namespace) -> None:
    """Print the predictions, one video after the other.

    Raises:
        BadFilesError: some videos do not decode; the others were dealt with.
        CheckpointError, ConfigError, ManifestError, DeviceError, OSError: a wrong input.
    """
    check_json(arguments.json)
    manifest = find_videos(arguments.videos)
    settle_decoder(arguments.decoder, manifest)
    trained = open_trained(arguments.checkpoint, TrainedClassifier, arguments.weights)
    classifier, test = load_inference(trained, arguments), trained.config.test
    views = arguments.views or Views(test.clips, test.crops)
    print(describe(trained, classifier, views, len(manifest)))
    if arguments.top == 1:
        print()
    reading = reading_of(arguments, exclude_bad_files=True)
    if len(manifest) == 1:
        reading = replace(reading, workers=0)
    clips = reading.clips(manifest, classifier.data, views)
    found: list[tuple[str, list[Guess]]] = []
    failures: list[Failure] = []
    # One video at a time, so that each is printed as soon as it is read.
    for place, value in each_video(
        classifier.probabilities, clips, range(len(manifest)), reading, max_clips=1
    ):
        if isinstance(value, Failure):
            failures.append(value)
            continue
        found.append((manifest.files[place], best(value, trained.label_names, arguments.top)))
        print(block(*found[-1]), flush=True)
    if arguments.json is not None:
        what = {
            "checkpoint": str(arguments.checkpoint.resolve()),
            "update": trained.update,
            "weights": trained.weights,
            "precision": classifier.precision,
            "clips": views.clips,
            "crops": views.crops,
        }
        write_json(arguments.json, what, found, failures)
        print(f"\nwrote {arguments.json}")
    if failures:
        raise BadFilesError(failures, len(manifest), "Encode them anew, or leave them out.")


def best(probabilities: NDArray[np.float64], names: Sequence[str], count: int) -> list[Guess]:
    """Return the most probable classes; of equally probable ones, those of lower number first."""
    order = np.argsort(-probabilities, kind="stable")[:count].tolist()
    return [Guess(i, names[i], float(probabilities[i])) for i in order]


def check_json(path: Path | None) -> None:
    """Make sure, before anything is computed, that a file can be written there.

    Raises:
        OSError: it cannot.
    """
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"--json {path} is a folder; give a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"--json {path} cannot be written: no right to write in its folder")


def find_videos(paths: Sequence[str]) -> Manifest:
    """Those given, and all in the folders given, each once.

    Raises:
        ManifestError: there are none in a folder.
    """
    found = [
        file
        for path in paths
        for file in (read_manifest(path).files if Path(path).is_dir() else [path])
    ]
    files = tuple(dict.fromkeys(shown(file) for file in found))
    return Manifest(files, (UNLABELLED,) * len(files), (NOT_STATED,) * len(files))


def absolute(path: str) -> str:
    """For machines, which may work in another folder."""
    return str(Path(path).absolute())


def shown(path: str) -> str:
    """From the working directory on, if it lies in there."""
    place = Path(path).absolute()
    return str(place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else path)


def describe(
    trained: TrainedClassifier, classifier: Inference, views: Views, num_videos: int
) -> str:
    """What is about to be done."""
    return (
        f"{num_videos} video{'s' if num_videos > 1 else ''}, {views.clips} x {views.crops} "
        f"view{'s' if views.count > 1 else ''} of each; {len(trained.label_names)} classes, "
        f"{trained.weights} of update {trained.update}; {classifier.device.type}, "
        f"{classifier.precision}"
    )


def block(path: str, guesses: Sequence[Guess]) -> str:
    """The most probable classes of a video, below its path; of one class alone, in one line."""
    if len(guesses) == 1:
        return f"{guesses[0].probability:7.1%}  {guesses[0].name:20}  {path}"
    width = max(len(guess.name) for guess in guesses)
    rows = [f"  {guess.name:{width}}  {guess.probability:6.1%}" for guess in guesses]
    return "\n".join(["", path, *rows])


def write_json(
    path: Path,
    what: dict[str, Any],
    found: Sequence[tuple[str, list[Guess]]],
    failures: Sequence[Failure],
) -> None:
    """Write the predictions, what made them, and the videos that do not decode."""
    content = {
        **what,
        "videos": [
            {"path": absolute(video), "top": [guess._asdict() for guess in guesses]}
            for video, guesses in found
        ],
        "bad_files": [{"path": absolute(bad.path), "reason": bad.reason} for bad in failures],
    }
    with written_beside(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
