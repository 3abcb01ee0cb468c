"""Weights of other projects: python tools/weights.py import SOURCE FOLDER.

import   make a checkpoint folder from a file of HPM, MAE, VideoMAE, VideoMAE V2, mae_st or timm, or
         from a folder written by transformers: for init_weights=FOLDER, and for the other tools
export   write a checkpoint of a run for others: transformers, timm, MAE, VideoMAE, HPM, ONNX, or as
         one file
inspect  print family, sizes and licence of the weights in a file

No code in a file is run, and nothing is downloaded.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hpm_video.config.choices import TransformerSize
from hpm_video.files.weights import CheckpointError
from hpm_video.recognition.labels import read_label_names
from hpm_video.recognition.trained_model import TrainedModel, open_trained
from hpm_video.runs.console import EXIT_CODES, positive, run, shortest
from hpm_video.weights.exporting import FORMATS, export
from hpm_video.weights.geometry import Overrides
from hpm_video.weights.importing import import_weights, write_folder
from hpm_video.weights.inspect import describe, inspect
from hpm_video.weights.verify import NOT_ASKED, TOLERANCE, compare


def main(command_line: Sequence[str] | None = None) -> int:
    """Import, export or inspect, and print the result."""
    arguments = parse_arguments(command_line)
    return run(lambda: arguments.command(arguments))


def parse_arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="import | export | inspect")
    reads = commands.add_parser("import", help="make a checkpoint folder from a file or folder")
    reads.set_defaults(command=import_file)
    reads.add_argument("source", type=Path, help="file of weights, or folder of a model")
    reads.add_argument("folder", type=Path, help="folder to write; it must not exist")
    add_overrides(reads)
    kinds = "\n".join(f"  {name:13}{chosen.title}" for name, chosen in FORMATS.items())
    writes = commands.add_parser(
        "export",
        help="write a checkpoint of a run for other projects",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"kinds of --to:\n{kinds}\n\n{EXIT_CODES}",
    )
    writes.set_defaults(command=export_checkpoint)
    add = writes.add_argument
    add("checkpoint", type=Path, help="checkpoint folder of a run, or one file of --to file")
    add("out", type=Path, help="file or folder to write; it must not exist")
    add("--to", choices=tuple(FORMATS), required=True)
    add(
        "--weights",
        choices=("student", "teacher", "model", "average"),
        help="of pre-training: student (default) or teacher; of a classifier: model or average, "
        "by default those that the run tested",
    )
    for compares in (reads, writes):
        compares.add_argument(
            "--tolerance",
            type=float,
            default=TOLERANCE,
            help="largest difference between our model and the other's, as a share of the largest "
            "value (default: %(default)s)",
        )
        compares.add_argument("--no-parity", action="store_true", help="skip this slow comparison")
    looks = commands.add_parser("inspect", help="describe a file or folder")
    looks.set_defaults(command=lambda a: print("\n".join(inspect(a.source, overrides_by(a)))))
    looks.add_argument("source", type=Path, help="file of weights, or folder of a model or run")
    add_overrides(looks)
    return parser.parse_args(command_line)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add options for facts that a file may lack."""
    add = parser.add_argument
    add("--entry", help="key of the state dict, if a file has several")
    add("--prefix", help="read only tensors whose names begin with it, such as model.encoder.")
    add(
        "--encoder-only",
        action="store_true",
        help="leave out decoder or head: for pre-training, with a decoder that starts fresh",
    )
    add("--heads", type=positive, help="of the encoder's attention; the weights do not show it")
    add("--decoder-heads", type=positive)
    add(
        "--decoder",
        type=positive,
        nargs=3,
        metavar=("WIDTH", "DEPTH", "HEADS"),
        help="of a decoder that starts fresh; default: the papers' choice for this encoder",
    )
    add("--num-frames", type=positive, help="default: as the file says, or else 16")
    add("--frame-size", type=positive, nargs=2, metavar=("HEIGHT", "WIDTH"))
    add("--frame-stride", type=positive, help="default: as the file says, or else 4")
    add("--target", choices=("raw", "joint", "per_channel"), help="target of pre-training")
    add("--labels", type=Path, dest="label_names", help="names of classes: class i in line i")


def overrides_by(arguments: argparse.Namespace) -> Overrides:
    """Return the facts on the command line."""
    given = {name: getattr(arguments, name) for name in vars(Overrides())}
    given["frame_size"] = arguments.frame_size and tuple(arguments.frame_size)
    given["label_names"] = arguments.label_names and read_label_names(arguments.label_names)
    try:
        given["decoder"] = arguments.decoder and TransformerSize(*arguments.decoder)
    except ValueError as error:
        raise CheckpointError(f"--decoder: {error}") from error
    return Overrides(**given)


def import_file(arguments: argparse.Namespace) -> None:
    """Write a checkpoint folder, unless the imported model computes something else."""
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
    model = open_trained(arguments.checkpoint, TrainedModel, arguments.weights)
    options = arguments.out, arguments.to, arguments.tolerance
    print("\n".join(export(model, *options, skip=arguments.no_parity).lines))


if __name__ == "__main__":
    sys.exit(main())
