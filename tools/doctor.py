"""Report what is installed and what works here: python tools/doctor.py.

For anything that is missing it names the command that installs it.
"""

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import hpm_video

OPTIONAL = {
    "deepspeed": "ZeRO on several GPUs",
    "decord": "another decoder",
    "huggingface_hub": "the Hugging Face Hub",
    "wandb": "logging.trackers",
    "mlflow-skinny": "logging.trackers",
}
"""Optional extras of the package, and their purpose."""


def main(command_line: Sequence[str] | None = None) -> int:
    """Print the report. -> the exit code"""
    missing: list[str] = []
    try:
        from hpm_video.runs.console import exit_codes, make_parser, run

        codes = exit_codes("nothing is missing", "something that every run needs is missing")
        make_parser(__doc__, codes).parse_args(command_line)
        return run(lambda: missing.extend(report())) or (2 if missing else 0)
    except ImportError as error:
        report_libraries()
        print(f"\nerror: {error}; install what is missing, then this says more")
        return 2


def report() -> list[str]:
    """Print the whole report. -> what is missing and not optional"""
    import torch

    from hpm_video.training.device import choose_device, inference_precision

    device = choose_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"hpm_video {hpm_video.__version__} on Python {platform.python_version()}")
    print(f"{platform.system()} {platform.release()}, {os.cpu_count()} processors")
    print(f"device: {device.type} ({name}), precision of inference: {inference_precision(device)}")
    return [*report_libraries(), *report_decoders()]


def report_libraries() -> list[str]:
    """Print the versions of what the package needs. -> what is missing and not optional"""
    print("\nlibraries")
    missing = []
    for requirement in requirements():
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        use = f"optional, for {OPTIONAL[name]}" if name in OPTIONAL else ""
        try:
            print(f"  {name:18} {importlib.metadata.version(name):12} {use}".rstrip())
        except importlib.metadata.PackageNotFoundError:
            wanted = requirement.partition(";")[0].strip()
            print(f"  {name:18} missing      {use + ': ' if use else ''}pip install '{wanted}'")
            missing += [] if use else [name]
    return missing


def requirements() -> list[str]:
    """Return the requirements of the installed package, or those in the repository's file."""
    try:
        stated = importlib.metadata.requires("hpm-video") or []
    except importlib.metadata.PackageNotFoundError:
        lines = (Path(__file__).parents[1] / "requirements.txt").read_text().splitlines()
        return [line for line in lines if line.strip() and not line.startswith(("#", "-"))]
    return [line for line in stated if "extra ==" not in line or line.startswith((*OPTIONAL,))]


def report_decoders() -> list[str]:
    """Print which decoders can read a test video. -> "a decoder" if none can"""
    from hpm_video.decoding.registry import DECODERS, what_is_wrong

    print("\ndecoders of videos (images need none)")
    usable = 0
    for name, decoder in DECODERS.items():
        wrong = what_is_wrong(name)
        usable += not wrong
        print(f"  {name:18} {wrong.splitlines()[0] + '; ' + decoder.install if wrong else 'works'}")
    return [] if usable else ["a decoder"]


if __name__ == "__main__":
    sys.exit(main())
