"""The command of bench.py that measures levers: fidelity."""

import argparse
import statistics
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.data.manifest import read_manifest
from hpm_video.mining.validation import RANDOM, measure_levers
from hpm_video.recognition.inference import CLIPS_PER_PASS, Reading, find_failures
from hpm_video.runs.console import add_options, positive
from hpm_video.runs.cost import count_gmac
from hpm_video.runs.pretraining import load_run
from hpm_video.tokens.views import VIEWS
from hpm_video.training.device import choose_device
from hpm_video.training.distributed import Processes
from hpm_video.training.engine import Runner

SHARES = (0.75, 0.5, 0.25)
LEVERS = (
    *((view, 1.0) for view in (*VIEWS, RANDOM)),
    *(("all", share) for share in SHARES),
    ("checkerboard", 0.5),
    ("quarter", 0.5),
)
"""What the teacher's encoder sees, and the share of hidden tokens that the student decodes."""


def fidelity_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fidelity``."""
    add = parser.add_argument
    add("checkpoint", type=Path, help="checkpoint folder of pre-training")
    add("data", type=Path, help="manifest or folder of videos that it was not trained on")
    costs = "config whose GMAC are counted; default: the checkpoint's"
    add("--costs", type=Path, metavar="CONFIG", help=costs)
    add("--clips", type=positive, default=160, help="largest number of clips (default 160)")
    add("--seeds", type=positive, default=3, help="sets of random masks (default 3)")
    add_options(parser, "device", "root")


def bench_fidelity(arguments: argparse.Namespace) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Measure what cheaper updates cost in fidelity, and what they save: bench.py fidelity ...

    Prints the ranking accuracy of the teacher; the overlap of the tokens that it picks with those
    of a teacher that sees all tokens; and the ranking accuracy and error of the student on the
    tokens that it decodes. Each is a mean and a standard deviation over sets of random masks. GMAC
    are those of an update in which the teacher scores. Nothing is trained.
    """
    device = choose_device(arguments.device)
    config, student, objective = load_run(arguments.checkpoint, device)
    costs = load_config(PretrainConfig, arguments.costs, []) if arguments.costs else config
    if not objective.masks[""].strategy.picks:
        raise ConfigError(
            f"{arguments.checkpoint} was trained with masking.strategy={config.masking.strategy}, "
            f"so its teacher picks nothing; give a checkpoint of HPM"
        )
    replace(config.mining, teacher_sees="quarter")  # an error where its teacher must see all
    gmac = []
    for view, share in LEVERS:
        seen: Any = "all" if view == RANDOM else view
        mining = replace(costs.mining, teacher_sees=seen, decoded_share=share)
        of_student, of_teacher = count_gmac(replace(costs, mining=mining))
        gmac.append(of_student + (0 if view == RANDOM else of_teacher))
    reading = Reading.of(config.data)
    manifest = read_manifest(arguments.data, arguments.root).spread(arguments.clips)
    clips = reading.clips(manifest, config.data)
    find_failures(clips, reading, Processes())
    with closing(reading.batches(clips, range(len(clips)), CLIPS_PER_PASS)) as read:
        batches = list(read)
    runner, seeds = Runner(student, device, "fp32"), range(arguments.seeds)
    found = [measure_levers(objective, runner, batches, SHARES, seed) for seed in seeds]

    def spread(name: str) -> str:
        values = [measures[name] for measures in found]
        return f"{statistics.mean(values):.3f} +- {statistics.pstdev(values):.3f}"

    rows = [
        {
            "teacher sees": view,
            "decoded share": share,
            "teacher ranking": spread(f"{view}/ranking"),
            "overlap": spread(f"{view}/overlap"),
            "student ranking": spread(f"{share}/student_ranking"),
            "relative error": spread(f"{share}/relative_error"),
            "GMAC": cost,
            "of exact": cost / gmac[0],
        }
        for (view, share), cost in zip(LEVERS, gmac, strict=True)
    ]
    cost_of = arguments.costs or arguments.checkpoint
    yield f"{len(clips)} clips, {arguments.seeds} sets of masks; GMAC of {cost_of}", rows
