"""Compiling, the one place for it.

A model checkpoints its activations itself, is compiled here, in place, and only then wrapped by an
engine. Checkpoints know nothing of it.
"""

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from hpm_video.config.choices import TransformerSize
from hpm_video.config.training import CompileMode, EngineConfig
from hpm_video.models.vit import Block, Transformer
from hpm_video.training.distributed import first_to_say

log = logging.getLogger(__name__)

HOW: dict[str, Any] = {"dynamic": False, "options": {"deterministic": True}}
"""Kernels depend on the shapes that they are called with, not on those of batches before, and none
is chosen by its measured speed: a run that goes on computes the same bits."""
GRAPHS = 64
"""Shapes and modes of the same code beyond which torch no longer compiles: it stops at 8 otherwise.
"""
OF_OBJECTIVES = ("normalised", "errors")
"""Methods of objectives that are compiled, where they have them."""


def choose_compiling(how: EngineConfig, device: torch.device) -> CompileMode:
    """Return what is compiled by ``engine.compile``: nothing where nothing can be."""
    mode = how.compile
    if mode == "auto":
        shards_weights = how.name == "deepspeed" and how.stage == 3
        mode = "blocks" if device.type == "cuda" and not shards_weights else "off"
    if mode != "off":
        try:
            _compile_something(device)
        except (RuntimeError, OSError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            if first_to_say(f"no compiler: {reason}"):
                log.warning(
                    "engine.compile=%s: nothing is compiled, which is slower and computes the "
                    "same, for there is no working compiler here (%s); engine.compile=off says so",
                    how.compile,
                    reason,
                )
            return "off"
        log.info(
            "compiling (engine.compile=%s): the first updates take longer, the others less time",
            mode,
        )
    return mode


def _compile_something(device: torch.device) -> None:
    """Compile a tiny block forward and backward, which needs all that a large one needs."""
    with torch.device("meta"):  # it draws no weights
        block = Block(TransformerSize(8, 1, 1))
    block.to_empty(device=device)
    make_fast("blocks", block)
    block(torch.zeros(2, 2, 8, device=device)).sum().backward()


def make_fast(mode: CompileMode, *parts: object) -> None:
    """Compile blocks or stacks of them, and what objectives compute beside models, in place."""
    if mode == "off":
        return
    import torch._dynamo.config as dynamo  # it takes a second

    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    dynamo.optimize_ddp = False  # it would cut blocks into pieces, to send gradients meanwhile
    for part in parts:
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if mode == "blocks" and isinstance(module, Block):
                module.compile(**HOW)
            elif mode == "model" and isinstance(module, Transformer):
                _compile_method(module, "run_blocks")
        for name in OF_OBJECTIVES:
            if hasattr(part, name):
                _compile_method(part, name)


def _compile_method(owner: object, name: str) -> None:
    setattr(owner, name, torch.compile(getattr(owner, name), **HOW))


def as_written(mode: CompileMode) -> AbstractContextManager[object]:
    """Return a context in which what is compiled runs as it is written: for shapes seen rarely."""
    return nullcontext() if mode == "off" else torch.compiler.set_stance("force_eager")


def compile_seconds() -> float:
    """Return how long this process has compiled so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.calculate_time_spent()["total_wall_time"] if dynamo else 0.0
