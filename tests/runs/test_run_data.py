import pytest

from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.data.manifest import ManifestError
from hpm_video.runs.console import say_what_stays
from hpm_video.runs.data import open_data, open_manifest


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


def test_a_missing_list_is_named_by_its_key_and_by_what_makes_it(config_of, tmp_path):
    config = config_of("a", "none")
    with pytest.raises(ManifestError, match=r"^data\.validation: there is no manifest or folder"):
        open_data(config)
    (tmp_path / "prepare.py").touch()
    with pytest.raises(ManifestError, match=rf"\. {tmp_path}/prepare\.py makes it, see .*README"):
        open_data(config)
    with pytest.raises(ManifestError, match=r"^knn\.train: there is no"):
        open_manifest(config.data, "none.csv", "knn.train")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], ""),
        (["data.train=x", "data.validation=y"], ""),
        (["data.train=x", "data.validation=null"], ""),
        (["data.root=x"], ""),
        (["data.train=x"], "data.train was given, and data.validation is still the config's"),
        (["data.validation=x"], "data.validation was given, and data.train is still the config's"),
    ],
)
def test_a_list_that_stays_the_configs_is_named(config_of, caplog, overrides, said):
    config = config_of("a", "c")
    say_what_stays(config.data, overrides)
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)
