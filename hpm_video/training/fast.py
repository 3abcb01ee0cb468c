"""Compiling, in place, before an engine wraps the model. Checkpoints are the same without it."""

import logging
import sys
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from hpm_video.config.training import CompileMode, EngineConfig
from hpm_video.models.vit import Block, Transformer

log = logging.getLogger(__name__)

HOW: dict[str, Any] = {"dynamic": False, "options": {"deterministic": True}}
"""Kernels depend only on the shapes that they are called with, not on those of earlier batches, and
none is chosen by its measured speed: a resumed run computes the same bits."""
GRAPHS = 64
"""Shapes and modes for which torch compiles the same code; by default 8."""
OF_OBJECTIVES = ("normalised", "errors")
"""Methods of objectives that are compiled, if an objective has them."""


def choose_compiling(how: EngineConfig, device: torch.device) -> CompileMode:
    """Return what ``engine.compile`` compiles on a device; ``off`` if there is no compiler."""
    mode = how.compile
    if mode == "auto":
        shards_weights = how.name == "deepspeed" and how.stage == 3
        mode = "blocks" if device.type == "cuda" and not shards_weights else "off"
    if mode != "off":
        try:
            _compile_something(device)
        except (RuntimeError, OSError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            log.warning("nothing is compiled: there is no working compiler here (%s)", reason)
            return "off"
        log.info("compiling (engine.compile=%s): the first updates take longer", mode)
    return mode


def _compile_something(device: torch.device) -> None:
    """Compile a small function, which needs the same compilers as a large one."""
    torch.compile(lambda values: values.square() + 1, **HOW)(torch.ones(8, device=device))


def make_fast(mode: CompileMode, *parts: object, residual: str = "fp32") -> None:
    """Compile blocks or stacks of blocks, and methods of objectives, in place."""
    set_residual(residual, *parts)
    if mode == "off":
        return
    # Products of fp32 matrices stay exact: they are few where autocast is on.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    import torch._dynamo.config as dynamo  # it takes a second

    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    dynamo.optimize_ddp = False  # it would cut blocks into pieces to send gradients early
    for module in _modules(parts):
        if mode == "blocks" and isinstance(module, Block):
            module.compile(**HOW)
        elif mode == "model" and isinstance(module, Transformer):
            _compile_method(module, "run_blocks")
    for part in parts:
        for name in OF_OBJECTIVES:
            if hasattr(part, name):
                _compile_method(part, name)


def set_residual(precision: str, *parts: object) -> None:
    """Set what ``engine.residual`` says in every transformer of ``parts``."""
    for module in _modules(parts):
        if isinstance(module, Transformer):
            module.bf16_residual = precision == "bf16"


def _modules(parts: Iterable[object]) -> list[nn.Module]:
    return [each for part in parts if isinstance(part, nn.Module) for each in part.modules()]


def _compile_method(owner: object, name: str) -> None:
    setattr(owner, name, torch.compile(getattr(owner, name), **HOW))


def as_written(mode: CompileMode) -> AbstractContextManager[object]:
    """Return a context in which compiled code runs eagerly, for shapes that are rare."""
    return nullcontext() if mode == "off" else torch.compiler.set_stance("force_eager")


def compile_seconds() -> float:
    """Return for how many seconds this process has compiled so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.calculate_time_spent()["total_wall_time"] if dynamo else 0.0
