"""The configuration of DeepSpeed: a run's own settings, and those of the user's file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpm_video.config.batch_plan import BatchPlan
from hpm_video.config.training import EngineConfig
from hpm_video.training.device import Precision
from hpm_video.training.engine import EngineError

Settings = dict[str, Any]
USUAL: Settings = {
    "steps_per_print": None,
    "zero_allow_untested_optimizer": True,  # SGD
    "zero_force_ds_cpu_optimizer": False,
    # Or gradients of matrix products would be averaged in bfloat16, which DDP does not do.
    "torch_autocast": {"lower_precision_safe_modules": []},
    "zero_optimization": {
        # Elements. DeepSpeed's own sizes (500, 50, 1000 and 1000 million) are made for models of
        # many thousand million parameters: buffers would hold more than all of a ViT-H, and stage 3
        # would keep its weights gathered from the forward to the backward pass.
        "reduce_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 20_000_000,
        "stage3_max_live_parameters": 60_000_000,
        "stage3_max_reuse_distance": 60_000_000,
    },
}
"""What the user's file may change."""


def settings_of(
    how: EngineConfig, plan: BatchPlan, *, clip_grad: float | None, precision: Precision
) -> Settings:
    """Return the configuration that DeepSpeed gets.

    Raises:
        EngineError: the user's file cannot be read, or contradicts the run.
    """
    own = {} if how.deepspeed is None else _read_settings(Path(how.deepspeed).expanduser())
    is_bf16 = precision == "bf16"
    decided: Settings = {
        "train_batch_size": plan.batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulate,
        "gradient_clipping": clip_grad or 0.0,  # it clips at 1 unless told otherwise
        "optimizer": {"type": None},  # it gets the recipe's
        "scheduler": {"type": None},
        "zero_optimization": {
            "stage": how.stage,
            # With a smaller ratio, a part of the optimizer's state could not be saved.
            "offload_optimizer": {"device": "none" if how.offload == "none" else "cpu", "ratio": 1},
            "offload_param": {"device": "cpu" if how.offload == "all" else "none"},
            # These shard or round weights in a way that a teacher cannot follow.
            "zero_hpz_partition_size": 1,
            "zero_quantized_weights": False,
            "zero_quantized_nontrainable_weights": False,
            "zero_quantized_gradients": False,
        },
        "torch_autocast": {"enabled": is_bf16, **({"dtype": "bfloat16"} if is_bf16 else {})},
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
    }
    _refuse_contradictions(own, decided)
    return _merged(_merged(USUAL, own), decided)


def _read_settings(path: Path) -> Settings:
    """Read the user's file, without what it leaves open as ``auto``."""

    def given(part: Settings) -> Settings:
        return {key: value for key, value in part.items() if value != "auto"}

    try:
        own = json.loads(path.read_text(encoding="utf-8"), object_hook=given)
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read engine.deepspeed={path}: {error}") from error
    if not isinstance(own, dict):
        raise EngineError(f"engine.deepspeed={path} must hold a JSON object")
    return own


def _refuse_contradictions(
    own: Mapping[str, Any], decided: Mapping[str, Any], at: str = ""
) -> None:
    for key, value in decided.items():
        there = own.get(key, value)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            _refuse_contradictions(there, value, f"{at}{key}.")
        elif there != value:
            raise EngineError(
                f"engine.deepspeed says {at}{key}={there!r}, and the run {value!r}; leave it out "
                'of the file (or write "auto"): it follows from the recipe, the number of '
                "processes and engine.micro_batch, precision, zero_stage and offload of the config"
            )


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Settings:
    """Return the settings of both, of which ``above`` wins."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            merged[key] = _merged(below[key], above[key])
    return merged
