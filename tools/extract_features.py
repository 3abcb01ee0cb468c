"""Write features of videos: python tools/extract_features.py CHECKPOINT SOURCE OUTPUT.

OUTPUT gets one file per video, features/NAME.npy of (views, D), or with --tokens (views, N, D);
index.csv maps files to videos. The first frames of sliding windows are in starts/. With --npz,
features.npz has all of it in arrays: X (videos, D), the mean over the views; y, the label of each
video, -1 for none; names of the classes; files.
"""

import argparse
import sys
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import hpm_video
from hpm_video.config.choices import OF_CLASSIFIER, OF_PRETRAINING
from hpm_video.data.manifest import read_manifest
from hpm_video.files.failures import BadFilesError
from hpm_video.files.wording import counted
from hpm_video.runs.console import add_options, make_parser, positive, run
from hpm_video.runs.options import add_model_options, open_inference, reading_of

if TYPE_CHECKING:
    from hpm_video.recognition.features import FeatureFolder


def main(command_line: Sequence[str] | None = None) -> int:
    """Extract, and report what was written."""
    parser = make_parser(__doc__)
    add_model_options(
        parser,
        "checkpoint folder of a run, pre-training or fine-tuning",
        (*OF_PRETRAINING, *OF_CLASSIFIER),
        weights_help="student (default) or teacher of pre-training; model or average of a "
        "classifier (default: the tested ones), whose features are the input of its head",
    )
    add = parser.add_argument
    add("source", type=Path, help="manifest or folder of videos")
    add("output", type=Path, help="folder to write to; a second start resumes")
    add("--clips", type=positive, metavar="N", help="clips spread over each video (default 1)")
    add("--crops", type=positive, metavar="M", help="crops of each clip (default 1)")
    windows = "instead of --clips: a clip every FRAMES frames, over the whole video"
    add("--window-stride", type=positive, metavar="FRAMES", help=windows)
    add("--tokens", action="store_true", help="every token of the last layer, not one vector")
    add("--npz", action="store_true", help="also write features.npz: X, y, names and files")
    add("--dtype", choices=("float32", "float16"), default="float32", help="default: float32")
    add("--clips-per-pass", type=positive, metavar="N", help="fewer take less memory (default 32)")
    add_options(parser, "root")
    arguments = parser.parse_args(command_line)
    if arguments.window_stride and (arguments.clips or arguments.crops):
        parser.error("--window-stride looks at every video in windows: leave out --clips, --crops")
    if arguments.npz and (arguments.window_stride or arguments.tokens):
        parser.error("--npz has one vector for each video: leave out --window-stride, --tokens")
    return run(lambda: write_features(arguments))


def write_features(arguments: argparse.Namespace) -> None:
    """Extract the features, and report."""
    from hpm_video.data.clips import decoder_for
    from hpm_video.data.reading import Views
    from hpm_video.recognition.features import FeatureFolder, Layout, describe, extract
    from hpm_video.recognition.inference import describe_pass
    from hpm_video.recognition.trained_model import TrainedModel

    manifest = read_manifest(arguments.source, arguments.root)
    decoder_for(arguments.decoder, manifest)
    every = arguments.window_stride
    trained, encoder = open_inference(arguments, TrainedModel, windows=every)
    encoder = replace(encoder, clips_per_pass=arguments.clips_per_pass or encoder.clips_per_pass)
    views = Views(arguments.clips or 1, arguments.crops or 1, every)
    layout = Layout.of(encoder, views, arguments.dtype, tokens=arguments.tokens)
    source = arguments.source.absolute()
    base = (arguments.root or (source if source.is_dir() else source.parent)).absolute()
    folder = FeatureFolder(arguments.output, manifest, base, layout)
    of_files = {"source": str(source), "root": str(base), "decoder": arguments.decoder}
    version = {"hpm_video": hpm_video.__version__}
    folder.claim(version | describe(trained, encoder, layout) | of_files)
    before, missing = len(folder), len(folder.missing())
    if before:
        print(f"{before} of {counted(before + missing, 'video')} are there already")
    if missing:
        print(describe_pass(missing, views, trained, encoder))
    workers = reading_of(arguments).workers
    bad = extract(encoder, folder, decoder=arguments.decoder, workers=workers)
    shape = ", ".join(map(str, layout.view_shape))
    new = f"{len(folder) - before} of them new"
    print(f"\nDone: features of {counted(len(folder), 'video')}, {new}")
    print(f"  {folder.path}/features  (views, {shape}) {layout.dtype} for each video")
    if arguments.npz:
        write_npz(folder, {failure.path for failure in bad})
    if bad:
        remedy = f"They are listed in {folder.bad_files}, and the same command tries them again"
        raise BadFilesError(bad, len(set(manifest.files)), remedy)


def write_npz(folder: "FeatureFolder", bad: Container[str]) -> None:
    """Write the features of all but bad videos as one file, and print its path."""
    import numpy as np

    from hpm_video.files.atomic import written_beside

    manifest = folder.manifest
    labels = {
        file: y for file, y in zip(manifest.files, manifest.labels, strict=True) if file not in bad
    }
    if not labels:
        return
    means = [np.load(folder.features_of(file)).mean(axis=0, dtype=np.float32) for file in labels]
    path, names = folder.path / "features.npz", np.array(manifest.label_names or (), dtype=str)
    with written_beside(path) as file:
        np.savez(file, X=np.stack(means), y=[*labels.values()], names=names, files=[*labels])
    print(f"  in one file   {path}")


if __name__ == "__main__":
    sys.exit(main())
