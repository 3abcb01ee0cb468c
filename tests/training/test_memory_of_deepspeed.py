"""The formulas of memory against what DeepSpeed's tensors hold, with two processes on a CPU."""

import json

import pytest

from hpm_video.training.memory import Sharding, training_memory

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
WIDTH, DEPTH, PROCESSES = 256, 40, 2
PARAMETERS = DEPTH * WIDTH**2
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
import gc, json, logging, os, sys, warnings
import torch
from torch import nn
from hpm_video.training.deepspeed_engine import import_deepspeed
from hpm_video.training.memory import LiveStorages

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")
torch.set_num_threads(1)
width, depth, reduce = map(int, sys.argv[1:4])
deepspeed = import_deepspeed(torch.device("cpu"))  # which compiles nothing
deepspeed.init_distributed("gloo", verbose=False)

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean()

found = {}
for name, (stage, live_parameters, offloaded) in json.loads(sys.argv[5]).items():
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
        for _ in range(2):
            gc.collect()
            live.forget_peak()
            for _ in range(2):
                engine.backward(engine(torch.ones(1, width)))
                engine.step()
        found[name] = live.peak
    engine.destroy()
    del model, optimizer, engine
if os.environ["RANK"] == "0":
    with open(sys.argv[4], "w") as file:
        json.dump(found, file)
sys.stdout.flush()
os._exit(0)  # destroying process groups in order is not what is tested
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory, start_job):
    """Most bytes of a process in an update of two passes, on device and host together."""
    path = tmp_path_factory.mktemp("deepspeed") / "peaks.json"
    arguments = (WIDTH, DEPTH, REDUCE, path, json.dumps(CASES))
    processes = start_job(PROCESSES, "-c", PROGRAM, *arguments)
    output = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(output)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", CASES)
def test_deepspeed_holds_what_the_formula_says(peaks, name):
    stage, live, offloaded = CASES[name]
    sharding = Sharding(
        PROCESSES,
        stage,
        offload_optimizer="optimizer" in offloaded,
        offload_parameters="param" in offloaded,
        reduce=REDUCE,
        live=live,
        prefetch=live,
    )
    memory = training_memory(PARAMETERS, 0, sharding)
    # Beside it there are gradients and buffers of a layer or two, 1/40 of the model each.
    assert peaks[name] == pytest.approx(memory.device.total + memory.host.total, rel=0.05)
