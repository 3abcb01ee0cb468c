"""Name the action in videos: python tools/predict.py CHECKPOINT VIDEO [VIDEO ...].

The most probable classes come first. Videos that do not decode are listed at the end.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpm_video.config.choices import OF_CLASSIFIER
from hpm_video.data.manifest import NOT_STATED, UNLABELLED, Manifest, read_manifest
from hpm_video.files.atomic import write_json
from hpm_video.files.failures import BadFilesError, Failure
from hpm_video.runs.console import add_options, make_parser, positive, run
from hpm_video.runs.options import add_model_options, open_classifier, reading_of

LISTS = (".csv", ".tsv", ".txt")


def main(command_line: Sequence[str] | None = None) -> int:
    """Predict, and print what is most probable."""
    parser = make_parser(__doc__)
    checkpoint = "checkpoint of a fine-tuning run, a file of tools/weights.py export --to file"
    add_model_options(parser, checkpoint, OF_CLASSIFIER)
    add = parser.add_argument
    which = f"a video, a folder for all videos in it, or a manifest ({', '.join(LISTS)})"
    add("videos", nargs="+", metavar="VIDEO", help=which)
    add("--top", type=positive, default=5, metavar="N", help="classes per video (default 5)")
    add("--json", type=Path, metavar="FILE", help="also write the predictions to FILE")
    add_options(parser, "views")
    arguments = parser.parse_args(command_line)
    return run(lambda: name_actions(arguments))


def name_actions(arguments: Namespace) -> None:
    """Print the predictions, one video after the other."""
    from hpm_video.recognition.inference import each_video
    from hpm_video.recognition.testing import describe_test

    if arguments.json is not None and arguments.json.is_dir():
        raise IsADirectoryError(f"--json {arguments.json} is a folder; give a file in it")
    manifest = find_videos(arguments.videos)
    trained, classifier, views, pass_ahead = open_classifier(arguments, manifest)
    print(pass_ahead + ("\n" if arguments.top == 1 else ""))
    reading = reading_of(arguments, exclude_bad_files=True)
    clips = reading.clips(manifest, classifier.data, views)
    found: list[dict[str, Any]] = []
    bad: list[Failure] = []
    # One video at a time, so that each is printed as soon as it is read.
    for place, value in each_video(
        classifier.probabilities, clips, range(len(manifest)), reading, max_clips=1
    ):
        if isinstance(value, Failure):
            bad.append(value)
            continue
        # Of equally probable classes, those of lower number first.
        best = np.argsort(-value, kind="stable")[: arguments.top].tolist()
        names = trained.label_names
        top = [{"label": i, "name": names[i], "probability": float(value[i])} for i in best]
        path = manifest.files[place]
        if len(top) == 1:
            lines = [f"{top[0]['probability']:7.1%}  {top[0]['name']:20}  {path}"]
        else:
            width = max(len(names[i]) for i in best)
            lines = ["", path, *(f"  {names[i]:{width}}  {value[i]:6.1%}" for i in best)]
        print("\n".join(lines), flush=True)
        found.append({"path": str(Path(path).absolute()), "top": top})
    if arguments.json is not None:
        content = {
            "checkpoint": str(arguments.checkpoint.resolve()),
            **describe_test(trained, classifier, manifest, views),
            "videos": found,
            "bad_files": [{"path": str(Path(b.path).absolute()), "reason": b.reason} for b in bad],
        }
        write_json(arguments.json, content)
        print(f"\nwrote {arguments.json}")
    if bad:
        raise BadFilesError(bad, len(manifest), "Encode them anew, or leave them out.")


def find_videos(paths: Sequence[str]) -> Manifest:
    """Return the given videos and those of the given folders and manifests, each once."""
    files: dict[str, None] = {}  # as an ordered set
    fps: dict[str, float] = {}
    kept_every: dict[str, int] = {}
    for path in paths:
        several = Path(path).is_dir() or path.lower().endswith(LISTS)
        listed = read_manifest(path) if several else Manifest((path,), (), ())
        files |= dict.fromkeys(listed.files)
        fps |= listed.fps
        kept_every |= listed.kept_every
    labels, counts = ((each,) * len(files) for each in (UNLABELLED, NOT_STATED))
    return Manifest((*files,), labels, counts, fps=fps, kept_every=kept_every)


if __name__ == "__main__":
    sys.exit(main())
