from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpm_video.config.loading import load_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.models.from_config import build_student
from hpm_video.runs.autotune import trial_update
from hpm_video.runs.finetuning import Finetuning, resolve
from hpm_video.runs.pretraining import Pretraining
from hpm_video.training.memory import (
    LiveStorages,
    SimulatedMemory,
    activation_bytes,
    describe_memory,
    measure_update,
    simulate_update,
    training_memory,
)

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = torch.device("cpu")


def zero(stage, reduce=500_000_000, live=10**9, prefetch=50_000_000, offload=()):
    """DeepSpeed's section, by default with DeepSpeed's own sizes."""
    return {
        "stage": stage,
        "reduce_bucket_size": reduce,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live // 2,
        "stage3_prefetch_bucket_size": prefetch,
    } | {f"offload_{what}": {"device": "cpu"} for what in offload}


SMALL = {"reduce": 1000, "live": 4000, "prefetch": 500}


def load_pretraining(name, *overrides):
    return load_config(PretrainConfig, CONFIGS / "pretrain" / f"{name}.yaml", overrides)


def update_of(config, clips, precision="fp32", task=Pretraining):
    return partial(trial_update, task(config), CPU, precision, clips)


# --- Formulas -----------------------------------------------------------------------------------


def test_without_zero_all_is_held_in_float32():
    memory = training_memory(100, 100, 8)
    assert memory.device == {
        "weights": 400,
        "master": 0,
        "moments": 800,
        "gradients": 400,
        "teacher": 400,
        "buffers": 0,
    }
    assert not memory.host


PER_PARAMETER = {  # with 8 processes: weights, master weights, moments, gradients, teacher
    0: (4, 0, 8, 4, 4),
    1: (4, 0.5, 1, 4, 4),
    2: (4, 0.5, 1, 1, 4),
    3: (0.5, 0.5, 1, 0.5, 0.5),
}


@pytest.mark.parametrize("stage", PER_PARAMETER)
def test_state_of_each_stage(stage):
    memory = training_memory(8000, 8000, 8, zero(stage, **SMALL))
    *parts, _ = memory.device.values()
    assert tuple(part / 8000 for part in parts) == PER_PARAMETER[stage]


@pytest.mark.parametrize(
    ("stage", "buffers"),
    [
        (0, 4 * 8000),  # a copy of all gradients
        (1, 4 * 1000),
        (2, 4 * 1000),
        (3, 4 * (1000 + 1000 + 4000 + 500)),
    ],
)
def test_buffers_of_each_stage(stage, buffers):
    memory = training_memory(8000, 0, 8, zero(stage, **SMALL))
    assert memory.device["buffers"] == buffers


def test_a_small_model_is_gathered_whole_and_its_bucket_is_as_large_as_any():
    memory = training_memory(300, 0, 8, zero(3, **SMALL))
    assert memory.device["buffers"] == 4 * (1000 + 300 + 300 + 300)


@given(
    st.integers(1, 10**10),
    st.integers(1, 4096),
    st.sampled_from([(1, False), (2, False), (3, False), (3, True)]),
)
def test_offloading_moves_state_to_the_host_and_loses_none(parameters, processes, how):
    stage, also_parameters = how
    both, offload = (parameters, parameters), ("optimizer", *["param"] * also_parameters)
    kept = training_memory(*both, processes, zero(stage))
    moved = training_memory(*both, processes, zero(stage, offload=offload))
    for name in ("weights", "master", "moments", "teacher"):
        assert moved.device[name] + moved.host[name] == kept.device[name]
    assert not moved.device["master"] + moved.device["moments"]
    assert bool(moved.device["weights"]) != also_parameters
    assert sum(moved.device.values()) < sum(kept.device.values())


@given(st.integers(10**7, 10**10), st.integers(2, 4096))
def test_with_small_buffers_every_further_stage_needs_less(parameters, processes):
    small = {"reduce": 1, "live": 1, "prefetch": 0}
    sizes = [
        sum(
            training_memory(parameters, parameters, processes, zero(stage, **small)).device.values()
        )
        for stage in (0, 1, 2, 3)
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_table_for_the_terminal():
    offloaded = zero(2, reduce=25_000_000, offload=["optimizer"])
    memory = training_memory(100_000_000, 100_000_000, 8, offloaded)
    assert describe_memory(memory, 2.5e9) == "\n".join(
        [
            "GB of each process      device      host",
            "weights                   0.40      0.00",
            "master                    0.00      0.05",
            "moments                   0.00      0.10",
            "gradients                 0.00      0.10",
            "teacher                   0.40      0.00",
            "buffers                   0.10      0.05",
            "activations               2.50      0.00",
            "together                  3.40      0.30",
        ]
    )


# --- Storages -----------------------------------------------------------------------------------


def test_each_storage_is_counted_once_and_until_it_is_freed():
    with LiveStorages() as live:
        kept = torch.zeros(1000)
        view = kept[10:].view(2, -1)
        kept += 1
        assert live.now == 4000
        other = view * 2
        assert live.now == 4000 + 3960
        del other
        assert (live.now, live.peak) == (4000, 7960)
        del kept
        assert live.now == 4000  # the view keeps it alive
        del view
        assert live.now == 0
        assert live.peak == 7960


def test_a_simulation_holds_no_memory_and_leaves_no_trace():
    simulated = simulate_update(lambda: partial(torch.zeros, 10**14))
    assert simulated == SimulatedMemory(0, 4 * 10**14)
    assert simulated.activations == 4 * 10**14
    assert torch.zeros(1).tolist() == [0]


def test_activations_are_on_the_line_through_two_simulations():
    measured = {4: SimulatedMemory(100, 100 + 30), 2: SimulatedMemory(100, 100 + 20)}
    assert activation_bytes(measured) == (5, 10)


@pytest.mark.parametrize(
    ("precision", "overrides"),
    [
        ("fp32", ()),
        ("bf16", ()),
        ("bf16", ("model.checkpoint_activations=true",)),
        ("fp32", ("model.drop_path=0.2", "mining.predictor=absolute")),
        ("fp32", ("mining.target=ema",)),
        ("bf16", ("mining.predictor=none", "masking.strategy=random")),
    ],
)
def test_simulated_is_what_tensors_of_a_real_update_hold(precision, overrides):
    """For every objective the operations are the same, and so are the bytes."""
    config = load_pretraining("demo", *overrides)
    make = update_of(config, 3, precision)
    assert simulate_update(make) == measure_update(make)


def test_simulated_fine_tuning_is_real_fine_tuning():
    config = load_config(FinetuneConfig, CONFIGS / "finetune" / "demo.yaml", ["init_weights=null"])
    make = update_of(resolve(config, 5), 4, "fp32", Finetuning)
    assert simulate_update(make) == measure_update(make)


def test_what_is_resident_and_what_gradients_need_is_the_formula():
    """With one clip the peak is at the end of the backward pass, when all gradients exist."""
    config = load_pretraining("demo", "model.encoder={dim: 768, depth: 12, num_heads: 12}")
    with torch.device("meta"):
        model = build_student(config)
    parameters = sum(p.numel() for p in model.parameters())
    state = training_memory(parameters, parameters, 1).device
    simulated = simulate_update(update_of(config, 1))
    positions = sum(4 * table.numel() for table in model.buffers())
    batch = 3 * 2**20  # with counters of the optimizer
    resident = sum(state.values()) - state["gradients"]
    assert resident + 2 * positions <= simulated.resident < resident + 2 * positions + batch
    assert state["gradients"] <= simulated.activations < 1.1 * state["gradients"]


def test_the_largest_update_is_simulated_with_no_memory_of_its_size():
    config = load_pretraining("k400_hpm_b")
    measured = {clips: simulate_update(update_of(config, clips, "bf16")) for clips in (8, 16)}
    per_clip, fixed = activation_bytes(measured)
    assert per_clip == pytest.approx(283e6, rel=0.02)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_student(config).parameters())
    # Independent of the clips: weights in bfloat16, which autocast keeps.
    assert fixed == pytest.approx(2 * parameters, rel=0.05)


GROWTH = """
import ctypes, sys
from pathlib import Path
import torch
from hpm_video.config.schema import PretrainConfig
from hpm_video.config.loading import load_config
from hpm_video.runs.autotune import trial_update
from hpm_video.runs.pretraining import Pretraining

# Large blocks (M_MMAP_THRESHOLD) return to the system when freed, so the peak is a true one.
ctypes.CDLL(None).mallopt(-3, 65536)
torch.set_num_threads(1)
config = load_config(PretrainConfig, Path(sys.argv[1]), sys.argv[2:])
for clips in (2, 6):
    update = trial_update(Pretraining(config), torch.device("cpu"), "fp32", clips)
    update()
    update()
    del update
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
WIDE = (
    "model.encoder={dim: 192, depth: 2, num_heads: 3}",
    "model.decoder={dim: 96, depth: 1, num_heads: 3}",
    "data.frame_size=[112, 112]",
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc here")
def test_the_process_grows_by_what_is_simulated_for_each_clip(start_program):
    """This measure is independent of tensors: the peak memory of the process.

    ``ru_maxrss`` would not do, as a process inherits it from the one that started it.
    """
    program = start_program("-c", GROWTH, CONFIGS / "pretrain" / "demo.yaml", *WIDE)
    output, _ = program.communicate()
    assert program.returncode == 0, output
    few, many = (1024 * int(line) for line in output.split())
    config = load_pretraining("demo", *WIDE)
    simulated = {clips: simulate_update(update_of(config, clips)).peak for clips in (2, 6)}
    growth = simulated[6] - simulated[2]
    assert growth > 50e6
    assert many - few == pytest.approx(growth, rel=0.25)
