"""Makes ``fixtures``: python tests/first_house/make_fixtures.py

Run at commit c18a27b with these tests beside it, by one thread of an x86-64 CPU with AVX2. It
is kept to tell how the fixtures came about: later code must not make them anew.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FIXTURES = HERE / "fixtures"
sys.path[:0] = [str(HERE)]

from conftest import first_names  # noqa: E402
from test_draws import PARTS, looks  # noqa: E402
from test_parameters import ALL, starts, table  # noqa: E402
from test_runs import RUNS, STOPPED, later_losses, measure  # noqa: E402

from hpm_video.preparation.encode import write_video  # noqa: E402

ENCODER = "encoder: {dim: 16, depth: 2, num_heads: 2, mlp_dim: 32}"
MODEL = f"""
model:
  {ENCODER}
  decoder: {{dim: 8, depth: 1, num_heads: 1, mlp_dim: 16}}
  drop_path: 0.2
"""
VIDEO = "  patch_size: [2, 4, 4]\n"
DATA = """
data:
  num_frames: 4
  frame_stride: 1
  frame_size: [32, 32]
  workers: 0
  decoder: pyav
  train: """
PRETRAINING = """
mining: {momentum: warmup, last_momentum: 0.9}
recipe: {epochs: 18, batch_size: 4, base_lr: 0.1, min_lr: 0, warmup_epochs: 2}
"""
COMMON = """
engine: {precision: fp32, threads: 1, device: cpu}
logging: {every_updates: 1, tensorboard: false}
checkpoint: {every_updates: 100, keep_last: 1}
"""
HALF_OF_9_EPOCHS = "masking: {ratio: 0.75, first_fraction: 0, last_fraction: 1}\n"
"""9 files, 4 of them an update: update 20 of 40 lies in the ninth of 18 epochs."""
CONFIGS = {
    "video": MODEL
    + VIDEO
    + DATA
    + "videos\n  max_frame_stride: 2\n  repeats: 2\n"
    + HALF_OF_9_EPOCHS
    + PRETRAINING
    + COMMON,
    "images": MODEL
    + "  patch_size: [1, 4, 4]\n  positions: space_time\n  class_token: true\n  conventions: mae\n"
    + DATA
    + "images\n  crop: random_resized\n  flip: true\n"
    + HALF_OF_9_EPOCHS
    + PRETRAINING.replace("{momentum", "{target: joint, momentum")
    + COMMON,
    "zero3": MODEL
    + VIDEO
    + DATA
    + "videos\n"
    + HALF_OF_9_EPOCHS.replace("{", "{unit: tube, ")
    + PRETRAINING.replace("{momentum", "{predictor: absolute, momentum")
    + COMMON.replace(
        "{precision", "{name: deepspeed, zero_stage: 3, deepspeed: spread.json, precision"
    ),
    "classes": f"model:\n  {ENCODER}\n  drop_path: 0.2\n  head_dropout: 0.2\n  init: xavier\n"
    + VIDEO
    + DATA
    + f"labelled\n  repeats: 2\ninit_weights: runs/video/checkpoints/update-{STOPPED:08d}\n"
    + """
recipe:
  epochs: 18
  batch_size: 4
  base_lr: 0.1
  warmup_epochs: 2
  layer_decay: 0.8
  clip_grad: 1.0
  average_momentum: 0.8
augmentation: {area: [0.5, 1.0], rand_augment: null, erasing: 0.25, mixup: 0.8, cutmix: 1.0}
test: {weights: average}
"""
    + COMMON,
}
SPREAD = ROOT / "tests" / "processes" / "spread.json"
"""Otherwise such small parameters are never spread."""


def noisy_clip(seed):
    """A texture that slides, without flat patches: rounding does not decide the order of errors."""
    rng = np.random.default_rng(seed)
    texture = np.kron(rng.integers(0, 160, (11, 11, 3)), np.ones((5, 5, 1)))
    texture = texture + rng.integers(0, 64, (55, 55, 3))
    down, right = rng.integers(0, 2, 2)
    return np.stack([texture[down * i :, right * i :][:40, :40] for i in range(8)]).astype(np.uint8)


def make_data():
    for name in ("videos", "images"):
        Path(name).mkdir()
    for seed in range(9):
        frames = noisy_clip(seed)
        write_video(f"videos/{seed}.mp4", frames, crf=26)
        Image.fromarray(frames[0]).save(f"images/{seed}.png")
        channel = seed % 3
        folder = Path("labelled", ("red", "green", "blue")[channel])
        folder.mkdir(parents=True, exist_ok=True)
        frames = frames // 2
        frames[..., channel] += 120
        write_video(folder / f"{seed}.mp4", frames, crf=26)


def make_runs():
    """Each gets SIGTERM in the middle of training."""
    import_from = Path(tempfile.mkdtemp())
    (import_from / "hpm_video").symlink_to(ROOT / "hpm_video")
    shutil.copyfile(SPREAD, "spread.json")
    for run, text in CONFIGS.items():
        config = import_from / f"{run}.yaml"
        config.write_text(text)
        processes = 2 if run == "zero3" else 1
        case = {
            "name": run,
            "program": RUNS[run],
            "config": str(config),
            "overrides": [f"output_dir=runs/{run}"],
            "listen": [],
            # Several processes stop an update after they are asked.
            "stop": STOPPED - processes,
            "curves": False,
        }
        cases = import_from / "cases.json"
        cases.write_text(json.dumps([case]))
        launcher = [ROOT / "tools" / "launch.py", "--processes", "2"] if processes > 1 else []
        subprocess.run(
            [sys.executable, *launcher, ROOT / "tests/processes/job.py", cases, import_from],
            env=os.environ | {"PYTHONPATH": str(import_from)},
            check=True,
        )
        (folder,) = Path("runs", run, "checkpoints").glob("update-*")
        assert folder.name == f"update-{STOPPED:08d}", folder
        Path("runs", run, ".lock").unlink()
        for path in (folder / "state.json", Path("runs", run, "starts.jsonl")):
            hidden = re.sub(r'("(?:command|host|time)": )"[^"]*"', r'\1""', path.read_text())
            path.write_text(hidden)


def make_numbers(run):
    """Both in copies: to go on writes into the directory of a run."""
    with copied():
        batch, lr, losses, parts = measure(run)
    with copied() as folder:
        launcher = [ROOT / "tools/launch.py", "--processes", "2"] if run == "zero3" else []
        (folder / "import").mkdir()
        (folder / "import" / "hpm_video").symlink_to(ROOT / "hpm_video")
        subprocess.run(
            [
                sys.executable,
                *launcher,
                ROOT / f"tools/{RUNS[run]}.py",
                f"runs/{run}/config.yaml",
            ],
            env=os.environ | {"PYTHONPATH": str(folder / "import")},
            check=True,
        )
        later = later_losses(folder / "runs" / run)
    tensors = {
        f"{part}.{name}": value.detach().contiguous()
        for part, values in parts.items()
        for name, value in first_names(values).items()
    }
    save_file({**tensors, "clips": batch.clips}, FIXTURES / "numbers" / f"{run}.safetensors")
    told = {
        "files": [Path(file).name for file in batch.files],
        "keys": batch.keys.tolist(),
        "lr": lr,
        "losses": losses,
        "later": later,
    }
    (FIXTURES / "numbers" / f"{run}.json").write_text(json.dumps(told, indent=1) + "\n")


def make_draws():
    with copied():
        draws = {name: part() for name, part in {**PARTS, "looks": looks}.items()}
    text = json.dumps(draws, indent=1)
    (FIXTURES / "draws.json").write_text(on_one_line(text) + "\n")


def make_table():
    """Equal tables of several configs once."""
    tables, numbers, known, known_starts = [], {}, {}, {}
    for path in ALL:
        beginning = starts(path, first_names, known_starts)
        rows = {
            name: row + beginning[name] for name, row in table(path, first_names, known).items()
        }
        if rows not in tables:
            tables.append(rows)
        numbers[path] = tables.index(rows)
    lines = [
        "{" + ",\n".join(f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in rows) + "}"
        for rows in tables
    ]
    (FIXTURES / "parameters.json").write_text(
        f'{{"configs": {json.dumps(numbers, indent=1)},\n"tables": [{",".join(lines)}]}}\n'
    )


def on_one_line(text):
    """The innermost lists and objects of JSON."""
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda found: " ".join(found[0].split()), text)


@contextmanager
def copied():
    """The working directory is a copy for a while."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(FIXTURES, folder, dirs_exist_ok=True, symlinks=True)
        os.chdir(folder)
        yield Path(folder)
        os.chdir(FIXTURES)


def main():
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir()
    os.chdir(FIXTURES)
    make_data()
    make_runs()
    Path("numbers").mkdir()
    for run in RUNS:
        make_numbers(run)
    make_draws()
    make_table()


if __name__ == "__main__":
    main()
