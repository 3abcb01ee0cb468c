"""Weights of other projects: python tools/weights.py import SOURCE FOLDER.

import   make a checkpoint folder from a file of HPM, MAE, VideoMAE, VideoMAE V2, mae_st or timm, or
         from a folder written by transformers: for init_weights=FOLDER, and for the other tools
export   write a checkpoint of a run for others: transformers, timm, MAE, VideoMAE, HPM, ONNX, or as
         one file
inspect  print what an import would do: family, sizes and licence of the weights in a file

No code in a file is run, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpm_video.config.choices import OF_CLASSIFIER, OF_PRETRAINING, TransformerSize
from hpm_video.runs.console import above_zero, make_parser, positive, run, shortest

if TYPE_CHECKING:
    from hpm_video.weights.geometry import Overrides

FORMATS = ("transformers", "timm", "onnx", "file", "mae", "videomae", "hpm")


def main(command_line: Sequence[str] | None = None) -> int:
    """Import, export or inspect, and print the result."""
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="import | export | inspect")
    reads = commands.add_parser("import", help="make a checkpoint folder from a file or folder")
    reads.set_defaults(command=import_file)
    reads.add_argument("source", type=Path, help="file of weights, or folder of a model")
    reads.add_argument("folder", type=Path, help="folder to write; it must not exist")
    add_overrides(reads)
    writes = commands.add_parser("export", help="write a checkpoint of a run for other projects")
    writes.set_defaults(command=export_checkpoint)
    add = writes.add_argument
    add("checkpoint", type=Path, help="checkpoint folder of a run, or one file of --to file")
    add("out", type=Path, help="file or folder to write; it must not exist")
    kinds = (
        "transformers, timm: a folder that it reads; mae, videomae, hpm: a file with its names; "
        "onnx: a program for onnxruntime, of a classifier; file: one file of this package"
    )
    add("--to", choices=FORMATS, required=True, help=kinds)
    chosen = (
        "of pre-training: student (default) or teacher; of a classifier: model or average, by "
        "default those that the run tested"
    )
    add("--weights", choices=(*OF_PRETRAINING, *OF_CLASSIFIER), help=chosen)
    largest = (
        "largest difference between our model and the other's, as a share of the largest value "
        "(default: %(default)s)"
    )
    limit: dict[str, Any] = {"type": above_zero, "default": 1e-4, "metavar": "SHARE"}
    for compares in (reads, writes):
        compares.add_argument("--tolerance", help=largest, **limit)
        compares.add_argument("--no-parity", action="store_true", help="skip this slow comparison")
    looks = commands.add_parser("inspect", help="print what an import would do")
    looks.set_defaults(command=inspect_file)
    looks.add_argument("source", type=Path, help="file of weights, or folder of a model")
    add_overrides(looks)
    arguments = parser.parse_args(command_line)
    return run(lambda: arguments.command(arguments))


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add options for facts that a file may lack."""
    add = parser.add_argument
    add("--entry", metavar="KEY", help="key of the state dict, if a file has several")
    begins = "prefix of a model's tensor names, if a file has several; default: detected"
    add("--prefix", metavar="TEXT", help=begins)
    alone = "leave out the decoder or head, to pre-train with a decoder that starts fresh"
    add("--encoder-only", action="store_true", help=alone)
    heads = "attention heads of the {}, which weights do not show"
    add("--heads", type=positive, metavar="N", help=heads.format("encoder"))
    add("--decoder-heads", type=positive, metavar="N", help=heads.format("decoder"))
    fresh = "size of a decoder that starts fresh; default: the papers' for this encoder"
    sizes = ("WIDTH", "DEPTH", "HEADS")
    add("--decoder", type=positive, nargs=3, metavar=sizes, help=fresh)
    as_said = "size of a clip; default: from the file, or else {}"
    add("--num-frames", type=positive, metavar="T", help=as_said.format("16"))
    size = as_said.format("the size of its positions")
    add("--frame-size", type=positive, nargs=2, metavar=("H", "W"), help=size)


def overrides_by(arguments: argparse.Namespace) -> Overrides:
    """Return the facts on the command line."""
    from hpm_video.files.weights import CheckpointError
    from hpm_video.weights.geometry import Overrides

    given = {name: getattr(arguments, name) for name in vars(Overrides())}
    given["frame_size"] = arguments.frame_size and tuple(arguments.frame_size)
    try:
        given["decoder"] = arguments.decoder and TransformerSize(*arguments.decoder)
    except ValueError as error:
        raise CheckpointError(f"--decoder: {error}") from error
    return Overrides(**given)


def import_file(arguments: argparse.Namespace) -> None:
    """Write a checkpoint folder, unless the imported model computes something else."""
    from hpm_video.files.weights import CheckpointError
    from hpm_video.weights.importing import describe, import_weights, write_folder
    from hpm_video.weights.verify import NOT_ASKED, compare

    if arguments.folder.exists():
        raise CheckpointError(f"{arguments.folder} exists already; give another, or delete it")
    imported = import_weights(arguments.source, overrides_by(arguments))
    print("\n".join(describe(imported)))
    parity = NOT_ASKED if arguments.no_parity else compare(imported, arguments.tolerance)
    print("\n".join(parity.lines()))
    write_folder(imported, arguments.folder, parity.as_table())
    script = "./run_finetune.sh" if imported.model.is_classifier else "./run_pretrain.sh"
    folder = shortest(arguments.folder)
    print(f"wrote {folder}\ntrain on from there: {script} CONFIG init_weights={folder}")


def export_checkpoint(arguments: argparse.Namespace) -> None:
    """Write a checkpoint for others, unless it computes something else there."""
    from hpm_video.recognition.trained_model import TrainedModel, open_trained
    from hpm_video.weights.exporting import export

    model = open_trained(arguments.checkpoint, TrainedModel, arguments.weights)
    options = arguments.out, arguments.to, arguments.tolerance
    print("\n".join(export(model, *options, skip=arguments.no_parity).lines))


def inspect_file(arguments: argparse.Namespace) -> None:
    """Print what a file or folder holds."""
    from hpm_video.weights.importing import describe, import_weights

    print("\n".join(describe(import_weights(arguments.source, overrides_by(arguments)))))


if __name__ == "__main__":
    sys.exit(main())
