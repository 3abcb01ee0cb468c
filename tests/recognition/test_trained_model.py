import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hpm_video.config.loading import load_config, save_config
from hpm_video.config.schema import FinetuneConfig
from hpm_video.data.manifest import Manifest, ManifestError, write_manifest
from hpm_video.data.reading import Footage, Views
from hpm_video.data.transforms import cut, resize, view_boxes
from hpm_video.decoding.registry import open_video
from hpm_video.files.failures import BadFilesError
from hpm_video.files.weights import CheckpointError
from hpm_video.models.from_config import build_classifier
from hpm_video.models.positions import position_table
from hpm_video.recognition.inference import Inference, Reading
from hpm_video.recognition.testing import score_videos
from hpm_video.recognition.trained_model import (
    ClipChoice,
    TrainedAutoencoder,
    TrainedClassifier,
    open_trained,
)
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.patches import normalise
from hpm_video.training.checkpoint import save_checkpoint
from hpm_video.training.distributed import Processes, joined_processes
from hpm_video.training.optim import OptimizerState

CPU = torch.device("cpu")
NAMES = ("still", "moves left", "moves right")
CONFIG = """
model: {encoder: {dim: 16, depth: 2, num_heads: 2}, patch_size: [2, 8, 8]}
data: {num_frames: 4, frame_stride: 2, frame_size: [32, 24], max_frame_stride: 3}
recipe: {epochs: 1, batch_size: 2, warmup_epochs: 0, average_momentum: 0.9}
test: {clips: 2, crops: 2, clips_per_pass: 4}
"""
VIEWS = Views(2, 2)


def with_random_weights(config, seed):
    """Weights so far from the initial ones that probabilities differ between clips and classes."""
    model = build_classifier(config, len(NAMES)).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> FinetuneConfig:
    path = tmp_path_factory.mktemp("given") / "tiny.yaml"
    path.write_text(CONFIG)
    return load_config(FinetuneConfig, path, [])


@pytest.fixture(scope="module")
def checkpoint(config, tmp_path_factory) -> Path:
    """A checkpoint whose EMA has other weights."""
    folder = tmp_path_factory.mktemp("run")
    save_config(config, folder / "config.yaml")
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in NAMES))
    save_checkpoint(
        folder / "update-00000001",
        {
            "model": with_random_weights(config, 1).state_dict(),
            "average": with_random_weights(config, 2).state_dict(),
        },
        optimizer=OptimizerState(0, {}),
        state={"update": 1, "facts": {"precision": "fp32"}},
        attached=[folder / "config.yaml", folder / "labels.txt"],
    )
    return folder / "update-00000001"


def load(path, weights=None, clips=ClipChoice()):  # noqa: B008 - it is frozen
    trained = open_trained(path, TrainedClassifier, weights, clips=clips)
    return Inference.load(trained, CPU, "fp32")


def score(recogniser, manifest, views, reading=Reading(), processes=Processes()):  # noqa: B008
    return score_videos(recogniser, NAMES, manifest, views, reading, processes)


@pytest.fixture(scope="module")
def recogniser(checkpoint):
    return load(checkpoint)


@pytest.fixture(scope="module")
def manifest(videos) -> Manifest:
    """An odd number of videos."""
    files = sorted(str(path) for path in (videos / "train").iterdir())[:7]
    return Manifest(tuple(files), (0, 1, 2, 2, 1, 0, 1), (-1,) * 7)


@pytest.fixture(scope="module")
def with_bad_files(manifest, tmp_path_factory) -> Manifest:
    """Bad files are one at the start, listed twice, and another in the middle."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.mp4").touch()
    empty, missing = str(folder / "empty.mp4"), str(folder / "missing.mp4")
    files = (empty, *manifest.files[:3], missing, empty, *manifest.files[3:])
    return Manifest(files, (0, 0, 1, 2, 2, 1, 2, 1, 0, 1), (-1,) * 10)


def clips_of(batch=5, size=(4, 32, 24), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch, 3, *size), dtype=torch.uint8, generator=draw)


def test_probabilities_are_the_softmax_of_the_model_whatever_the_size_of_a_pass(recogniser):
    clips, model = clips_of(), recogniser.model
    expected = model(normalise(clips, recogniser.data.mean, recogniser.data.std)).softmax(dim=1)
    for clips_per_pass in (1, 2, 5, 64):
        found = replace(recogniser, clips_per_pass=clips_per_pass).probabilities(clips)
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad
    assert expected.std() > 0.1


def test_it_evaluates_and_leaves_the_model_in_the_mode_it_was_in(config):
    batch_norm = replace(config.model, pooling="batch_norm", frozen=True)
    other = replace(config, model=batch_norm, recipe=replace(config.recipe, average_momentum=None))
    model = build_classifier(other, 3).train()
    recogniser = Inference(model, other.data, CPU, "fp32")
    first = recogniser.probabilities(clips_of())
    assert model.training
    assert model.head_norm.num_batches_tracked == 0
    torch.testing.assert_close(recogniser.probabilities(clips_of()[:1]), first[:1])
    model.eval()
    recogniser.probabilities(clips_of())
    assert not model.training


def test_in_mixed_precision_results_are_float32(recogniser):
    half = replace(recogniser, precision="bf16")
    found = half.probabilities(clips_of())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(dim=1), torch.ones(5))
    exact = recogniser.probabilities(clips_of())
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05)
    assert half.tokens(clips_of()).dtype == half.pooled(clips_of()).dtype == torch.float32


def test_the_head_sees_what_is_pooled(recogniser):
    model, clips = recogniser.model, clips_of()
    tokens = recogniser.tokens(clips)
    assert tokens.shape == (5, 2 * 4 * 3, 16)
    torch.testing.assert_close(model.pool(tokens), recogniser.pooled(clips))
    logits = model.head(recogniser.pooled(clips))
    torch.testing.assert_close(logits.softmax(dim=1), recogniser.probabilities(clips))


# --- Videos -------------------------------------------------------------------------------------


def naive_scores(recogniser, manifest, views):
    """The same scores, video by video and view by view."""
    spec, table = recogniser.data, []
    for file in manifest.files:
        with open_video(file, "auto") as video:
            clips = Footage(0, video.num_frames).views(spec, views)
            frames = [video.read(indices) for indices in clips]
        boxes = view_boxes(*frames[0].shape[1:3], spec.frame_size, views.crops)
        crops = [resize(cut(f, box), spec.frame_size, "bilinear") for f in frames for box in boxes]
        logits = [
            recogniser.model(normalise(crop[None], recogniser.data.mean, recogniser.data.std))[0]
            for crop in crops
        ]
        table.append(torch.stack([values.softmax(dim=0) for values in logits]).mean(dim=0))
    return torch.stack(table).detach().double().numpy()


@pytest.mark.parametrize("views", [Views(1, 1), VIEWS, Views(3, 3)])
def test_scores_of_videos_are_means_over_their_views(recogniser, manifest, views):
    scores = score(recogniser, manifest, views)
    assert scores.manifest is manifest
    expected = naive_scores(recogniser, manifest, views)
    np.testing.assert_allclose(scores.values, expected, rtol=1e-4, atol=1e-6)
    assert expected.std(axis=0).min() > 0.01, "videos differ"


def test_more_views_than_a_batch_has_clips(recogniser, manifest):
    few = Manifest(manifest.files[:2], (0, 1), (-1, -1))
    scores = score(recogniser, few, Views(13, 5))
    expected = naive_scores(recogniser, few, Views(13, 5))
    np.testing.assert_allclose(scores.values, expected, rtol=1e-4, atol=1e-6)


def test_workers_change_nothing(recogniser, with_bad_files):
    alone, with_workers = (
        score(recogniser, with_bad_files, VIEWS, Reading("auto", workers, True))
        for workers in (0, 2)
    )
    np.testing.assert_array_equal(alone.values, with_workers.values)


def test_bad_files_stop_a_test_or_are_excluded(recogniser, manifest, with_bad_files):
    with pytest.raises(BadFilesError, match="3 of 10 videos do not decode") as caught:
        score(recogniser, with_bad_files, VIEWS)
    assert str(caught.value).count("empty.mp4: the file is empty") == 2
    assert "missing.mp4: there is no such file" in str(caught.value)
    reading = Reading(exclude_bad_files=True)
    scores = score(recogniser, with_bad_files, VIEWS, reading)
    assert np.flatnonzero(scores.excluded).tolist() == [0, 4, 5]
    whole = score(recogniser, manifest, VIEWS)
    np.testing.assert_array_equal(scores.values[~scores.excluded], whole.values)


@pytest.mark.parametrize(("label", "words"), [(-1, "no label"), (3, "label 3"), (99, "label 99")])
def test_labels_that_the_classifier_does_not_know_are_refused(recogniser, manifest, label, words):
    labels = (*manifest.labels[:3], label, *manifest.labels[4:])
    wrong = replace(manifest, labels=labels)
    with pytest.raises(ManifestError) as caught:
        score(recogniser, wrong, VIEWS)
    message = str(caught.value)
    for part in ("labels from 0 to 2", f"{manifest.files[3]} has {words}", "a column label"):
        assert part in message


def test_a_manifest_that_numbers_the_classes_otherwise_is_refused(recogniser, manifest):
    """A folder of class folders does so if some classes have no videos in it."""
    few = Manifest(manifest.files[:2], (0, 1), (-1, -1), ("moves left", "moves right"))
    with pytest.raises(ManifestError, match="class 0 is 'still' .* and 'moves left'"):
        score(recogniser, few, VIEWS)
    same = replace(few, label_names=NAMES[:2])
    assert not score(recogniser, same, Views(1, 1)).excluded.any()


PROCESS = """
import json, sys, warnings
from pathlib import Path
import numpy as np
import torch
from hpm_video.data.reading import Views
from hpm_video.data.manifest import read_manifest
from hpm_video.files.failures import BadFilesError
from hpm_video.recognition.inference import Inference, Reading
from hpm_video.recognition.testing import score_videos
from hpm_video.recognition.trained_model import TrainedClassifier, open_trained
from hpm_video.training.distributed import joined_processes

warnings.simplefilter("error")
checkpoint, folder = map(Path, sys.argv[1:])
torch.set_num_threads(1)
trained = open_trained(checkpoint, TrainedClassifier)
classifier, names = Inference.load(trained, torch.device("cpu"), "fp32"), trained.label_names
with joined_processes() as processes:
    results = {"rank": processes.rank, "count": processes.count, "first": processes.is_first}
    for name in ("whole", "one", "bad"):
        manifest = read_manifest(folder / f"{name}.csv")
        reading = Reading(exclude_bad_files=name == "bad")
        scores = score_videos(classifier, names, manifest, Views(2, 2), reading, processes)
        results[name] = scores.values.tolist()
    try:
        score_videos(classifier, names, manifest, Views(2, 2), Reading(), processes)
    except BadFilesError as error:
        results["error"] = str(error)
(folder / f"{processes.rank}.json").write_text(json.dumps(results))
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(
    checkpoint, recogniser, manifest, with_bad_files, start_job, tmp_path
):
    import pandas as pd

    one = Manifest(manifest.files[:1], manifest.labels[:1], (-1,))  # the second gets nothing
    manifests = {"whole": manifest, "one": one, "bad": with_bad_files}
    for name, listed in manifests.items():
        table = pd.DataFrame({"path": listed.files, "label": listed.labels})
        write_manifest(table, tmp_path / f"{name}.csv")
    processes = start_job(2, "-c", PROCESS, checkpoint, tmp_path)
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (found["rank"], found["count"], found["first"]) == (rank, 2, rank == 0)
        for name, listed in manifests.items():
            reading = Reading(exclude_bad_files=name == "bad")
            alone = score(recogniser, listed, VIEWS, reading)
            np.testing.assert_array_equal(np.array(found[name]), alone.values)
        with pytest.raises(BadFilesError) as caught:
            score(recogniser, with_bad_files, VIEWS)
        assert found["error"] == str(caught.value)


def test_shares_of_processes_make_up_the_whole():
    for count in (1, 2, 3, 8):
        shares = [Processes(rank, count).share(7) for rank in range(count)]
        assert sorted(place for share in shares for place in share) == list(range(7))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [Processes(rank, 2).is_first for rank in (0, 1)] == [True, False]


def test_a_process_on_its_own_joins_nobody(monkeypatch):
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        with joined_processes() as processes:
            assert processes == Processes(0, 1)
            assert processes.gather([1, 2]) == [1, 2]
            assert not torch.distributed.is_initialized()


# --- Loading and building -----------------------------------------------------------------------


def test_a_checkpoint_is_loaded_as_it_was_saved(checkpoint, config):
    trained = open_trained(checkpoint, TrainedClassifier)
    loaded, recogniser = trained.config, load(checkpoint)
    assert (trained.label_names, trained.weights, trained.update) == (NAMES, "model", 1)
    assert recogniser.clips_per_pass == 4
    assert not recogniser.model.training
    assert loaded.model.encoder == config.model.encoder
    for name, value in with_random_weights(config, 1).state_dict().items():
        assert torch.equal(recogniser.model.state_dict()[name], value)
    average = load(checkpoint, "average").model
    for name, value in with_random_weights(config, 2).state_dict().items():
        assert torch.equal(average.state_dict()[name], value)


def test_of_a_run_the_last_checkpoint_is_taken(checkpoint, tmp_path, caplog):
    last = tmp_path / "run" / "checkpoints" / "last"
    last.parent.mkdir(parents=True)
    last.symlink_to(checkpoint)
    with caplog.at_level(logging.INFO):
        assert open_trained(tmp_path / "run", TrainedClassifier).path == last
    assert f"the last checkpoint of the run: {last}" in caplog.text


@pytest.mark.parametrize(
    ("clips", "grid"),
    [
        (ClipChoice(num_frames=8), TokenGrid(4, 4, 3)),
        (ClipChoice(frame_size=(48, 48)), TokenGrid(2, 6, 6)),
        (ClipChoice(), TokenGrid(2, 4, 3)),
    ],
)
def test_other_clips_get_their_positions_in_the_grid_of_training(checkpoint, clips, grid):
    recogniser = load(checkpoint, clips=clips)
    table = position_table(grid, 16, "sequence", TokenGrid(2, 4, 3))
    assert torch.equal(recogniser.model.positions("pos_embed", grid), table)
    assert recogniser.data.max_frame_stride is None
    assert recogniser.data.frame_size == (clips.frame_size or (32, 24))
    size = (recogniser.data.num_frames, *recogniser.data.frame_size)
    assert recogniser.probabilities(clips_of(2, size)).shape == (2, 3)


def test_clips_that_no_patches_fit_are_refused(checkpoint):
    with pytest.raises(ValueError, match="do not fit: frames .* got 5 with patch 2"):
        load(checkpoint, clips=ClipChoice(num_frames=5))


def test_a_checkpoint_of_something_else_is_named(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"no .*config.yaml; give .* a checkpoint folder of a run"):
        load(tmp_path)
    for path in checkpoint.iterdir():
        if path.name not in ("average.safetensors", "labels.txt"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ManifestError, match=r"labels.txt cannot be read"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no weights of .average.; take --weights model"):
        load(tmp_path, "average")
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    with pytest.raises(CheckpointError, match=r"head.weight has shape \(3, 16\).* \(2, 16\)"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="is a classifier, but a pre-trained model is"):
        open_trained(checkpoint, TrainedAutoencoder)


def test_weights_at_the_start_depend_on_the_seed_alone(config):
    state = torch.get_rng_state()
    first = build_classifier(config, 3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again = build_classifier(config, 3).state_dict()
    other = build_classifier(replace(config, seed=1), 3).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_a_classifier_is_what_the_config_says(config):
    model = replace(
        config.model,
        pooling="attentive",
        frozen=True,
        head_dropout=0.3,
        head_init_scale=2.0,
        drop_path=0.4,
        checkpoint_activations=True,
        pretrained_grid=(1, 2, 2),
        init="xavier",
    )
    built = build_classifier(replace(config, model=model), 5)
    plain = build_classifier(replace(config, model=replace(model, head_init_scale=1.0)), 5)
    assert built.head.out_features == 5
    assert built.head_dropout == 0.3
    assert built.drop_path == 0.4
    assert built.checkpoint_activations
    assert built.frozen
    assert built.source_grid == TokenGrid(1, 2, 2)
    assert built.blocks[0].mlp.fc1.weight.abs().max() > 0.2, "Xavier's are wider than 0.02"
    torch.testing.assert_close(built.head.weight, 2 * plain.head.weight)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("depth: 2", "depth: 20000000", "model.encoder"),
        ("dim: 16", "dim: 1000000", "model.encoder"),
        ("num_frames: 4", "num_frames: 4000000", "data.num_frames, data.frame_size"),
        ("  clips: 2", "  clips: 2000000", "test.clips, test.crops"),
        ("pretrained_grid: null", "pretrained_grid: [1000000, 10, 10]", "model.pretrained_grid"),
    ],
)
def test_a_config_takes_no_more_memory_than_its_weights(checkpoint, tmp_path, old, new, key):
    folder = tmp_path / "of a stranger"
    shutil.copytree(checkpoint, folder)
    text = (folder / "config.yaml").read_text()
    assert old in text
    (folder / "config.yaml").write_text(text.replace(old, new, 1))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match=rf"weights of {size:,} bytes, but {key}"):
        open_trained(folder, TrainedClassifier)
