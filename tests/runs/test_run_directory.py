"""Reading the directory of a run: nothing is lost, and damage is reported."""

import fcntl
import json
import shutil

import pytest
from tiny_runs import flip_a_bit

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.data.manifest import ManifestError
from hpm_video.decoding.reader import DecoderError
from hpm_video.files.failures import BadFiles
from hpm_video.files.weights import CheckpointError
from hpm_video.runs.finetuning import finetune
from hpm_video.runs.pretraining import load_run, pretrain
from hpm_video.training.checkpoint import checkpoints_in, read_state
from hpm_video.training.curves import plot_curves
from hpm_video.training.metrics import MetricsError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_curves")]

UPDATES = ["update-00000005", "update-00000007"]


@pytest.fixture(scope="module")
def start(config_file):
    """Pre-train for 7 updates in this process, or continue."""

    def run(folder, *overrides):
        short = ("data.validation=null", "recipe.epochs=2", "checkpoint.keep_last=2")
        options = [f"output_dir={folder}", *short, *overrides]
        return pretrain(load_config(PretrainConfig, config_file, options))

    return run


@pytest.fixture(scope="module")
def short_run(start, tmp_path_factory):
    return start(tmp_path_factory.mktemp("short") / "run")


@pytest.fixture
def run(short_run, tmp_path):
    """A copy of a complete run with checkpoints before updates 5 and 7."""
    shutil.copytree(short_run, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def names_in(run):
    return [path.name for path in checkpoints_in(run / "checkpoints")]


@pytest.fixture
def newest(run):
    assert names_in(run) == UPDATES
    return run / "checkpoints" / UPDATES[-1]


@pytest.mark.parametrize("kind", ["part of a copy", "file", "dangling link"])
def test_what_has_the_name_of_a_checkpoint_and_is_none_is_refused(start, run, newest, kind):
    (newest / "state.json").unlink()
    if kind != "part of a copy":
        shutil.rmtree(newest)
    if kind == "file":
        newest.write_text("mine")
    if kind == "dangling link":
        newest.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"is not a complete checkpoint: state.json .*delete"):
        start(run)
    assert names_in(run) == UPDATES[:1]
    assert newest.is_symlink() or newest.exists()


@pytest.mark.parametrize("program", ["pretrain", "finetune"])
def test_what_another_process_writes_is_not_read(
    start, run, newest, program, labelled_videos, tmp_path
):
    (newest / "state.json").write_text("{")  # as in a checkpoint that is being deleted
    (newest / "config.yaml").unlink()
    text = f"data: {{train: {labelled_videos / 'train'}}}\nrecipe: {{batch_size: 6, epochs: 20}}\n"
    (tmp_path / "config.yaml").write_text(text)
    config = load_config(FinetuneConfig, tmp_path / "config.yaml", [f"output_dir={run}"])
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process trains in"):
            start(run) if program == "pretrain" else finetune(config)


def test_a_state_that_says_too_little_is_named_with_the_remedy(start, run, newest):
    """More such states are in tests/training/test_checkpoint.py."""
    (newest / "state.json").write_text('{"update": 7}')
    with pytest.raises(CheckpointError, match=r"state.json cannot be read, or lacks .*delete it"):
        start(run)


def test_an_older_checkpoint_that_cannot_be_read_is_reported_before_training(start, run, newest):
    shutil.rmtree(newest)
    before = newest.with_name(UPDATES[0])
    shutil.copytree(before, newest.with_name("update-00000002"))
    (newest.with_name("update-00000002") / "state.json").write_text("[]")
    with pytest.raises(CheckpointError, match="update-00000002 is not a complete checkpoint"):
        start(run)
    assert names_in(run) == ["update-00000002", UPDATES[0]]


def test_a_checkpoint_under_the_name_of_a_later_one_is_refused(start, run, newest):
    newest.rename(newest.with_name("update-00000099"))
    with pytest.raises(
        CheckpointError, match=r"update-00000099 is not .* says that it is update-00000007"
    ):
        start(run)


@pytest.mark.parametrize("line", ['{"update": 1}}', '{"kind": "train"}', "7", "NaN}"])
def test_a_line_that_is_not_of_metrics_is_named(start, run, newest, line, monkeypatch):
    monkeypatch.setattr("hpm_video.runs.run.plot_curves", plot_curves)
    path = run / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(f"{line}\n{whole}")
    with pytest.raises(MetricsError, match=r"line 1 is .*must be a JSON object.*delete the line"):
        start(run)  # it is complete
    shutil.rmtree(newest)
    with pytest.raises(MetricsError, match=r"metrics.jsonl, line 1 is"):
        start(run)


def without_checksums(checkpoint):
    state = read_state(checkpoint)
    del state["sha256"]
    (checkpoint / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((file, "a flipped bit") for file in ("model", "teacher", "optimizer")),
        ("model", "cut short"),
        *((file, "cut short, of before checksums") for file in ("model", "optimizer")),
    ],
)
def test_damaged_files_of_a_run_are_named_with_a_remedy_for_this_run(
    start, run, newest, file, damage
):
    before = newest.with_name(UPDATES[0])
    shutil.rmtree(newest)  # a complete run reads no optimizer
    path = before / f"{file}.safetensors"
    if damage == "a flipped bit":
        flip_a_bit(path)
    else:
        path.write_bytes(path.read_bytes()[:-8])
    if "before checksums" in damage:
        without_checksums(before)
    with pytest.raises(CheckpointError) as error:
        start(run)
    assert f"{before} is not a complete checkpoint: {file}.safetensors" in str(error.value)
    assert "delete it to resume its run from the checkpoint before" in str(error.value)
    assert "another project" not in str(error.value)


def test_the_remedy_for_a_damaged_checkpoint_works(start, run, newest):
    flip_a_bit(newest / "model.safetensors")
    shutil.rmtree(newest)
    start(run)
    assert names_in(run) == UPDATES


def test_weights_of_a_damaged_checkpoint_begin_no_run_and_are_not_shown(start, newest, tmp_path):
    flip_a_bit(newest / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors has the SHA-256"):
        start(tmp_path / "other", f"init_weights={newest}")
    assert not (tmp_path / "other").exists()
    with pytest.raises(CheckpointError, match="model.safetensors has the SHA-256"):
        load_run(newest, "cpu")


def test_a_checkpoint_older_than_checksums_goes_on_and_is_reported_once(start, run, newest, caplog):
    shutil.rmtree(newest)
    without_checksums(newest.with_name(UPDATES[0]))
    with caplog.at_level("INFO"):
        start(run)
    assert len([text for text in caplog.messages if "before checksums were kept" in text]) == 1
    assert names_in(run) == UPDATES
    assert read_state(newest)["sha256"].keys() == {
        f"{name}.safetensors" for name in ("model", "teacher", "optimizer")
    }


def test_a_damaged_list_of_bad_files_is_named(tmp_path):
    path = tmp_path / "bad_files.csv"
    path.write_text(f"path,reason\n{'a' * 200_000},b\n")
    with pytest.raises(OSError, match=r"bad_files.csv is no list of bad files .*delete it"):
        BadFiles(path, num_files=1, max_bad_share=1.0)


def test_a_misspelt_decoder_leaves_nothing(config_file, tmp_path):
    output_dir = tmp_path / "run"
    overrides = ["data.decoder=pyva", f"output_dir={output_dir}"]
    config = load_config(PretrainConfig, config_file, overrides)
    with pytest.raises(DecoderError, match="must be one of auto, .*pyav.*, got pyva"):
        pretrain(config)
    assert not output_dir.exists()


def test_a_stride_that_a_file_does_not_have_leaves_nothing(config_file, videos, tmp_path):
    output_dir, thinned = tmp_path / "run", tmp_path / "thinned.csv"
    files = sorted(videos.rglob("*.mp4"))
    thinned.write_text("path,kept_every\n" + "".join(f"{file},3\n" for file in files))
    overrides = [f"data.train={thinned}", "data.frame_stride=2", f"output_dir={output_dir}"]
    config = load_config(PretrainConfig, config_file, overrides)
    with pytest.raises(ManifestError, match="holds one of every 3 frames"):
        pretrain(config)
    assert not output_dir.exists()
