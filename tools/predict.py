"""Name the action in videos: python tools/predict.py CHECKPOINT VIDEO [VIDEO ...]."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpm_video.config.schema import FinetuneConfig
from hpm_video.data.clips import settle_decoder
from hpm_video.data.loader import default_workers
from hpm_video.data.manifest import NOT_STATED, UNLABELLED, Manifest, read_manifest
from hpm_video.data.reading import Views
from hpm_video.decoding.registry import decoder_choices
from hpm_video.files.atomic import written_beside
from hpm_video.files.failures import BadFilesError, Failure
from hpm_video.recognition.prediction import Prediction, predict
from hpm_video.recognition.trained_classifier import Recogniser, load_recogniser
from hpm_video.runs.console import not_negative, parse_views, positive, run
from hpm_video.training.checkpoint import read_state
from hpm_video.training.device import choose_device, inference_precision
from hpm_video.weights.single_file import as_folder

EXIT_CODES = """exit codes:
  0    every video has a prediction
  1    a fault of this program
  2    a wrong input, or some videos do not decode: they are listed, the others have predictions
  130  stopped by Ctrl-C
"""


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
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto (default): bf16 on a GPU that is made for it, otherwise fp32",
    )
    add("--decoder", choices=decoder_choices(), default="auto")
    add("--workers", type=not_negative, metavar="N", help="processes that decode")
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
    with as_folder(arguments.checkpoint) as folder:
        config, recogniser = open_classifier(folder, arguments)
        update = read_state(folder)["update"]
    views = arguments.views or Views(config.test.clips, config.test.crops)
    print(describe(update, config, recogniser, views, len(manifest)))
    workers = default_workers() if arguments.workers is None else arguments.workers
    if arguments.top == 1:
        print()
    predictions: list[Prediction] = []
    failures: list[Failure] = []
    for found in predict(
        recogniser,
        manifest,
        views,
        decoder=arguments.decoder,
        workers=workers if len(manifest) > 1 else 0,
    ):
        if isinstance(found, Failure):
            failures.append(found)
        else:
            predictions.append(found)
            print(block(found, arguments.top), flush=True)
    if arguments.json is not None:
        what = {
            "checkpoint": str(arguments.checkpoint.resolve()),
            "update": update,
            "weights": config.test.weights,
            "precision": recogniser.precision,
            "clips": views.clips,
            "crops": views.crops,
        }
        write_json(arguments.json, what, predictions, failures, arguments.top)
        print(f"\nwrote {arguments.json}")
    if failures:
        raise BadFilesError(failures, len(manifest), "Encode them anew, or leave them out.")


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


def open_classifier(
    checkpoint: Path, arguments: argparse.Namespace
) -> tuple[FinetuneConfig, Recogniser]:
    """The classifier and its config.

    Raises:
        CheckpointError, ConfigError, DeviceError: it cannot be used here.
    """
    device = choose_device(arguments.device)
    precision = (
        inference_precision(device) if arguments.precision == "auto" else arguments.precision
    )
    return load_recogniser(checkpoint, device, precision, weights=arguments.weights)


def describe(
    update: int,
    config: FinetuneConfig,
    recogniser: Recogniser,
    views: Views,
    num_videos: int,
) -> str:
    """What is about to be done."""
    return (
        f"{num_videos} video{'s' if num_videos > 1 else ''}, {views.clips} x {views.crops} "
        f"view{'s' if views.count > 1 else ''} of each; {len(recogniser.label_names)} classes, "
        f"{config.test.weights} of update {update}; {recogniser.device.type}, "
        f"{recogniser.precision}"
    )


def block(prediction: Prediction, top: int) -> str:
    """The most probable classes of a video, below its path; with ``top`` 1 all in one line."""
    best = prediction.best(top)
    if top == 1:
        return f"{best[0].probability:7.1%}  {best[0].name:20}  {prediction.path}"
    width = max(len(guess.name) for guess in best)
    rows = [f"  {guess.name:{width}}  {guess.probability:6.1%}" for guess in best]
    return "\n".join(["", prediction.path, *rows])


def write_json(
    path: Path,
    what: dict[str, Any],
    predictions: Sequence[Prediction],
    failures: Sequence[Failure],
    top: int,
) -> None:
    """Write the predictions, what made them, and the videos that do not decode."""
    content = {
        **what,
        "videos": [
            {"path": absolute(found.path), "top": [guess._asdict() for guess in found.best(top)]}
            for found in predictions
        ],
        "bad_files": [{"path": absolute(bad.path), "reason": bad.reason} for bad in failures],
    }
    with written_beside(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
