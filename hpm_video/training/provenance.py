"""The origin of a run: what must be equal to repeat it bit by bit, and the rest."""

import json
import logging
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hpm_video
from hpm_video.config.batch_plan import BatchPlan
from hpm_video.decoding.registry import decoder_versions

log = logging.getLogger(__name__)
Facts = dict[str, Any]
CHANGE_NO_BIT = {"hpm_video", "commit", "python", "command", "time"}
"""Facts on which the last bits of a result do not depend."""


def gather_facts(device: torch.device, precision: str, engine: str, plan: BatchPlan) -> Facts:
    """What this process runs with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "hpm_video": hpm_video.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "decoders": decoder_versions(),
        "device": f"{device.type} {name or platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "engine": engine,
        "processes": plan.processes,
        "micro_batch": plan.micro_batch,
        "accumulate": plan.accumulate,
        "command": shlex.join(sys.argv),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def record_start(run_dir: Path, facts: Facts, first_update: int, before: Facts) -> None:
    """Add a line to ``starts.jsonl``, and warn of facts that were other ``before``."""
    for name, now in facts.items() if before else ():
        then = before.get(name)
        if name not in CHANGE_NO_BIT and then != now:
            what = "the last bits may differ from an uninterrupted run's"
            log.warning("%s: %s: %s -> %s", what, name, then, now)
    with (run_dir / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"first_update": first_update, **facts}) + "\n")


def _commit() -> str | None:
    """Return the commit of the checkout that the package runs from, ``+`` where it was changed."""
    git = ["git", "-C", str(Path(hpm_video.__file__).parent)]
    is_tracked = [*git, "ls-files", "--error-unmatch", "__init__.py"]
    describe = [*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        subprocess.check_output(is_tracked, stderr=subprocess.DEVNULL)
        return subprocess.check_output(describe, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return None
