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
REMEDIES = {
    "train_": "recipe.batch_size and engine.micro_batch",
    "gradient_accumulation_steps": "engine.micro_batch and the number of processes",
    "gradient_clipping": "recipe.clip_grad",
    "zero_optimization": "engine.zero_stage and engine.offload",
    "": "engine.precision",
}
"""Keys of the config that a user's file must not contradict, by the beginning of its own key."""
OF_THE_RECIPE = "but that is part of the recipe; leave it out and set recipe.* of the config"
NOT_FOLLOWED = "which shards or rounds weights in a way that a teacher cannot follow; leave it out"
REFUSED = {
    "optimizer": OF_THE_RECIPE,
    "scheduler": OF_THE_RECIPE,
    "zero_optimization.zero_hpz_partition_size": NOT_FOLLOWED,
    "zero_optimization.zero_quantized_weights": NOT_FOLLOWED,
    "zero_optimization.zero_quantized_nontrainable_weights": NOT_FOLLOWED,
    "zero_optimization.zero_quantized_gradients": NOT_FOLLOWED,
    "zero_optimization.mics_shard_size": NOT_FOLLOWED,
    "zero_optimization.offload_optimizer.ratio": "and a part of the optimizer's state could not be "
    "saved; leave it out",
}
"""What the user's file must not have."""


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
        # DeepSpeed clips at 1 where this is not said.
        "gradient_clipping": clip_grad or 0.0,
        "zero_optimization": {
            "stage": how.stage,
            "offload_optimizer": {"device": "none" if how.offload == "none" else "cpu"},
            "offload_param": {"device": "cpu" if how.offload == "all" else "none"},
        },
        "torch_autocast": {"enabled": is_bf16, **({"dtype": "bfloat16"} if is_bf16 else {})},
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
    }
    return _merged(decided, _merged(USUAL, own, own_wins=True))


def _read_settings(path: Path) -> Settings:
    try:
        own = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read engine.deepspeed={path}: {error}") from error
    if not isinstance(own, dict):
        raise EngineError(f"engine.deepspeed={path} must hold a JSON object")
    for name, why in REFUSED.items():
        value: Any = own
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and not (name.endswith("ratio") and value == 1):
            raise EngineError(f"engine.deepspeed has {name}, {why}")
    return own


def _merged(decided: Settings, own: Settings, at: str = "", *, own_wins: bool = False) -> Settings:
    """Return ``own`` with everything that is decided, which it must not contradict or else wins."""
    merged = dict(own)
    for key, value in decided.items():
        there = own.get(key, "auto")
        if isinstance(value, dict) and (isinstance(there, Mapping) or key not in own):
            inner = dict(own.get(key, {}))
            merged[key] = _merged(value, inner, f"{at}{key}.", own_wins=own_wins)
        elif key not in own or there in ("auto", value):
            merged[key] = value
        elif not own_wins:
            name = f"{at}{key}"
            remedy = next(each for start, each in REMEDIES.items() if name.startswith(start))
            raise EngineError(
                f"engine.deepspeed says {name}={there!r}, and the run {value!r}; leave it out of "
                f'the file (or write "auto"), and set {remedy}'
            )
    return merged
