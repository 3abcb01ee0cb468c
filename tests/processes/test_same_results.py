"""Two processes compute what one does, whatever spreads the work, and wherever they are stopped."""

import csv
import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from hpm_video.training.checkpoint import checkpoints_in, read_optimizer

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

SAME = 1e-5
BF16 = 2e-3
"""Autocast rounds activations to 8 bits, and a sum of rounded parts is not the rounded sum; ZeRO
reduces the gradients of matrix products in bfloat16 too. Peak learning rate: 1.6e-3."""
ENGINES = {
    "ddp": (),
    **{f"zero{n}": ("engine.name=deepspeed", f"engine.zero_stage={n}") for n in range(4)},
}
KINDS = ("video", "images", "classes")
NO_TRUE_GRADIENT = ("difficulty_decoder.head.bias", "difficulty_decoder.transformer.norm.bias")
"""They move all scores of a clip alike, and the ranking loss asks for their order alone. Their
gradient is the rounding of a sum that is zero, which Adam scales up to a step like any other. The
same holds for the biases of attention's keys, which the softmax does not see."""
OWN = {
    "own1": {
        "zero_optimization": {"reduce_bucket_size": 100000, "overlap_comm": False},
        "train_batch_size": "auto",
    },
    # Otherwise such small parameters are never spread.
    "own3": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
}
CHAINS = {  # how many processes, which engine, in which update the last of them gets SIGTERM
    "a": ("video", [(2, "zero3", 1), (2, "zero1", 4), (1, "ddp", None)]),
    "b": ("video", [(1, "ddp", 1), (2, "zero2", 4), (2, "zero3", None)]),
    "c": ("video", [(2, "zero0", 1), (2, "ddp", 4), (1, "ddp", None)]),
    "d": ("video", [(1, "ddp", 4), (2, "ddp", None)]),
    "e": ("classes", [(2, "zero3", 1), (2, "zero1", 4), (1, "ddp", None)]),
    "f": ("images", [(1, "ddp", 1), (2, "zero3", 4), (2, "zero2", None)]),
    "g": ("probe", [(2, "zero1", 1), (2, "ddp", None)]),
}
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


def micro_batch(accumulate, share=2):
    return f"engine.micro_batch={share // accumulate}"


def parts_of(chain):
    """The parts of a chain that one job runs in turn: (processes, cases)."""
    kind, parts = CHAINS[chain]
    return [(count, f"{chain}{n}", kind, ENGINES[engine], stop)
            for n, (count, engine, stop) in enumerate(parts)]  # fmt: skip


@pytest.fixture(scope="module")
def jobs(new_jobs, small_data, tmp_path_factory):
    """All cases, in three starts: what one process does first, what two do, what one does last."""
    made = new_jobs("same results")
    probe = tmp_path_factory.mktemp("probe") / "probe.yaml"
    text = made.configs["classes"].read_text()
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
    probe.write_text(text)
    made.configs["probe"] = probe
    neighbours = [
        f"knn.{split}={small_data / 'labelled' / split}" for split in ("train", "validation")
    ]
    own = {}
    for name, settings in OWN.items():
        path = made.folder / f"{name}.settings"
        path.write_text(json.dumps(settings))
        own[name] = f"engine.deepspeed={path}"

    def chained(count, when):
        return [
            made.case(name, kind, *engine, "checkpoint.keep_last=9", run=chain, stop=stop)
            for chain in CHAINS
            for n, (its, name, kind, engine, stop) in enumerate(parts_of(chain))
            if its == count and when(n)
        ]

    made.start(
        1,
        [
            made.case("video", "video", *neighbours, listen=["files", "opened"], curves=True),
            made.case("images", "images"),
            made.case("classes", "classes"),
            made.case("bf16", "video", "engine.precision=bf16"),
            made.case("probe", "probe", "engine.micro_batch=2"),
            made.case("ema", "video", "mining.target=ema"),
            *chained(1, lambda n: n == 0),
        ],
    )
    bad = put_a_bad_file(made, small_data)
    made.start(
        2,
        [
            made.case(
                f"{kind}-{engine}-{accumulate}",
                kind,
                micro_batch(accumulate),
                *overrides,
                *(neighbours if (kind, accumulate) == ("video", 2) else ()),
                listen=["files", "opened", "wholes"] if kind == "video" else (),
                curves=(kind, engine, accumulate) in {("video", "ddp", 2), ("video", "zero3", 2)},
            )
            for kind in KINDS
            for engine, overrides in ENGINES.items()
            for accumulate in (1, 2)
        ]
        + [
            made.case(
                "offload2",
                "video",
                *ENGINES["zero2"],
                "engine.offload=optimizer",
                listen=["settings"],
            ),  # fmt: skip
            made.case(
                "offload3", "video", *ENGINES["zero3"], "engine.offload=all", listen=["settings"]
            ),  # fmt: skip
            made.case("own1", "video", *ENGINES["zero1"], own["own1"], listen=["settings"]),
            made.case("own3", "video", *ENGINES["zero3"], own["own3"], listen=["settings"]),
            made.case("again-ddp", "video", "model.checkpoint_activations=true", micro_batch(2)),
            made.case(
                "again-zero3",
                "video",
                "model.checkpoint_activations=true",
                micro_batch(2),
                *ENGINES["zero3"],
                own["own3"],
            ),  # fmt: skip
            made.case("ema-zero3", "video", "mining.target=ema", *ENGINES["zero3"], own["own3"]),
            made.case("bad-two", "video", *bad, listen=["opened"]),
        ]
        + [
            made.case(f"bf16-{name}", "video", "engine.precision=bf16", micro_batch(2), *engine)
            for name, engine in ENGINES.items()
        ]
        + [
            made.case(
                f"reduced-{name}",
                "images",
                "recipe.batch_size=6",
                "recipe.epochs=1",
                "engine.micro_batch=1",
                *engine,
                listen=["reductions"],
            )  # fmt: skip
            for name, engine in ENGINES.items()
        ]
        + [
            made.case(f"probe-{name}", "probe", *ENGINES[name], listen=["statistics"])
            for name in ("ddp", "zero1", "zero3")
        ]
        + chained(2, lambda n: True),
    )
    made.start(
        1,
        [
            made.case("bad-one", "video", *bad),
            *chained(1, lambda n: n > 0),
            made.case("alone-zero1", "video", *ENGINES["zero1"]),
            made.case("alone-zero3", "video", *ENGINES["zero3"], micro_batch(2, share=4)),
        ],
    )
    return made


def put_a_bad_file(jobs, small_data):
    """A file of the second half of a batch of the first epoch, and no other, does not decode."""
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


def has_true_gradient(name):
    return name not in NO_TRUE_GRADIENT and not name.endswith(".k_bias")


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weight_differences(run, reference):
    """The largest difference of each tensor: of the student and the teacher, or the average."""
    ours, theirs = newest(run), newest(reference)
    assert ours.name == theirs.name
    found = {}
    for path in theirs.glob("*.safetensors"):
        expected, values = load_file(path), load_file(ours / path.name)
        assert {key: value.shape for key, value in values.items()} == {
            key: value.shape for key, value in expected.items()
        }
        for key, value in values.items():
            name = key.removeprefix("exp_avg_sq.").removeprefix("exp_avg.")
            if has_true_gradient(name):
                found[f"{path.stem} {key}"] = (value - expected[key]).abs().max().item()
    assert any(name.startswith(("teacher ", "average ", "optimizer momentum")) for name in found)
    assert read_optimizer(ours).step == read_optimizer(theirs).step
    return found


def measure_differences(run, reference, kinds=("train", "held_out")):
    """The largest difference of each measure, over all lines of the log."""
    ours, theirs = (
        [line for line in lines_of(of) if line["kind"] in kinds] for of in (run, reference)
    )
    assert [(l["kind"], l["update"]) for l in ours] == [(l["kind"], l["update"]) for l in theirs]
    found = {}
    for line, expected in zip(ours, theirs, strict=True):
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


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_compute_what_one_does(jobs, kind, engine, accumulate):
    name = f"{kind}-{engine}-{accumulate}"
    jobs.seen(name)
    assert_same(jobs.run(name), jobs.run(kind))
