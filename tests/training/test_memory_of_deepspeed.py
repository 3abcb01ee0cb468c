"""The memory formulas against the sizes of DeepSpeed's tensors, with two processes on a CPU."""

import json

import pytest

from hpm_video.training.memory import training_memory

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
WIDTH, DEPTH, PROCESSES = 256, 40, 2
PARAMETERS = DEPTH * WIDTH**2
FEW, ALL = 80_000, 10**9


def zero(stage, live, *offloaded):
    """DeepSpeed's section; ``live`` is the number of parameters that stay gathered."""
    return {
        "stage": stage,
        "reduce_bucket_size": 300_000,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
        "stage3_prefetch_bucket_size": live,
    } | {f"offload_{what}": {"device": "cpu"} for what in offloaded}


CASES = {
    "0": zero(0, ALL),
    "1": zero(1, ALL),
    "2": zero(2, ALL),
    "3": zero(3, FEW),
    "3 gathered": zero(3, ALL),
    "1 offload": zero(1, ALL, "optimizer"),
    "2 offload": zero(2, ALL, "optimizer"),
    "3 offload": zero(3, FEW, "optimizer", "param"),
}
PROGRAM = """
import gc, json, logging, os, sys, warnings
import torch
from torch import nn
from hpm_video.training.deepspeed_engine import import_deepspeed
from hpm_video.training.memory import LiveStorages

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")
torch.set_num_threads(1)
width, depth = map(int, sys.argv[1:3])
deepspeed = import_deepspeed(torch.device("cpu"))  # which compiles nothing
deepspeed.init_distributed("gloo", verbose=False)
gc.freeze()  # collecting garbage among all modules takes longer than an update

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean()

found = {}
for name, zero in json.loads(sys.argv[4]).items():
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
        for _ in range(2):
            gc.collect()
            live.peak = live.now
            for _ in range(2):
                engine.backward(engine(torch.ones(1, width)))
                engine.step()
        found[name] = live.peak
    engine.destroy()
    del model, optimizer, engine
if os.environ["RANK"] == "0":
    with open(sys.argv[3], "w") as file:
        json.dump(found, file)
sys.stdout.flush()
os._exit(0)  # destroying process groups in order is not tested here
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory, start_job):
    """Peak bytes of a process in an update of two passes, on device and host together."""
    path = tmp_path_factory.mktemp("deepspeed") / "peaks.json"
    arguments = (WIDTH, DEPTH, path, json.dumps(CASES))
    processes = start_job(PROCESSES, "-c", PROGRAM, *arguments)
    output = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(output)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", CASES)
def test_deepspeed_holds_what_the_formula_says(peaks, name):
    memory = training_memory(PARAMETERS, 0, PROCESSES, CASES[name])
    # The rest is gradients and buffers of one or two layers, 1/40 of the model each.
    expected = sum(memory.device.values()) + sum(memory.host.values())
    assert peaks[name] == pytest.approx(expected, rel=0.05)
