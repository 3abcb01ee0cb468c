"""The formulas of memory against what DeepSpeed's tensors hold, with two processes on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpm_video.training.memory import Buckets, Sharding, training_memory

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
WIDTH, DEPTH, PROCESSES = 256, 40, 2
PARAMETERS = DEPTH * (WIDTH + 1) * WIDTH
REDUCE = 300_000
FEW, ALL = 80_000, 10**9
CASES = {  # stage, parameters that stay gathered, what is on the host
    "0": (0, ALL, ()),
    "1": (1, ALL, ()),
    "2": (2, ALL, ()),
    "3": (3, FEW, ()),
    "3 gathered": (3, ALL, ()),
    "1 offload": (1, ALL, ("optimizer",)),
    "2 offload": (2, ALL, ("optimizer",)),
    "3 offload": (3, FEW, ("optimizer", "param")),
}
PROGRAM = """
import gc, json, logging, os, sys
import torch
from torch import nn
import deepspeed
from hpm_video.training.memory import LiveStorages

logging.disable(logging.CRITICAL)
torch.set_num_threads(1)
rank, width, depth, reduce, path = *map(int, sys.argv[1:5]), sys.argv[5]
deepspeed.init_distributed("gloo", verbose=False)

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean()

found = {}
for name, (stage, live_parameters, offloaded) in json.loads(sys.argv[6]).items():
    zero = {
        "stage": stage,
        "reduce_bucket_size": reduce,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": live_parameters,
        "stage3_max_reuse_distance": live_parameters,
        "stage3_prefetch_bucket_size": live_parameters,
    } | {f"offload_{what}": {"device": "cpu"} for what in offloaded}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    with LiveStorages() as live:
        model = Deep()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for _ in range(3):
            gc.collect()
            live.forget_peak()
            for _ in range(2):
                engine.backward(engine(torch.ones(1, width)))
                engine.step()
        found[name] = live.peak
    engine.destroy()
    del model, optimizer, engine
if rank == 0:
    with open(path, "w") as file:
        json.dump(found, file)
sys.stdout.flush()
os._exit(0)  # destroying process groups in order is not what is tested
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory, reserve_port):
    """Most bytes of a process in an update of two passes, on device and host together."""
    folder = tmp_path_factory.mktemp("deepspeed")
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(reserve_port()),
        "WORLD_SIZE": str(PROCESSES),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    arguments = [*map(str, (WIDTH, DEPTH, REDUCE)), str(folder / "peaks.json"), json.dumps(CASES)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(rank), *arguments],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        output = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(output)
    return json.loads((folder / "peaks.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_deepspeed_holds_what_the_formula_says(peaks, name):
    stage, live, offloaded = CASES[name]
    sharding = Sharding(
        PROCESSES,
        stage,
        offload_optimizer="optimizer" in offloaded,
        offload_parameters="param" in offloaded,
        buckets=Buckets(REDUCE, live, live),
    )
    memory = training_memory(PARAMETERS, 0, sharding)
    # Beside it there are gradients and buffers of a layer or two, 1/40 of the model each.
    assert peaks[name] == pytest.approx(memory.device.total + memory.host.total, rel=0.05)
