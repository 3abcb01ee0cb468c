"""Weights of other projects are read without running any code in their files."""

import argparse
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hpm_video.files.weights import CheckpointError
from hpm_video.weights.files import read_source

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(2)}


def same(found, expected=WEIGHTS):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict_of_torch_save_in_both_formats(tmp_path, ending, zipped):
    path = tmp_path / f"weights{ending}"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    assert same(read_source(path).entries[""])


@pytest.mark.parametrize("zipped", [True, False])
def test_arguments_and_epoch_beside_the_weights(tmp_path, zipped):
    path = tmp_path / "checkpoint.pth"
    content = {
        "model": WEIGHTS,
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 799,
        "args": argparse.Namespace(num_frames=16, model="videomae", nested=[1, (2.0, None)]),
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    source = read_source(path)
    assert same(source.entries["model"])
    assert list(source.entries) == ["model"]
    assert source.epoch == 799
    assert source.arguments == {"num_frames": 16, "model": "videomae", "nested": [1, (2.0, None)]}
    assert source.beside == ("optimizer", "epoch", "args")


def test_several_state_dicts_in_a_file(tmp_path):
    path = tmp_path / "checkpoint.pth"
    other = {name: value + 1 for name, value in WEIGHTS.items()}
    content = {"state_dict": WEIGHTS, "ema_state_dict": other, "model": "vit", "scaler": 1.0}
    torch.save(content, path)
    source = read_source(path)
    assert same(source.entries["state_dict"])
    assert same(source.entries["ema_state_dict"], other)
    assert source.beside == ("model", "scaler")


class Runs:
    """An object that runs code when it is unpickled."""

    def __init__(self, function, *arguments):
        self.how = (function, arguments)

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["args", "model", ""])
def test_a_pickle_that_would_run_code_is_refused_by_name_and_does_not_run(tmp_path, place, zipped):
    path, touched = tmp_path / "evil.pth", tmp_path / "touched"
    for attack, name in (
        (Runs(os.system, f"touch {touched}"), f"{os.name}.system"),
        (Runs(Path.touch, touched), "getattr"),
        (Runs(eval, f"open({str(touched)!r}, 'w')"), "eval"),
    ):
        content = {"model": WEIGHTS, place: attack} if place else attack
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="holds an object of .*could run code") as error:
            read_source(path)
        # torch.save writes a method of a class as getattr of that class.
        assert name in str(error.value)
        assert not touched.exists()


class Stranger:
    pass


def test_any_other_class_is_refused_by_name(tmp_path):
    path = tmp_path / "odd.pth"
    torch.save({"model": WEIGHTS, "args": Stranger()}, path)
    with pytest.raises(CheckpointError, match=r"holds an object of \S*Stranger"):
        read_source(path)


def test_a_namespace_cannot_smuggle_another_class(tmp_path):
    path = tmp_path / "odd.pth"
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(inner=Stranger())}, path)
    with pytest.raises(CheckpointError, match=r"\S*Stranger"):
        read_source(path)


def test_numbers_of_numpy_are_set_aside(tmp_path):
    np = pytest.importorskip("numpy")
    path = tmp_path / "numbers.pth"
    torch.save({"model": WEIGHTS, "lr": np.float64(1e-3)}, path)
    assert read_source(path).beside == ("lr",)


def test_broken_missing_and_other_files_say_what_to_do(tmp_path):
    whole, broken = tmp_path / "whole.pth", tmp_path / "broken.pth"
    torch.save(WEIGHTS, whole)
    broken.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="not a complete file of torch.save"):
        read_source(broken)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_source(tmp_path / "absent.pth")
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"must be a file of \.safetensors"):
        read_source(tmp_path / "weights.h5")
    torch.save([WEIGHTS], whole)
    with pytest.raises(CheckpointError, match="must hold a state dict, got list"):
        read_source(whole)
    torch.save({"epoch": 3}, whole)
    with pytest.raises(CheckpointError, match=r"must hold a state dict, got epoch \(int\)"):
        read_source(whole)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_program_is_no_file_of_weights(tmp_path):
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    with pytest.raises(CheckpointError, match="not a complete file of torch.save"):
        read_source(path)


def test_safetensors_with_metadata(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(WEIGHTS, path, metadata={"config": "x: 1"})
    assert same(read_source(path).entries[""])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_source(path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_folder_of_a_model(tmp_path, name):
    (save_file if name.endswith("safetensors") else torch.save)(WEIGHTS, tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "videomae"}')
    source = read_source(tmp_path)
    assert same(source.entries[""])
    assert source.config == {"model_type": "videomae"}


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_source(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_plain_pickle_is_refused_and_does_not_run(tmp_path, zipped):
    """torch.save does not write these, and torch.load does not name the problem."""
    path, touched = tmp_path / "evil.pth", tmp_path / "touched"
    evil = pickle.dumps(Runs(os.system, f"touch {touched}"))
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", evil)
            archive.writestr("a/version", "3\n")
    else:
        path.write_bytes(evil)
    with pytest.raises(CheckpointError, match="not a complete file of torch.save") as error:
        read_source(path)
    assert "weights_only" not in str(error.value)
    assert not touched.exists()


def test_a_tar_is_refused_without_the_advice_to_run_it(tmp_path):
    path = tmp_path / "old.pth.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(CheckpointError, match="not a complete file of torch.save") as error:
        read_source(path)
    assert "weights_only" not in str(error.value)


def test_a_value_among_tensors_is_named(tmp_path):
    path = tmp_path / "odd.pth"
    torch.save({"model": {**WEIGHTS, "step": 3}, "epoch": 7}, path)
    source = read_source(path)
    assert same(source.entries["model"])
    assert source.beside == ("epoch", "model.step")


def test_a_file_that_inflates_beyond_its_size_is_refused_before_it_does(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    size = path.stat().st_size
    with pytest.raises(CheckpointError, match=rf"has {size:,} bytes, .* in it 16,777,216"):
        read_source(path)
