"""Two processes compute what one does, whatever spreads the work, and wherever they are stopped."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import lines_of

from hpm_video.training.checkpoint import checkpoints_in, read_optimizer

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

JOB = Path(__file__).parent / "job.py"
SAME = 1e-5
HALF_A_BIT = 2**-9
"""The largest relative rounding error of bfloat16, which keeps 8 bits of a number."""
ROUNDINGS = {"zero3": 56}
USUAL_ROUNDINGS = 34
"""Roundings in a chain from pixels to a gradient: the embedding, six products and a GELU in each of
two blocks, the layer between them and the head, forward and backward. Stage 3 uses DeepSpeed's own
linear layer, 11 times in that chain, which also rounds before it adds the bias."""
SPREAD = f"engine.deepspeed={Path(__file__).parent / 'spread.json'}"
"""Without these settings such small parameters are never sharded, nor released between uses."""
OWN = f"engine.deepspeed={Path(__file__).parent / 'own.json'}"
ONE_BY_ONE = "engine.micro_batch=1"
"""Two passes per update in each of two processes; the default is one."""
ENGINES = {
    "ddp": (),
    **{f"zero{n}": ("engine.name=deepspeed", f"engine.zero_stage={n}") for n in range(4)},
}
ENGINES["zero3"] = (*ENGINES["zero3"], SPREAD)
WAYS = {
    **ENGINES,
    **{f"{engine}-2": (*ENGINES[engine], ONE_BY_ONE) for engine in ENGINES},
    "compiled-ddp": ("engine.compile=blocks",),
    "compiled-zero2": (*ENGINES["zero2"], "engine.compile=blocks"),
    "own1-2": (*ENGINES["zero1"], OWN, ONE_BY_ONE),
    "offload2": (*ENGINES["zero2"], "engine.offload=optimizer"),
    "offload3": (*ENGINES["zero3"], "engine.offload=all", "engine.deepspeed=null"),
}
"""Engines by name, with offloading, a user's own settings and compiled blocks."""
REDUCE_ONCE = ("ddp", "zero0", "zero1")
"""ZeRO 2 and 3 keep no whole gradients to accumulate: by design they reduce in every pass."""
IN_BF16 = ("ddp", "zero1", "zero3")
KINDS = ("video", "images", "classes")
EQUAL = {
    "video-ddp-2": "video",
    "video-zero3-2": "video",
    "again-ddp": "video",
    "again-zero3": "ema",
    "images-ddp": "images",
    "classes-zero2-2": "classes",
}
"""Names of uninterrupted runs, and of the run in one process that computes the same."""
LOOKS = ("video-ddp-2", "video-zero3-2")
"""For whole weights, and for sharded ones."""
NO_TRUE_GRADIENT = ("difficulty_decoder.head.bias", "difficulty_decoder.norm.bias")
"""They change all scores of a clip alike, but the ranking loss depends only on their order. Their
gradient is the rounding error of a sum that is zero, which Adam scales up to a step like any other.
The same holds for the keys' part of attention's biases, which the softmax ignores."""
CHAINS = {  # number of processes, engine, update in which the last process gets SIGTERM
    "c": ("video", [(2, "zero0-2", 1), (2, "compiled-ddp", 4), (1, "zero1", None)]),
    "g": ("probe", [(2, "zero1", 1), (2, "ddp", None)]),
    "b": ("video", [(1, "ddp", 1), (2, "compiled-zero2", 4), (2, "zero3", None)]),
    "a": ("video", [(2, "offload3", 1), (2, "own1-2", 4), (1, "ddp", None)]),
    "e": ("classes", [(2, "zero3", 1), (2, "zero1", 4), (1, "zero3", None)]),
    "f": ("images", [(1, "ddp", 1), (2, "zero3", 4), (2, "offload2", None)]),
}
"""Chains without stage 3 come first."""
READ = """
import sys
from pathlib import Path
from safetensors.numpy import load_file
found = 0
for path in Path(sys.argv[1]).rglob("update-*/*.safetensors"):
    for name, value in load_file(path).items():
        assert value.size > 0, (path, name)
        found += 1
print(found)
assert not {"torch", "deepspeed", "hpm_video"} & set(sys.modules)
"""


@dataclass
class Jobs:
    """Runs the cases of all jobs, and knows what they left."""

    folder: Path
    configs: dict[str, Path]
    start_job: Callable
    output: str = ""

    def case(self, name, kind, *overrides, run=None, listen=(), stop=None):
        """A case for job.py: a run in the folder ``run``, by default ``name``."""
        return {
            "name": name,
            "program": "finetune" if kind in ("classes", "probe") else "pretrain",
            "config": str(self.configs[kind]),
            "overrides": [f"output_dir={self.run(run or name)}", *overrides],
            "listen": list(listen),
            "stop": stop,
        }

    def start(self, processes, cases):
        """Run the cases one after the other, in the same processes."""
        path = self.folder / "cases.json"
        path.write_text(json.dumps(cases))
        programs = self.start_job(processes, JOB, path, self.folder)
        for program in programs:
            self.output += f"\n{program.communicate()[0]}\ncode {program.returncode}"

    def run(self, name) -> Path:
        """The directory of a run."""
        return self.folder / "runs" / name

    def seen(self, name, rank=0):
        """What the listeners of a process recorded in a case."""
        path = self.folder / f"{name}-{rank}.json"
        assert path.exists(), f"{name} did not end:\n{self.output[-8000:]}"
        return json.loads(path.read_text())


@pytest.fixture(scope="module")
def jobs(small_configs, small_data, start_job, tmp_path_factory):
    """All cases, in three starts: first one process, then two, and one again.

    After stage 3 a process keeps DeepSpeed's own linear layer, which rounds bfloat16 differently:
    so stage 3 comes last.
    """
    folder = tmp_path_factory.mktemp("same results")
    made = Jobs(folder, small_configs | {"probe": probe_config(small_configs, folder)}, start_job)
    looks = [f"knn.{split}={small_data / 'labelled' / split}" for split in ("train", "validation")]
    looks += ["logging.validate_every_epochs=1"]
    bf16 = ("engine.precision=bf16", "engine.micro_batch=2")
    again = "model.checkpoint_activations=true"
    made.start(
        1,
        [
            made.case("video", "video", *looks, listen=["files", "opened"]),
            made.case("images", "images"),
            made.case("classes", "classes"),
            made.case("bf16", "video", *bf16),
            made.case("probe", "probe", "engine.micro_batch=2"),
            made.case("ema", "video", "mining.target=ema"),
            *parts_of_chains(made, 1, first=True),
        ],
    )
    bad = put_a_bad_file(made, small_data)
    three = ("recipe.batch_size=6", "recipe.epochs=1", ONE_BY_ONE)
    shares = ["files", "opened"]
    zero3 = WAYS["zero3"]
    made.start(
        2,
        [
            made.case("video-ddp-2", "video", ONE_BY_ONE, *looks, listen=shares),
            made.case("again-ddp", "video", again, listen=shares),
            made.case("images-ddp", "images"),
            made.case("classes-zero2-2", "classes", *WAYS["zero2-2"], listen=["wholes"]),
            made.case("bf16-ddp", "video", *bf16),
            made.case("bf16-zero1", "video", *bf16, *WAYS["zero1"]),
            *(
                made.case(f"reduced-{name}", "images", *three, *WAYS[name], listen=["reductions"])
                for name in REDUCE_ONCE
            ),
            made.case("probe-ddp", "probe", listen=["statistics"]),
            made.case("bad-two", "video", *bad, listen=["opened"]),
            *parts_of_chains(made, 2),
            made.case("bf16-zero3", "video", *bf16, *zero3),
            made.case(
                "video-zero3-2", "video", ONE_BY_ONE, *zero3, *looks, listen=[*shares, "wholes"]
            ),
            made.case(
                "again-zero3", "video", again, "mining.target=ema", *zero3, listen=["settings"]
            ),
            made.case("probe-zero3", "probe", *zero3, listen=["statistics"]),
        ],
    )
    made.start(1, [made.case("bad-one", "video", *bad), *parts_of_chains(made, 1, first=False)])
    return made


def parts_of_chains(jobs, processes, first=None):
    """The parts of chains with this number of processes: only first ones, only others, or all."""
    return [
        jobs.case(
            f"{chain}{n}",
            kind,
            *WAYS[way],
            "checkpoint.keep_last=9",
            run=chain,
            stop=stop,
            listen=["settings"],
        )
        for chain, (kind, parts) in CHAINS.items()
        for n, (count, way, stop) in enumerate(parts)
        if count == processes and first in (None, n == 0)
    ]


def probe_config(configs, folder):
    """A linear probe, made from the config for fine-tuning."""
    text = configs["classes"].read_text()
    for before, after in {
        "init: xavier": "pooling: batch_norm\n  frozen: true\n  init: xavier",
        "head_dropout: 0.2": "head_init_scale: 1.0",
        "drop_path: 0.2": "drop_path: 0.0",
        "average_momentum: 0.8": "optimizer: sgd",
        "weights: average": "weights: model",
        "repeats: 2": "repeats: 1",
        "base_lr: 0.1": "base_lr: 1.0",
    }.items():
        assert before in text
        text = text.replace(before, after)
    path = folder / "probe.yaml"
    path.write_text(text)
    return path


def put_a_bad_file(jobs, small_data):
    """Let one file not decode: it is in the second half of a batch in the first epoch."""
    files = [file for batch in jobs.seen("video")["files"] for file in batch]
    name = files[6].rpartition("/")[2]
    folder = jobs.folder / "with a bad file"
    folder.mkdir()
    for path in (small_data / "videos" / "train").iterdir():
        if path.name == name:
            (folder / name).touch()
        else:
            (folder / path.name).symlink_to(path)
    return f"data.train={folder}", "data.max_bad_share=0.2", "recipe.epochs=1"


def newest(run):
    return checkpoints_in(run / "checkpoints")[-1]


def with_true_gradient(tensors):
    """Those tensors (weights or moments) and parts of tensors whose true gradient is not zero."""
    found = {key: value for key, value in tensors.items() if not key.endswith(NO_TRUE_GRADIENT)}
    for key in [key for key in found if key.endswith(".attn.qkv.bias")]:
        queries, _, values = found[key].chunk(3)
        found[key] = torch.cat([queries, values])
    return found


def weight_differences(run, reference):
    """The largest difference of each tensor of student and teacher, or of the EMA."""
    ours, theirs = newest(run), newest(reference)
    assert ours.name == theirs.name
    found = {}
    for path in theirs.glob("*.safetensors"):
        expected, values = load_file(path), load_file(ours / path.name)
        assert {key: value.shape for key, value in values.items()} == {
            key: value.shape for key, value in expected.items()
        }
        expected = with_true_gradient(expected)
        for key, value in with_true_gradient(values).items():
            found[f"{path.stem} {key}"] = (value - expected[key]).abs().max().item()
    assert any(name.startswith(("teacher ", "average ", "optimizer momentum")) for name in found)
    ours, theirs = (read_optimizer(path, (2, 8, 8)) for path in (ours, theirs))
    assert ours.step == theirs.step
    return found


def measure_differences(run, reference, kinds=("train", "validation")):
    """The largest difference of each measure over all lines in the metrics of ``run``."""
    ours = [line for line in lines_of(run) if line["kind"] in kinds]
    theirs = {(line["kind"], line["update"]): line for line in lines_of(reference)}
    assert {line["kind"] for line in ours} == set(kinds)
    found = {}
    for line in ours:
        expected = theirs[line["kind"], line["update"]]
        assert line.keys() == expected.keys()
        for name in line.keys() - {"kind", "clips_per_second", "data_wait"}:
            key = f"{line['kind']} {name}"
            found[key] = max(found.get(key, 0.0), abs(line[name] - expected[name]))
    return found


def assert_same(run, reference, tolerance=SAME, **options):
    differences = weight_differences(run, reference) | measure_differences(
        run, reference, **options
    )
    wrong = {name: value for name, value in differences.items() if value > tolerance}
    assert not wrong


@pytest.mark.parametrize(("name", "reference"), EQUAL.items())
def test_two_processes_compute_what_one_does(jobs, name, reference):
    """Weights are whole or sharded, activations kept or recomputed; chains cover other engines."""
    jobs.seen(name)
    assert_same(jobs.run(name), jobs.run(reference))


def test_the_updates_that_are_compared_mine_and_clip(jobs):
    for kind in KINDS:
        lines = [line for line in lines_of(jobs.run(kind)) if line["kind"] == "train"]
        assert [line["update"] for line in lines] == [*range(1, len(lines) + 1)]
        assert len(lines) >= 7
        if kind != "classes":
            assert min(line["hard_fraction"] for line in lines) > 0.3
        if kind != "images":
            limit = {"video": 0.15, "classes": 1.0}[kind]
            assert sum(line["gradient_norm"] > limit for line in lines) > 3
    start = load_file(jobs.run("b") / "checkpoints" / "update-00000002" / "model.safetensors")
    end = load_file(newest(jobs.run("b")) / "model.safetensors")
    assert max((end[name] - start[name]).abs().max() for name in end) > 100 * SAME


@pytest.mark.parametrize("engine", IN_BF16)
def test_bf16_is_near(jobs, engine):
    """Near to one process with passes of the same size, however the processor rounds.

    At worst all rounding errors add up. Relative to the norm of the gradient, the moments have this
    error too, as none of them is larger than it. Adam changes a weight by at most the learning
    rate, and a gradient near zero may have either sign.
    """
    jobs.seen(f"bf16-{engine}")
    lines = [line for line in lines_of(jobs.run("bf16")) if line["kind"] == "train"]
    error = ROUNDINGS.get(engine, USUAL_ROUNDINGS) * HALF_A_BIT
    allowed = {
        f"train {name}": error * max(line[name] for line in lines)
        for name in lines[0]
        if name.endswith(("loss", "reconstruction", "prediction", "gradient_norm"))
    }
    found = measure_differences(jobs.run(f"bf16-{engine}"), jobs.run("bf16"), ["train"])
    for name, value in weight_differences(jobs.run(f"bf16-{engine}"), jobs.run("bf16")).items():
        found[name] = value
        if name.startswith("optimizer "):
            allowed[name] = allowed["train gradient_norm"]
        else:
            allowed[name] = 2 * sum(line["lr"] for line in lines)
    assert {name for name in found if found[name] > allowed.get(name, SAME)} == set()
    of_precision = weight_differences(jobs.run("bf16"), jobs.run("video"))
    assert max(of_precision.values()) > 10 * SAME, "it is bfloat16"


def test_settings_reach_deepspeed(jobs):
    for rank in (0, 1):
        offload2, offload3, own1, spread = (
            jobs.seen(name, rank)["settings"] for name in ("f2", "a0", "a1", "again-zero3")
        )
        assert offload2["offload"] == ["cpu", "none"]
        assert offload3["offload"] == ["cpu", "cpu"]
        assert own1["reduce_bucket_size"] == 100000
        assert spread["kept_whole_below"] == 0
        assert offload3["kept_whole_below"] > 0
        for found in (offload3, own1, spread):
            assert (found["train_batch_size"], found["gradient_clipping"]) == (4, 0.15)


@pytest.mark.parametrize("engine", REDUCE_ONCE)
def test_gradients_are_reduced_once_per_update(jobs, engine):
    """Only the last of three passes reduces, and each value once."""
    weights = load_file(newest(jobs.run(f"reduced-{engine}")) / "model.safetensors")
    learning = sum(value.numel() for value in weights.values())
    passes = jobs.seen(f"reduced-{engine}")["reduced"]
    assert len(passes) == 3
    assert passes[:2] == [[], []]
    assert [count for count in passes[2] if count > learning / 10] == [learning]
    assert sum(count for count in passes[2] if count <= learning / 10) <= 4


def test_processes_share_the_batches_of_one(jobs):
    """They open no file of each other's share, including validation files."""
    alone = jobs.seen("video")
    for name, accumulate in (("video-ddp-2", 2), ("video-zero3-2", 2), ("again-ddp", 1)):
        shares = [jobs.seen(name, rank) for rank in (0, 1)]
        batches = [joined_passes(share["files"], accumulate) for share in shares]
        assert [a + b for a, b in zip(*batches, strict=True)] == alone["files"]
        for share, seen in zip(batches, shares, strict=True):
            trained = [file for batch in share for file in batch]
            assert [file for file in seen["opened"] if "/videos/train/" in file] == trained
        # The first process opens all validation files to draw them; otherwise each has one reader.
        looks = name in LOOKS
        for folder in ("/labelled/", "/videos/validation/"):
            once = [{f for f in seen["opened"] if folder in f} for seen in shares]
            if looks or folder != "/labelled/":
                assert once[0] | once[1] == {f for f in alone["opened"] if folder in f}
            if folder == "/labelled/":
                assert not once[0] & once[1]
                assert looks == any(once)


def joined_passes(passes, accumulate):
    """The files of each update."""
    return [sum(passes[n : n + accumulate], []) for n in range(0, len(passes), accumulate)]


def test_a_bad_file_of_the_second_process_is_noted_and_replaced_as_in_one(jobs):
    rows = (jobs.run("bad-two") / "bad_files.csv").read_text()
    assert rows == (jobs.run("bad-one") / "bad_files.csv").read_text()
    assert rows.count("\n") == 2
    bad = rows.splitlines()[1].rpartition(",")[0]
    assert [bad in jobs.seen("bad-two", rank)["opened"] for rank in (0, 1)] == [False, True]
    assert_same(jobs.run("bad-two"), jobs.run("bad-one"))


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_goes_on_with_another_number_of_processes_and_another_engine(jobs, chain):
    kind, parts = CHAINS[chain]
    reached = []
    for number, (count, _, stop) in enumerate(parts):
        seen = [jobs.seen(f"{chain}{number}", rank) for rank in range(count)]
        assert [one.get("interrupted") for one in seen] == [seen[0].get("interrupted")] * count
        if stop is None:
            assert "interrupted" not in seen[0]
        else:  # all processes know of the signal one update later
            reached.append(stop + count)
            message = f"stopped by SIGTERM before update {reached[-1]}"
            assert seen[0]["interrupted"] == [message, 75]
    stored = [path.name for path in checkpoints_in(jobs.run(chain) / "checkpoints")]
    assert stored[:-1] == [f"update-{update:08d}" for update in reached]
    assert all(4 * update % (9 if kind in ("classes", "probe") else 14) for update in reached)
    starts = (jobs.run(chain) / "starts.jsonl").read_text().splitlines()
    compiled = [json.loads(start)["engine"].endswith(", compiled (blocks)") for start in starts]
    assert compiled == [way.startswith("compiled") for _, way, _ in parts]
    # Running averages must be those of two processes.
    assert_same(jobs.run(chain), jobs.run("probe-ddp" if kind == "probe" else kind))
    updates = [line["update"] for line in lines_of(jobs.run(chain)) if line["kind"] == "train"]
    assert updates == [*range(1, len(updates) + 1)]


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_sgd_and_batch_statistics(jobs, engine):
    """Each process standardises with its own clips, as one process with two passes does; running
    averages cover all clips, in every process."""
    shares = [jobs.seen(f"probe-{engine}", rank)["statistics"] for rank in (0, 1)]
    assert shares[0] == shares[1]
    assert len(shares[0][-1]) == 2
    found = load_file(newest(jobs.run(f"probe-{engine}")) / "model.safetensors")
    reference = load_file(newest(jobs.run("probe")) / "model.safetensors")
    other = load_file(newest(jobs.run("probe-ddp")) / "model.safetensors")
    assert found.keys() == reference.keys()
    for name, value in found.items():
        if ".running_" in name:
            torch.testing.assert_close(value, other[name], rtol=0, atol=SAME)
        elif "num_batches" not in name:
            torch.testing.assert_close(value, reference[name], rtol=0, atol=SAME)
    assert (reference["head.weight"] - found["head.weight"]).abs().max() < SAME
    # If two clips of a pass hardly differ in a feature, standardising multiplies their
    # rounding errors by up to 1 / sqrt(eps) = 1000.
    losses = measure_differences(jobs.run(f"probe-{engine}"), jobs.run("probe"), ["train"])
    assert losses["train loss"] < 1e-7 * 1000


def test_checkpoints_are_read_without_this_package_or_torch(jobs):
    """safetensors alone reads them, including those of stage 3 and of interrupted runs."""
    found = subprocess.run(
        [sys.executable, "-c", READ, str(jobs.folder / "runs")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(found.stdout) > 3000


def test_one_parameter_at_a_time_is_whole_while_stage_3_saves(jobs):
    for rank in (0, 1):
        joined = jobs.seen("video-zero3-2", rank)["joined"]
        assert max(others for _, others in joined) == 0
        assert max(size for size, _ in joined) < sum(size for size, _ in joined) / 10
        assert not jobs.seen("classes-zero2-2", rank)["joined"]


@pytest.mark.parametrize("name", LOOKS)
def test_measures_and_pictures_are_logged_once_and_the_same(jobs, name):
    """All processes compute validation measures, neighbours and pictures; the first logs them."""
    run = jobs.run(name)
    events = [(line["kind"], line["update"]) for line in lines_of(run)]
    assert events == [(line["kind"], line["update"]) for line in lines_of(jobs.run("video"))]
    assert len(set(events)) == len(events)
    assert [kind for kind, _ in events].count("probe") == 2
    differences = measure_differences(run, jobs.run("video"), ["train", "validation", "probe"])
    assert max(differences.values()) < SAME
    assert [path.name for path in (run / "pictures").glob("*.png")] == [
        path.name for path in (jobs.run("video") / "pictures").glob("*.png")
    ]
    assert len((run / "starts.jsonl").read_text().splitlines()) == 1
