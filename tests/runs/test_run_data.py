from dataclasses import replace

import pytest

from hpm_video.config.batch_plan import BatchPlan
from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.data.manifest import ManifestError
from hpm_video.runs.data import describe_training, open_data, open_manifest


@pytest.fixture
def config_of(tmp_path):
    for name, files in {"a": range(8), "b": range(7, 10), "c": range(8, 10)}.items():
        rows = "".join(f"{number}.mp4\n" for number in files)
        (tmp_path / f"{name}.csv").write_text(f"path\n{rows}")

    def config(train, validation):
        path = tmp_path / "run.yaml"
        lists = {"train": f"{tmp_path}/{train}.csv", "validation": f"{tmp_path}/{validation}.csv"}
        path.write_text(f"data: {lists}\nrecipe: {{epochs: 1, batch_size: 2, warmup_epochs: 0}}\n")
        return load_config(PretrainConfig, path, [])

    return config


def test_files_of_both_lists_are_counted(config_of, caplog):
    open_data(config_of("a", "c"))
    assert not caplog.text
    open_data(config_of("a", "b"))
    assert "1 of the 3 validation files are training files too" in caplog.text
    open_data(config_of("a", "a"))
    assert "8 of the 8 validation files" in caplog.text


def test_long_videos_give_more_samples_and_lengthen_the_epoch(config_of, tmp_path):
    config = config_of("a", "c")
    longer = replace(config, data=replace(config.data, clips_per_minute=6.0))
    with pytest.raises(ManifestError, match=r"num_frames and fps of .*/0\.mp4"):
        open_data(longer)
    rows = "".join(f"{number}.mp4,{1500 * number},25\n" for number in range(8))
    (tmp_path / "a.csv").write_text(f"path,num_frames,fps\n{rows}".replace("mp4,0,", "mp4,1,"))
    plain, data = open_data(config), open_data(longer)
    assert len(data.main.train) == 1 + 6 * sum(range(1, 8))
    assert plain.timeline.num_updates == 4
    assert data.timeline.num_updates == 84
    assert plain.fingerprint != data.fingerprint
    plan = BatchPlan(2, 1, 2)
    first, *_ = describe_training(longer, data, plan, "model")
    assert "8 files to train on" in first
    assert "169 samples per epoch, 1 clip of each" in first


def test_a_missing_list_is_named_by_its_key_and_by_what_makes_it(config_of, tmp_path):
    config = config_of("a", "none")
    with pytest.raises(ManifestError, match=r"^data\.validation: there is no manifest or folder"):
        open_data(config)
    (tmp_path / "prepare.py").touch()
    with pytest.raises(ManifestError, match=rf"\. {tmp_path}/prepare\.py makes it, see .*README"):
        open_data(config)
    with pytest.raises(ManifestError, match=r"^knn\.train: there is no"):
        open_manifest(config.data, "none.csv", "knn.train")
