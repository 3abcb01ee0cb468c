"""Two processes compute what one does, whatever spreads the work, and wherever they are stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import lines_of

from hpm_video.training.checkpoint import checkpoints_in, read_optimizer

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

SAME = 1e-5
HALF_A_BIT = 2**-9
"""The largest relative error of rounding to bfloat16, which keeps 8 bits of a number."""
ROUNDINGS = {"zero3": 56}
USUAL_ROUNDINGS = 34
"""One after another, from pixels to a gradient: the embedding, six products and a GELU in each of
two blocks, the layer between them and the head, forward and backward. Stage 3 has DeepSpeed's own
linear layer, of which there are 11 in that row, and it rounds before it adds the bias as well."""
SPREAD = Path(__file__).parent / "spread.json"
"""Otherwise such small parameters are never spread, nor let go of between their uses."""
ENGINES = {
    "ddp": (),
    **{f"zero{n}": ("engine.name=deepspeed", f"engine.zero_stage={n}") for n in range(4)},
}
ENGINES["zero3"] = (*ENGINES["zero3"], f"engine.deepspeed={SPREAD}")
USUAL = "engine.deepspeed=null"
REDUCE_ONCE = ("ddp", "zero0", "zero1")
"""ZeRO 2 and 3 keep no whole gradients to wait with: they reduce in every pass, by design."""
IN_BF16 = ("ddp", "zero1", "zero3")
KINDS = ("video", "images", "classes")
EQUAL = (  # every engine on videos; on other data and runs the chains below try more of them
    *(("video", engine, 2) for engine in ENGINES),
    ("video", "ddp", 1),
    ("images", "ddp", 1),
    ("classes", "ddp", 2),
    ("classes", "zero2", 2),
)
"""Kind of run, engine, passes per update."""
LOOKS = ("ddp", "zero3")
"""Of whole weights, and of such that are spread."""
NO_TRUE_GRADIENT = ("difficulty_decoder.head.bias", "difficulty_decoder.norm.bias")
"""They move all scores of a clip alike, and the ranking loss asks for their order alone. Their
gradient is the rounding of a sum that is zero, which Adam scales up to a step like any other. The
same holds for the keys' part of attention's biases, which the softmax does not see."""
OWN = {
    "own1": {
        "zero_optimization": {"reduce_bucket_size": 100000, "overlap_comm": False},
        "train_batch_size": "auto",
    },
    "own3": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
}
CHAINS = {  # how many processes, which engine, in which update the last of them gets SIGTERM
    "a": ("video", [(2, "zero3", 1), (2, "zero1", 4), (1, "ddp", None)]),
    "b": ("video", [(1, "ddp", 1), (2, "zero2", 4), (2, "zero3", None)]),
    "c": ("video", [(2, "zero0", 1), (2, "ddp", 4), (1, "ddp", None)]),
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


@pytest.fixture(scope="module")
def jobs(new_jobs, small_data):
    """All cases, in three starts: what one process does first, what two do, what one does last.

    What comes after stage 3 in the same process has DeepSpeed's own linear layer, which rounds
    bfloat16 otherwise: it comes last.
    """
    made = new_jobs("same results")
    made.configs["probe"] = probe_config(made)
    looks = [f"knn.{split}={small_data / 'labelled' / split}" for split in ("train", "validation")]
    looks += ["logging.validate_every_epochs=2"]
    made.start(
        1,
        [
            made.case("video", "video", *looks, listen=["files", "opened"], curves=True),
            made.case("images", "images"),
            made.case("classes", "classes"),
            made.case("bf16", "video", "engine.precision=bf16", micro_batch(2)),
            made.case("probe", "probe", "engine.micro_batch=2"),
            made.case("ema", "video", "mining.target=ema"),
            *parts_of_chains(made, 1, CHAINS, first=True),
        ],
    )
    bad = put_a_bad_file(made, small_data)
    cases = [*equal_cases(made, looks), *variants(made), *counted_cases(made)]
    cases += [made.case("bad-two", "video", *bad, listen=["opened"])]
    spread = [case for case in cases if set(ENGINES["zero3"]) <= set(case["overrides"])]
    spread_chains = [name for name in CHAINS if "zero3" in str(CHAINS[name])]
    made.start(
        2,
        [
            *(case for case in cases if case not in spread),
            *parts_of_chains(made, 2, set(CHAINS) - set(spread_chains)),
            *spread,
            *parts_of_chains(made, 2, spread_chains),
        ],
    )
    made.start(
        1,
        [
            made.case("bad-one", "video", *bad),
            *parts_of_chains(made, 1, CHAINS, first=False),
            made.case("alone-zero1", "video", *ENGINES["zero1"]),
            made.case("alone-zero3", "video", *ENGINES["zero3"], USUAL, micro_batch(2, share=4)),
        ],
    )
    return made


def equal_cases(jobs, looks):
    """Kinds of runs by several engines, with and without accumulation; some look meanwhile."""
    return [
        jobs.case(
            f"{kind}-{engine}-{accumulate}",
            kind,
            micro_batch(accumulate),
            *ENGINES[engine],
            *(looks if (kind, accumulate) == ("video", 2) and engine in LOOKS else ()),
            listen=["files", "opened", "wholes"] if kind == "video" else (),
            curves=(kind, accumulate) == ("video", 2) and engine in LOOKS,
        )
        for kind, engine, accumulate in EQUAL
    ]


def variants(jobs):
    """Other ways to compute the same."""
    own = {}
    for name, settings in OWN.items():
        path = jobs.folder / f"{name}.settings"
        path.write_text(json.dumps(settings))
        own[name] = f"engine.deepspeed={path}"
    again = ("model.checkpoint_activations=true", micro_batch(2))
    zero1, zero2, zero3 = (ENGINES[f"zero{stage}"] for stage in (1, 2, 3))
    overrides = {
        "offload2": (*zero2, "engine.offload=optimizer"),
        "offload3": (*zero3, "engine.offload=all", USUAL),
        "own1": (*zero1, own["own1"]),
        "again-ddp": again,
        "compiled-ddp": (*again, "engine.compile=blocks"),
        "compiled-zero2": (*zero2, "engine.compile=blocks"),
        "again-zero3": (*again, *zero3, own["own3"]),
        "ema-zero3": ("mining.target=ema", *zero3, own["own3"]),
    }
    for name in IN_BF16:
        engine = ENGINES[name]
        overrides[f"bf16-{name}"] = ("engine.precision=bf16", micro_batch(2), *engine)
    listen = {"offload2", "offload3", "own1", "again-zero3"}
    return [
        jobs.case(name, "video", *chosen, listen=["settings"] if name in listen else ())
        for name, chosen in overrides.items()
    ]


def counted_cases(jobs):
    """Cases of three passes per update, and such with a batch norm."""
    three = ("recipe.batch_size=6", "recipe.epochs=1", "engine.micro_batch=1")
    return [
        jobs.case(f"reduced-{name}", "images", *three, *engine, listen=["reductions"])
        for name, engine in ENGINES.items()
        if name in REDUCE_ONCE
    ] + [
        jobs.case(f"probe-{name}", "probe", *ENGINES[name], listen=["statistics"])
        for name in ("ddp", "zero3")
    ]


def parts_of_chains(jobs, processes, chains, first=None):
    """The parts of chains that so many processes run: their first ones, the others, or all."""
    return [
        jobs.case(
            f"{chain}{n}",
            CHAINS[chain][0],
            *ENGINES[engine],
            "checkpoint.keep_last=9",
            run=chain,
            stop=stop,
        )
        for chain in sorted(chains)
        for n, (count, engine, stop) in enumerate(CHAINS[chain][1])
        if count == processes and first in (None, n == 0)
    ]


def probe_config(jobs):
    """A linear probe, made of the config for fine-tuning."""
    text = jobs.configs["classes"].read_text()
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
    path = jobs.folder / "probe.yaml"
    path.write_text(text)
    return path


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


def with_true_gradient(tensors):
    """Of tensors by name, perhaps moments, those and the parts of those that have one."""
    found = {key: value for key, value in tensors.items() if not key.endswith(NO_TRUE_GRADIENT)}
    for key in [key for key in found if key.endswith(".attn.qkv.bias")]:
        queries, _, values = found[key].chunk(3)
        found[key] = torch.cat([queries, values])
    return found


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
        expected = with_true_gradient(expected)
        for key, value in with_true_gradient(values).items():
            found[f"{path.stem} {key}"] = (value - expected[key]).abs().max().item()
    assert any(name.startswith(("teacher ", "average ", "optimizer momentum")) for name in found)
    ours, theirs = (read_optimizer(path, (2, 8, 8)) for path in (ours, theirs))
    assert ours.step == theirs.step
    return found


def measure_differences(run, reference, kinds=("train", "validation")):
    """The largest difference of each measure, over all lines of the log of ``run``."""
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


@pytest.mark.parametrize(("kind", "engine", "accumulate"), EQUAL)
def test_two_processes_compute_what_one_does(jobs, kind, engine, accumulate):
    name = f"{kind}-{engine}-{accumulate}"
    jobs.seen(name)
    assert_same(jobs.run(name), jobs.run(kind))


def test_the_updates_that_are_compared_mine_and_clip(jobs):
    for kind in KINDS:
        lines = [line for line in lines_of(jobs.run(kind)) if line["kind"] == "train"]
        assert [line["update"] for line in lines] == [*range(1, len(lines) + 1)]
        assert len(lines) >= 10
        if kind != "classes":
            assert min(line["hard_fraction"] for line in lines) > 0.3
        if kind != "images":
            limit = {"video": 0.15, "classes": 1.0}[kind]
            assert sum(line["gradient_norm"] > limit for line in lines) > 5
    start = load_file(jobs.run("b") / "checkpoints" / "update-00000002" / "model.safetensors")
    end = load_file(newest(jobs.run("b")) / "model.safetensors")
    assert max((end[name] - start[name]).abs().max() for name in end) > 100 * SAME


@pytest.mark.parametrize("engine", IN_BF16)
def test_bf16_is_near(jobs, engine):
    """To one process that takes passes of the same size, whatever the processor rounds.

    Where all roundings err alike their errors add up. Of the norm of the gradient that is the
    error of the moments too, of which none is larger. Adam moves a weight by the learning rate at
    most, and a gradient near zero may have either sign.
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


@pytest.mark.parametrize(
    "name",
    [
        "offload2",
        "offload3",
        "own1",
        "again-ddp",
        "again-zero3",
        "compiled-ddp",
        "compiled-zero2",
    ],
)
def test_other_ways_of_computing_the_same(jobs, name):
    """Offload, the user's own settings of DeepSpeed, activations that are computed again, blocks
    that are traced as if to compile them."""
    jobs.seen(name)
    engine = json.loads((jobs.run(name) / "starts.jsonl").read_text())["engine"]
    assert engine.endswith(", compiled (blocks)") == name.startswith("compiled")
    assert_same(jobs.run(name), jobs.run("video"))


def test_features_of_a_teacher_whose_weights_are_spread(jobs):
    jobs.seen("ema-zero3")
    assert_same(jobs.run("ema-zero3"), jobs.run("ema"))


@pytest.mark.parametrize("stage", [1, 3])
def test_zero_in_one_process(jobs, stage):
    jobs.seen(f"alone-zero{stage}")
    assert_same(jobs.run(f"alone-zero{stage}"), jobs.run("video"))


def test_settings_reach_deepspeed(jobs):
    for rank in (0, 1):
        settings = {
            name: jobs.seen(name, rank)["settings"]
            for name in ("offload2", "offload3", "own1", "again-zero3")
        }
        assert settings["offload2"]["offload"] == ["cpu", "none"]
        assert settings["offload3"]["offload"] == ["cpu", "cpu"]
        assert settings["own1"]["reduce_bucket_size"] == 100000
        assert settings["again-zero3"]["kept_whole_below"] == 0
        assert settings["offload3"]["kept_whole_below"] > 0
        for found in settings.values():
            assert (found["train_batch_size"], found["gradient_clipping"]) == (4, 0.15)


@pytest.mark.parametrize("engine", REDUCE_ONCE)
def test_gradients_are_reduced_once_per_update(jobs, engine):
    """Of three passes the last reduces as many values as there are."""
    weights = load_file(newest(jobs.run(f"reduced-{engine}")) / "model.safetensors")
    learning = sum(value.numel() for value in weights.values())
    passes = jobs.seen(f"reduced-{engine}")["reduced"]
    assert len(passes) == 3
    assert passes[:2] == [[], []]
    assert [count for count in passes[2] if count > learning / 10] == [learning]
    assert sum(count for count in passes[2] if count <= learning / 10) <= 4


def test_processes_share_the_batches_of_one(jobs):
    """And open no file of each other's share, validation files included."""
    alone = jobs.seen("video")
    for _, engine, accumulate in (case for case in EQUAL if case[0] == "video"):
        name = f"video-{engine}-{accumulate}"
        shares = [jobs.seen(name, rank) for rank in (0, 1)]
        batches = [joined_passes(share["files"], accumulate) for share in shares]
        assert [a + b for a, b in zip(*batches, strict=True)] == alone["files"]
        for share, seen in zip(batches, shares, strict=True):
            trained = [file for batch in share for file in batch]
            assert [file for file in seen["opened"] if "/videos/train/" in file] == trained
        # Of validation files the first draws all, and otherwise each is read by one process.
        looks = engine in LOOKS and accumulate == 2
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
        else:  # what the last process was asked all know one update later
            reached.append(stop + count)
            said = f"stopped by SIGTERM before update {reached[-1]}"
            assert seen[0]["interrupted"] == [said, 75]
    stored = [path.name for path in checkpoints_in(jobs.run(chain) / "checkpoints")]
    assert stored[:-1] == [f"update-{update:08d}" for update in reached]
    assert all(4 * update % (9 if kind in ("classes", "probe") else 14) for update in reached)
    # Running averages are those of two processes.
    assert_same(jobs.run(chain), jobs.run("probe-ddp" if kind == "probe" else kind))
    updates = [line["update"] for line in lines_of(jobs.run(chain)) if line["kind"] == "train"]
    assert updates == [*range(1, len(updates) + 1)]


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_sgd_and_batch_statistics(jobs, engine):
    """Each process standardises by its own clips, as one does that takes two passes; running
    averages are then those of all clips, in every process."""
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
    # Where two clips of a pass differ by little in one feature, standardising them multiplies
    # rounding by up to 1 / sqrt(eps) = 1000.
    losses = measure_differences(jobs.run(f"probe-{engine}"), jobs.run("probe"), ["train"])
    assert losses["train loss"] < 1e-7 * 1000


def test_checkpoints_are_read_without_this_package_or_torch(jobs):
    """By a reader of safetensors alone, those of stage 3 and of interrupted runs too."""
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
        assert not jobs.seen("video-zero2-2", rank)["joined"]


@pytest.mark.parametrize("engine", LOOKS)
def test_looking_is_logged_once_and_the_same(jobs, engine):
    """Held-out measures, neighbours, pictures: by all processes together, told by the first."""
    run = jobs.run(f"video-{engine}-2")
    events = [(line["kind"], line["update"]) for line in lines_of(run)]
    assert events == [(line["kind"], line["update"]) for line in lines_of(jobs.run("video"))]
    assert len(set(events)) == len(events)
    assert [kind for kind, _ in events].count("probe") == 2
    differences = measure_differences(run, jobs.run("video"), ["train", "validation", "probe"])
    assert max(differences.values()) < SAME
    assert [path.name for path in (run / "pictures").glob("*.png")] == [
        path.name for path in (jobs.run("video") / "pictures").glob("*.png")
    ]
    assert (run / "curves.png").stat().st_size > 1000
    assert len((run / "starts.jsonl").read_text().splitlines()) == 1
