"""Report what is installed, what is missing, and what works here: python tools/doctor.py."""

import importlib.metadata
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import hpm_video

OPTIONAL = ("deepspeed", "decord", "huggingface_hub", "wandb", "mlflow-skinny")


def main(command_line: Sequence[str] | None = None) -> int:
    """Print the report. -> the exit code, 2 if something that every run needs is missing"""
    try:
        from hpm_video.runs.console import exit_codes, make_parser, run

        make_parser(__doc__, exit_codes("nothing is missing")).parse_args(command_line)
        code = run(report_device)
    except ImportError as error:
        print(f"error: {error}; install what is missing, then run this again")
        code = 2
    return code if report_libraries() else 2


def report_device() -> None:
    """Print the device that is used, and which decoders can read a test video."""
    import torch

    from hpm_video.decoding.registry import DECODERS, choose_decoder, what_is_wrong
    from hpm_video.training.device import choose_device, inference_precision

    device = choose_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"hpm_video {hpm_video.__version__} on Python {platform.python_version()}")
    print(f"device: {device.type} ({name}), precision of inference: {inference_precision(device)}")
    print("\ndecoders of videos (images need none)")
    for name, decoder in DECODERS.items():
        wrong = what_is_wrong(name)
        print(f"  {name:18} {wrong.splitlines()[0] + '; ' + decoder.install if wrong else 'works'}")
    choose_decoder("auto")  # an error if none works


def report_libraries() -> bool:
    """Print the versions of what the package needs. -> whether all are there but optional ones"""
    print("\nlibraries")
    try:
        stated = importlib.metadata.requires("hpm-video") or []
    except importlib.metadata.PackageNotFoundError:
        stated = (Path(__file__).parents[1] / "requirements.txt").read_text().splitlines()
    complete = True
    for requirement in stated:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        if not name or ("extra ==" in requirement and name not in OPTIONAL):
            continue
        optional = " (optional)" if name in OPTIONAL else ""
        try:
            print(f"  {name:18} {importlib.metadata.version(name)}{optional}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {name:18} missing{optional}: pip install '{requirement.partition(';')[0]}'")
            complete = complete and bool(optional)
    return complete


if __name__ == "__main__":
    sys.exit(main())
