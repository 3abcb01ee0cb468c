"""Two files have the same content only if all of their bytes are the same."""

import tarfile

import pandas as pd
import pytest

from hpm_video.data.manifest import Listing
from hpm_video.preparation.findings import Finding, digest_of, find_rows
from hpm_video.preparation.jobs import paced

LONG = bytes(range(256)) * 8000
HOLLOW = LONG[:800_000] + bytes(1000) + LONG[801_000:]


def content_of(place: str) -> str:
    *_, digest = paced(digest_of(place))
    return digest


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Locations by name: a file, a copy, one with zeros in the middle, and the file in a tar."""
    for name, data in {"whole": LONG, "copy": LONG, "hollow": HOLLOW}.items():
        (tmp_path / f"{name}.mp4").write_bytes(data)
    places = {name: f"{tmp_path}/{name}.mp4" for name in ("whole", "copy", "hollow")}
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in ("whole", "hollow"):
            tar.add(places[name], f"{name}.mp4")
    with tarfile.open(tmp_path / "shard.tar") as tar:
        for one in tar.getmembers():
            place = f"{tmp_path}/shard.tar::{one.name}@{one.offset_data}+{one.size}"
            places[f"packed {one.name}"] = place
    return places


def test_only_rows_of_the_same_content_are_reported_so(files):
    names = ["hollow", "whole", "copy", "packed hollow.mp4", "whole", "packed whole.mp4"]
    table = pd.DataFrame({"path": names, "label": list("001011")}, dtype=str)
    places = tuple(files[name] for name in names)
    found = {place: Finding("fine", content=content_of(place)) for place in places}
    rows = find_rows(Listing(files["whole"], table, places), found)
    beginning = "the manifest has the same content as "
    assert [row.reasons for row in rows] == [
        (),
        (),
        (f"{beginning}whole with label 0 instead of 1: leave one of them out",),
        (f"{beginning}hollow: leave one of them out",),
        (f"{beginning}whole with label 0 instead of 1: leave one of them out",),
        (f"{beginning}whole with label 0 instead of 1: leave one of them out",),
    ]


def test_frames_of_folders_are_all_compared(tmp_path):
    for name in ("one", "copy", "other"):
        (tmp_path / name).mkdir()
        for number in range(3):
            data = b"0123456789" if (name, number) != ("other", 1) else b"0123456780"
            (tmp_path / name / f"{number}.jpg").write_bytes(data)
    one, copy, other = (content_of(f"{tmp_path}/{name}/") for name in ("one", "copy", "other"))
    assert one == copy != other
