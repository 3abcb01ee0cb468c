from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpm_video.data.manifest import ManifestError, read_listing, read_manifest
from hpm_video.data.split import choose_validation, groups_by_name, joined_groups


@given(st.integers(2, 5), st.lists(st.integers(0, 2**31), min_size=10, max_size=60), st.integers(0))
def test_a_group_is_on_one_side_whatever_they_are(classes, draws, seed):
    """Every class also keeps files to train on."""
    groups = [draw % 19 for draw in draws]
    labels = [str(draw // 19 % classes) for draw in draws]
    with suppress(ManifestError):
        chosen = choose_validation(labels, groups, 0.25, seed % 2**32)
        sides = [{groups[i] for i in np.flatnonzero(side)} for side in (chosen, ~chosen)]
        assert not sides[0] & sides[1]
        assert sides[0]
        assert {labels[i] for i in np.flatnonzero(~chosen)} == set(labels)
        assert (choose_validation(labels, groups, 0.25, seed % 2**32) == chosen).all()


def test_each_class_gives_its_share():
    labels = ["a"] * 300 + ["b"] * 60 + ["c"] * 30
    chosen = choose_validation(labels, range(390), 0.1, seed=1)
    counts = [sum(chosen[i] for i in range(390) if labels[i] == name) for name in "abc"]
    assert counts == [30, 6, 3]
    assert (choose_validation(labels, range(390), 0.1, seed=2) != chosen).any()


def test_names_tell_groups_by_what_is_before_the_last_numbers():
    files = ["v/x_g01_c01.mp4", "v/x_g01_c02.mp4", "v/x_g02_c01.mp4", "w/x_g01_c01.mp4"]
    files += ["w/abc_000010_000020.mp4", "w/abc-clip7.avi", "w/12.mp4", "w/abc.mp4"]
    groups = groups_by_name(files, ["0"] * 8)
    assert groups == ["v/x_g01", "v/x_g01", "v/x_g02", "w/x_g01", "w/abc", "w/abc", "w/12", "w/abc"]


def test_names_that_differ_by_numbers_alone_tell_nothing():
    assert groups_by_name(["a/1_1.mp4", "a/1_2.mp4", "b/1_1.mp4"], ["0", "0", "1"]) is None
    with pytest.raises(ManifestError, match="all files of 1 of 2 classes .first 'b'.*--group none"):
        groups_by_name(["a/x.mp4", "a/y.mp4", "b/z_1.mp4", "b/z-2.mp4"], ["a", "a", "b", "b"])


def test_files_of_equal_content_join_their_groups():
    groups = joined_groups(["a", "a", "b", "c", "d"], ["", "x", "x", "y", ""])
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups)) == 3
    chain = joined_groups(["a", "b", "b", "c"], ["x", "x", "y", "y"])
    assert len(set(chain)) == 1


@pytest.mark.parametrize(("labels", "groups"), [("ab", [1, 2]), ("aaab", [1, 1, 1, 1])])
def test_what_cannot_be_split_is_refused(labels, groups):
    with pytest.raises(ManifestError, match="no group of files is small enough for a share of 0.5"):
        choose_validation(list(labels), groups, 0.5, seed=0)


def test_the_program_writes_two_lists_that_are_read(call_tool, tmp_path):
    table = "label,path,origin,label_name\n"
    for n in range(40):
        table += f"{n % 2},clips/{n}.mp4,video {n // 4},{'jump' if n % 2 else 'run'}\n"
    (tmp_path / "all.csv").write_text(table)
    out = tmp_path / "lists"
    command = (tmp_path / "all.csv", "--group", "origin", "--share", "0.2", "--output", out)
    code, output = call_tool("split", *command)
    assert code == 0, output
    assert "10 groups of 40 files: grouped by the column origin" in output
    lists = [read_manifest(out / f"{name}.csv") for name in ("train", "validation")]
    assert [len(one) for one in lists] == [32, 8]
    assert {*lists[0].files, *lists[1].files} == {f"{tmp_path}/clips/{n}.mp4" for n in range(40)}
    assert lists[0].label_names == lists[1].label_names == ("run", "jump")
    origins = [
        set(read_listing(out / f"{name}.csv").column("origin")) for name in ("train", "validation")
    ]
    assert not origins[0] & origins[1]
    sections = "path,start,camera\n" + "".join(f"{n // 3}.mp4,{n},{n % 2}\n" for n in range(30))
    (tmp_path / "sections.csv").write_text(sections)
    for group in ("camera", "none"):
        there = tmp_path / group
        options = ("--group", group, "--share", "0.3", "--output", there)
        code, output = call_tool("split", tmp_path / "sections.csv", *options)
        if group == "camera":  # both cameras have every file
            assert code == 2
            assert "no group of files is small enough" in output
    sides = [read_listing(there / f"{name}.csv") for name in ("train", "validation")]
    assert not {*sides[0].files} & {*sides[1].files}
    assert [len(side) for side in sides] == [21, 9]
    assert read_manifest(there / "train.csv").num_files == 21
    for more, reason in ((), "is there already"), (("--group", "video"), "needs a column 'video'"):
        folder = out if not more else tmp_path
        code, output = call_tool("split", *command[:1], *more, "--output", folder)
        assert code == 2
        assert reason in output
