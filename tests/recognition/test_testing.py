import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hpm_video.data.batch import Sample, collate
from hpm_video.data.manifest import Manifest
from hpm_video.data.reading import Views
from hpm_video.files.failures import BadFilesError, Failure
from hpm_video.files.weights import CheckpointError
from hpm_video.recognition import inference
from hpm_video.recognition.inference import VideoValues, each_video, find_failures, over_videos
from hpm_video.recognition.testing import (
    confusion_counts,
    describe,
    draw_confusion,
    ranks_of,
    summarise,
    write_results,
)
from hpm_video.training.distributed import Processes

CLASSES = 3


def manifest_of(names, labels=None):
    labels = labels or tuple(i % CLASSES for i in range(len(names)))
    return Manifest(tuple(f"/v/{name}" for name in names), tuple(labels), (-1,) * len(names))


def pixels_of(place, views):
    """(views, C, T, H, W): the views of the video at a place, all different"""
    draw = np.random.default_rng(place)
    return torch.from_numpy(draw.integers(0, 256, (views, CLASSES, 1, 1, 1), dtype=np.uint8))


def probabilities(clips):
    return (clips.flatten(1) / 40).softmax(dim=1)


class MadeUp:
    """Clips without files: those with ``bad`` in their names fail."""

    def __init__(self, manifest, views):
        self.manifest, self.views, self.bad = manifest, Views(views, 1), {}

    def __len__(self):
        return len(self.manifest)

    def __getitem__(self, place):
        path = self.manifest.files[place]
        bad, views = "bad" in path, self.views.count
        return Sample(
            pixels_of(place, 0 if bad else views),
            keys=(7,) * (0 if bad else views),
            label=self.manifest.labels[place],
            file=path,
            failures=(Failure(path, "made up"),) if bad else (),
        )


class Reading(inference.Reading):
    """Reads made-up clips, ``batch_size`` videos at a time."""

    def batches(self, clips, positions, max_clips=32):
        size = max(1, min(len(positions), max_clips // clips.views.count))
        for start in range(0, len(positions), size):
            yield collate([clips[place] for place in positions[start : start + size]])


def score(manifest, *, views=2, batch_size=2, processes=1, exclude=True, values=probabilities):
    """The scores in the first of ``processes``, each of which has its share of the videos."""
    clips, reading = MadeUp(manifest, views), Reading(exclude_bad_files=exclude)
    ends = [
        pair
        for rank in range(processes)
        for pair in each_video(
            values,
            clips,
            range(rank, len(manifest), processes),
            reading,
            max_clips=batch_size * views,
        )
    ]

    class Gathered(Processes):
        """Also delivers the results of the other processes."""

        def gather(self, items):
            return ends

    return over_videos(values, clips, reading, Gathered(), batch_size * views).values


def naive(manifest, views):
    """The same scores, video by video and view by view."""
    rows = []
    for place, path in enumerate(manifest.files):
        row = np.zeros(CLASSES)
        for view in pixels_of(place, views).flatten(1).double().numpy():
            exponents = np.exp(view / 40)
            row += exponents / exponents.sum() / views
        rows.append(np.full(CLASSES, np.nan) if "bad" in path else row)
    return np.array(rows)


GOOD = ("a", "b", "c", "d", "e")


@pytest.mark.parametrize(
    "names",
    [
        GOOD,
        ("bad", "bad2", *GOOD),
        (*GOOD[:2], "bad", *GOOD[2:]),
        (*GOOD, "bad"),
        ("a", "bad1", "bad2", "bad3", "bad4", "b"),
        ("bad", "a", "bad", "b", "c", "bad", "bad"),  # one path, listed many times
        ("a", "a", "bad", "a"),
        ("a",),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 50])
@pytest.mark.parametrize("views", [1, 6])
@pytest.mark.parametrize("processes", [1, 3])
def test_each_video_gets_the_mean_of_its_own_views(names, batch_size, views, processes, caplog):
    manifest = manifest_of(names)
    table = score(manifest, views=views, batch_size=batch_size, processes=processes)
    np.testing.assert_allclose(table, naive(manifest, views), rtol=1e-5)
    assert table.dtype == np.float64
    left_out = sorted(path for path in manifest.files if "bad" in path)
    assert caplog.messages == [f"left out: {path}: made up" for path in left_out]


@given(
    names=st.lists(st.sampled_from(["a", "b", "bad1", "bad2", "c"]), min_size=1, max_size=12),
    batch_size=st.integers(1, 5),
    processes=st.integers(1, 4),
)
def test_whatever_fails_wherever(names, batch_size, processes):
    manifest = manifest_of(names)
    if set(names) <= {"bad1", "bad2"}:
        with pytest.raises(BadFilesError):
            score(manifest, batch_size=batch_size, processes=processes)
        return
    table = score(manifest, batch_size=batch_size, processes=processes)
    np.testing.assert_allclose(table, naive(manifest, 2), rtol=1e-5)


def test_the_mean_is_that_of_probabilities_not_of_scores():
    (found,) = score(manifest_of(("a",)), views=4)
    of_views = probabilities(pixels_of(0, 4)).double().numpy()
    np.testing.assert_allclose(found, of_views.mean(axis=0), rtol=1e-6)
    assert not np.allclose(found, probabilities(pixels_of(0, 4).float().mean(dim=0)[None]))


def test_nothing_is_computed_after_the_first_failure_but_all_of_them_are_found():
    manifest = manifest_of(("a", "b", "bad1", "c", "d", "bad2", "e", "bad1"))
    calls = []

    def counted(clips):
        calls.append(len(clips))
        return probabilities(clips)

    with pytest.raises(BadFilesError) as caught:
        over_videos(counted, MadeUp(manifest, 2), Reading(), Processes(), max_clips=4)
    assert calls == [4]
    message = str(caught.value)
    assert message.startswith("3 of 8 videos do not decode:\n")
    lines = [line for line in message.splitlines() if line.startswith("  ")]
    assert lines == ["  /v/bad1: made up", "  /v/bad1: made up", "  /v/bad2: made up"]
    for remedy in ("test.exclude_bad_files=true", "--exclude-bad-files", "count as wrong"):
        assert remedy in message
    assert len(caught.value.failures) == 3


def test_nothing_left_to_test_is_an_error_even_where_bad_files_are_excluded():
    with pytest.raises(BadFilesError, match="2 of 2 videos"):
        score(manifest_of(("bad1", "bad2")), exclude=True)


def test_a_bad_file_is_found_before_a_run_and_not_tried_again(caplog):
    clips = MadeUp(manifest_of(("a", "bad", "b")), 1)
    with pytest.raises(BadFilesError, match="1 of 3 videos"):
        find_failures(clips, Reading(), Processes())
    reading = Reading(exclude_bad_files=True)
    find_failures(clips, reading, Processes())
    assert [*clips.bad] == ["/v/bad"]
    assert caplog.messages == ["left out: /v/bad: made up"]
    over_videos(probabilities, clips, reading, Processes())
    assert len(caplog.messages) == 1, "it is reported once"


def test_values_that_are_not_finite_are_refused():
    manifest = manifest_of(("a", "b"))
    with pytest.raises(
        CheckpointError, match=r"output of the model for /v/a is not finite.* an earlier check"
    ):
        score(manifest, values=lambda clips: probabilities(clips) * torch.nan)


def test_no_gradient_is_kept():
    weight = torch.ones(CLASSES, requires_grad=True)

    def values(clips):
        result = (clips.flatten(1) * weight).softmax(dim=1)
        assert not result.requires_grad
        return result

    score(manifest_of(("a", "b")), values=values)


def test_values_of_any_width_and_precision():
    table = score(manifest_of(("a",)), values=lambda clips: clips.flatten(1)[:, :1].bfloat16())
    assert table.shape == (1, 1)
    assert table.dtype == np.float64


# --- Accuracies ---------------------------------------------------------------------------------


def scores_of(rows, labels):
    table = np.array([[np.nan] * len(rows[0]) if row is None else row for row in rows], float)
    return VideoValues(manifest_of([f"v{i}" for i in range(len(rows))], labels), table)


def one_hot(label, classes):
    return np.eye(classes)[label] * 0.9 + 0.01


def test_ranks_count_the_classes_ahead():
    scores = scores_of([[0.1, 0.6, 0.3]] * 3, (0, 1, 2))
    assert ranks_of(scores).tolist() == [2, 0, 1]
    assert not scores.excluded.any()


def test_of_equally_probable_classes_the_first_is_ahead_as_argmax_has_it():
    rows = [[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [1 / 3] * 3]
    for label, expected in ((0, [0, 2, 0]), (1, [1, 0, 1]), (2, [2, 1, 2])):
        scores = scores_of(rows, (label,) * 3)
        assert ranks_of(scores).tolist() == expected
        predicted = scores.values.argmax(axis=1)
        assert ((ranks_of(scores) == 0) == (predicted == label)).all()


@given(
    st.integers(2, 8).flatmap(
        lambda classes: st.lists(
            st.tuples(
                st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=classes, max_size=classes),
                st.integers(0, classes - 1),
            ),
            min_size=1,
            max_size=6,
        )
    )
)
def test_ranks_are_places_in_a_stable_sort(videos):
    scores = scores_of([row for row, _ in videos], tuple(label for _, label in videos))
    expected = [
        sorted(range(len(row)), key=lambda i, row=row: -row[i]).index(label)
        for row, label in videos
    ]
    assert ranks_of(scores).tolist() == expected


def test_a_summary_by_hand():
    rows = [one_hot(0, 7), one_hot(0, 7), one_hot(1, 7), [0.3, 0.2, 0.15, 0.12, 0.11, 0.1, 0.02]]
    rows += [rows[-1], one_hot(1, 7)]
    scores = scores_of(rows, (0, 0, 0, 5, 4, 1))
    result = summarise(scores, [f"class {i}" for i in range(7)])
    assert result["top1"] == pytest.approx(3 / 6)
    assert result["top5"] == pytest.approx(5 / 6), "the last but one is fifth, the one before sixth"
    assert result["chance"] == pytest.approx(1 / 4), "only classes that occur count"
    assert result["mean_class_top1"] == pytest.approx((2 / 3 + 1 + 0 + 0) / 4)
    assert (result["videos"], result["excluded"]) == (6, 0)
    assert result["classes"][0] == {
        "label": 0,
        "name": "class 0",
        "videos": 3,
        "correct": 2,
        "top1": pytest.approx(2 / 3),
    }
    assert result["classes"][2] == {
        "label": 2,
        "name": "class 2",
        "videos": 0,
        "correct": 0,
        "top1": None,
    }
    assert json.loads(json.dumps(result)) == result


def test_an_excluded_video_is_counted_and_wrong():
    scores = scores_of([one_hot(0, 7), None, one_hot(1, 7)], (0, 0, 1))
    assert ranks_of(scores).tolist() == [0, 7, 0]
    result = summarise(scores, [str(i) for i in range(7)])
    assert result["top1"] == pytest.approx(2 / 3)
    assert result["top5"] == pytest.approx(2 / 3)
    assert result["mean_class_top1"] == pytest.approx((1 / 2 + 1) / 2)
    assert (result["videos"], result["excluded"]) == (3, 1)
    assert confusion_counts(scores).sum() == 2
    text = describe(result)
    assert "on 3 videos" in text
    assert "1 of them do not decode: excluded, and counted as wrong" in text


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_with_few_classes_all_that_decode_are_among_the_best_five(classes):
    rows = [one_hot(0, classes), one_hot(1, classes), one_hot(1, classes)]
    result = summarise(scores_of(rows, (1, 1, 0)), [str(i) for i in range(classes)])
    assert result["top5"] == 1
    assert result["top1"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 6])
def test_an_excluded_video_is_not_among_the_best_five_of_few_classes(classes):
    rows = [one_hot(0, classes), None, one_hot(1, classes), None]
    result = summarise(scores_of(rows, (0, 1, 1, 0)), [str(i) for i in range(classes)])
    assert result["top1"] == result["top5"] == 0.5


def test_confusion_counts_true_classes_in_rows():
    rows = [one_hot(1, 3), one_hot(1, 3), one_hot(0, 3), None]
    counts = confusion_counts(scores_of(rows, (0, 0, 2, 1)))
    assert counts.tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]


# --- Files --------------------------------------------------------------------------------------

NAMES = ("jump, high", 'the "moonwalk"', "plain")


def test_results_are_read_back(tmp_path):
    manifest = Manifest(('/v/a, "b".mp4', "/v/gone.mp4", "/v/ü.mp4"), (0, 1, 2), (-1,) * 3)
    table = np.array([[0.5, 0.25, 0.25], [np.nan] * 3, [0.123456789, 0.6, 0.276543211]])
    scores = VideoValues(manifest, table)
    result = {"test": {"clips": 5}, **summarise(scores, NAMES)}
    folder = tmp_path / "not there yet" / "test"
    write_results(folder, scores, result, NAMES)
    assert {path.name for path in folder.iterdir()} == {
        "predictions.csv",
        "confusion.png",
        "result.json",
    }
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "path",
        "label",
        "label_name",
        "prediction",
        "prediction_name",
        "correct",
        *(f"probability of {name}" for name in NAMES),
    ]
    assert [row["path"] for row in rows] == list(manifest.files)
    assert [row["label"] for row in rows] == ["0", "1", "2"]
    assert [row["label_name"] for row in rows] == list(NAMES)
    assert [row["prediction"] for row in rows] == ["0", "", "1"]
    assert [row["prediction_name"] for row in rows] == [NAMES[0], "", NAMES[1]]
    assert [row["correct"] for row in rows] == ["1", "0", "0"]
    assert [row["probability of plain"] for row in rows] == ["0.25", "", "0.276543"]
    assert float(rows[2]["probability of jump, high"]) == 0.123457
    assert json.loads((folder / "result.json").read_text()) == result
    with Image.open(folder / "confusion.png") as image:
        assert min(image.size) > 100


def test_a_repeated_test_replaces_the_results(tmp_path):
    for label in (0, 1):
        scores = scores_of([one_hot(0, 3)], (label,))
        write_results(tmp_path, scores, summarise(scores, NAMES), NAMES)
    assert json.loads((tmp_path / "result.json").read_text())["top1"] == 0
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("classes", [1, 8, 31, 400])
def test_the_confusion_of_any_classes_is_drawn_whatever_they_are_called(tmp_path, classes):
    counts = np.random.default_rng(0).multinomial(9, np.full(classes, 1 / classes), size=classes)
    counts[0] = 0  # a class without videos
    names = [f"{'pretending ' * 5}\n{index} $x_{{ {index}" for index in range(classes)]
    draw_confusion(counts, names, tmp_path / "confusion.png", title="runs/$x_{/test\ntop-1 5%")
    with Image.open(tmp_path / "confusion.png") as image:
        assert image.format == "PNG"
        assert max(image.size) < 2000
        assert np.asarray(image.convert("L"))[1:-1, 1:-1].min() < 100


def test_the_terminal_sees_every_class_unless_there_are_many():
    few = [one_hot(0, 4)] * 3 + [one_hot(2, 4)]
    result = summarise(scores_of(few, (0, 0, 1, 2)), [f"class {i}" for i in range(4)])
    text = describe(result)
    assert "top-1 0.750, mean over classes" in text
    assert "chance 0.333" in text
    for line in ("class 0", "class 1", "class 2"):
        assert line in text
    assert "class 3" not in text, "it was not tested"
    assert "(0 of 1)" in text
    rows = [one_hot(i if i % 2 else 0, 40) for i in range(40)]
    many = describe(summarise(scores_of(rows, tuple(range(40))), [f"class {i}" for i in range(40)]))
    assert "\n" not in many


def test_no_name_is_a_formula_to_a_spreadsheet(tmp_path):
    names = ["=1+1", "@SUM(A1)", "plain"]
    manifest = Manifest(("-a.mp4", "/v/b.mp4"), (0, 1), (-1,) * 2)
    scores = VideoValues(manifest, np.array([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]))
    write_results(tmp_path, scores, summarise(scores, names), names)
    header, first, second = (tmp_path / "predictions.csv").read_text().splitlines()
    assert header.endswith("probability of =1+1,probability of @SUM(A1),probability of plain")
    assert first == "'-a.mp4,0,'=1+1,0,'=1+1,1,0.5,0.25,0.25"
    assert second.startswith("/v/b.mp4,1,'@SUM(A1),1,'@SUM(A1),1,")
