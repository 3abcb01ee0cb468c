import pytest

from hpm_video.data.manifest import Manifest, ManifestError, read_manifest
from hpm_video.recognition.labels import (
    check_classes,
    numbered_as,
    read_label_names,
)


def manifest_of(*labels, names=None):
    files = tuple(f"/v/{i}.mp4" for i in range(len(labels)))
    return Manifest(files, labels, (-1,) * len(labels), names)


@pytest.mark.parametrize(
    "text", ["jump\nrun, fast\n", "jump\nrun, fast", "jump  \n\trun, fast\n\n\n"]
)
def test_names_are_lines(tmp_path, text):
    path = tmp_path / "labels.txt"
    path.write_text(text)
    assert read_label_names(path) == ("jump", "run, fast")


@pytest.mark.parametrize("text", ["", "\n\n", "jump\n\nrun\n", "jump\n  \nrun\n"])
def test_a_line_without_a_name_is_refused(tmp_path, text):
    path = tmp_path / "labels.txt"
    path.write_text(text)
    with pytest.raises(ManifestError, match=r"labels.txt must have the name of class i in line i"):
        read_label_names(path)


def test_a_file_of_names_that_is_none(tmp_path):
    with pytest.raises(ManifestError, match="none.txt cannot be read"):
        read_label_names(tmp_path / "none.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="is not text in UTF-8"):
        read_label_names(tmp_path / "bytes.txt")


def test_labels_in_range_pass():
    check_classes(manifest_of(0, 2, 1), "abc", "the videos")


@pytest.mark.parametrize(("label", "has"), [(-1, "no label"), (3, "label 3")])
def test_a_label_out_of_range_is_named_with_its_file(label, has):
    expected = f"the videos of X need labels from 0 to 2, but /v/1.mp4 has {has}; give"
    with pytest.raises(ManifestError, match=expected):
        check_classes(manifest_of(0, label, 2), "abc", "the videos of X")


def test_manifests_must_number_the_classes_alike():
    for names in (None, ("a",), ("a", "b"), ("a", "1"), ("0", "b"), ("a", "b", "c")):
        check_classes(manifest_of(0, 1, names=names), "ab", "the videos")
    check_classes(manifest_of(0, 1, names=("a", "b")), "01", "the videos")
    with pytest.raises(
        ManifestError, match="class 1 is 'b' for training and 'c' in the validation"
    ):
        check_classes(manifest_of(0, 1, names=("a", "c")), "ab", "the videos")
    with pytest.raises(ManifestError, match="class 0 is 'a' .* 'b' .* number the classes alike"):
        check_classes(manifest_of(0, 1, names=("b", "a")), "ab", "the videos")


def test_names_of_a_manifest_survive_a_file_of_lines(tmp_path):
    (tmp_path / "list.csv").write_text(
        "path,label,label_name\n"
        'a.mp4,0," jump, high "\nb.mp4,1,"two\nlines"\nc.mp4,2,"   "\nd.mp4,3,"sepa\u2028rated"\n'
    )
    names = read_manifest(tmp_path / "list.csv").label_names
    assert names == ("jump, high", "two lines", "2", "sepa rated")
    (tmp_path / "labels.txt").write_text("".join(f"{name}\n" for name in names))
    assert read_label_names(tmp_path / "labels.txt") == names


def test_class_folders_are_numbered_as_those_of_training(tmp_path):
    for place in ("train/jump/a.mp4", "train/run/b.mp4", "train/walk/c.mp4", "val/walk/d.mp4"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    train, validation = (read_manifest(tmp_path / name) for name in ("train", "val"))
    numbered = numbered_as(train.label_names, validation)
    assert (numbered.labels, numbered.label_names) == ((2,), ("jump", "run", "walk"))
    with pytest.raises(ManifestError, match="2 of 3 are no training classes, first 'jump'"):
        numbered_as(validation.label_names, train)
    (tmp_path / "list.csv").write_text("path,label,label_name\nd.mp4,0,walk\n")
    listed = read_manifest(tmp_path / "list.csv")
    assert numbered_as(train.label_names, listed) is listed, "it has its own numbering"
