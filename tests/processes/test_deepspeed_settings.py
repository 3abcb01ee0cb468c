"""DeepSpeed's settings: those of the run, and a user's file beside them."""

import json

import pytest

from hpm_video.config.batch_plan import BatchPlan
from hpm_video.config.checks import ConfigError
from hpm_video.config.training import EngineConfig
from hpm_video.training.deepspeed_engine import settings_of
from hpm_video.training.device import EngineError

PLAN = BatchPlan(batch_size=24, processes=2, micro_batch=4)


@pytest.fixture
def settings(tmp_path):
    """Make DeepSpeed's settings with a file that holds the user's ``own``."""

    def make(own=None, stage=2, clip_grad=0.5, precision="fp32", offload="none"):
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(own or {}))
        own_file = {"name": "deepspeed", "deepspeed": str(path)}
        engine = EngineConfig(**own_file, zero_stage=stage, offload=offload)
        return settings_of(engine, PLAN, clip_grad=clip_grad, precision=precision)

    return make


def test_the_run_decides(settings):
    found = settings()
    assert found["train_batch_size"] == 24
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_accumulation_steps"] == 3
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"]["stage"] == 2
    assert not found["torch_autocast"]["enabled"]
    assert settings(clip_grad=None)["gradient_clipping"] == 0.0, "by default DeepSpeed clips"
    autocast = settings(precision="bf16")["torch_autocast"]
    assert (autocast["enabled"], autocast["dtype"]) == (True, "bfloat16")
    spread = settings(stage=3, offload="all")["zero_optimization"]
    assert spread["offload_optimizer"]["device"] == spread["offload_param"]["device"] == "cpu"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_never_converted(precision, settings):
    found = settings(precision=precision)
    assert found["fp16"] == found["bf16"] == {"enabled": False}


def test_a_file_adds_and_may_leave_open_or_repeat(settings):
    own = {
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 100000,
            "offload_optimizer": {"device": "auto", "pin_memory": True},
        },
        "train_batch_size": "auto",
        "gradient_clipping": 0.5,
        "fp16": {"enabled": False, "loss_scale": 0},
        "steps_per_print": 10,
        "wall_clock_breakdown": True,
    }
    found = settings(own)
    assert found["zero_optimization"]["reduce_bucket_size"] == 100000
    assert found["zero_optimization"]["stage"] == 2
    offload = {"device": "none", "ratio": 1, "pin_memory": True}
    assert found["zero_optimization"]["offload_optimizer"] == offload
    assert (found["train_batch_size"], found["steps_per_print"]) == (24, 10)
    assert found["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=True"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled=True"),
        ({"train_batch_size": 32}, "train_batch_size=32"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu=8"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3"),
        ({"zero_optimization": 2}, "zero_optimization=2"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer.type='AdamW'"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type='WarmupLR'"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device='cpu'",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}},
            "zero_optimization.offload_optimizer.ratio=0.5",
        ),
        (
            {"zero_optimization": {"zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights=True",
        ),
    ],
)
def test_a_file_that_contradicts_is_refused_by_name(own, name, settings):
    with pytest.raises(EngineError, match="leave it out") as refused:
        settings(own)
    assert f"engine.deepspeed says {name}, and the run " in str(refused.value)


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_a_file_that_is_no_object_is_named(tmp_path, text):
    path = tmp_path / "settings.json"
    if text is not None:
        path.write_text(text)
    engine = EngineConfig(name="deepspeed", deepspeed=str(path))
    with pytest.raises(EngineError, match=r"engine\.deepspeed=.*settings\.json"):
        settings_of(engine, PLAN, clip_grad=None, precision="fp32")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"offload": "optimizer"}, "engine.offload=optimizer needs engine.name=deepspeed"),
        ({"zero_stage": 2}, "engine.zero_stage=2 needs engine.name=deepspeed"),
        (
            {"name": "deepspeed", "zero_stage": 0, "offload": "optimizer"},
            "engine.offload=optimizer needs engine.zero_stage=1 or higher, got 0",
        ),
        (
            {"name": "deepspeed", "zero_stage": 2, "offload": "all"},
            "engine.offload=all needs engine.zero_stage=3 or higher, got 2",
        ),
    ],
)
def test_sharding_that_does_not_exist_is_refused_by_the_config(values, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**values)
