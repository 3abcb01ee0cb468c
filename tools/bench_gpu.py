"""Measure the updates in docs/speed.md on a GPU, in about five minutes: bench.py gpu.

That is `bench.py update` for ViT-B and ViT-L on video, and for ViT-B on images.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import bench_update  # type: ignore[import-not-found] # beside this file

from hpm_video.config.loading import find_config

CONFIGS = {"k400_hpm_b": 64, "k400_hpm_l": 32, "in1k_hpm_b": 256}
"""Configs and their clips per update."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set what `bench.py update` can be told."""
    parser.set_defaults(overrides=[], against=[], precision=None, compile=None, repeats=5)


def measure(arguments: argparse.Namespace) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Make the tables of one config after the other."""
    for name, clips in CONFIGS.items():
        arguments.config, arguments.clips = find_config(name), clips
        for title, rows in bench_update.measure(arguments):
            yield f"{name}: {title}", rows
