import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from hpm_video.training.curves import plot_curves, read_metrics


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make_records(updates: int) -> list[dict[str, object]]:
    train = {"kind": "train", "loss": 1.5, "reconstruction": 0.9, "prediction": 0.6, "lr": 1e-3}
    rest = {"hard_fraction": 0.1, "momentum": 0.9, "clips_per_second": 140.0, "data_wait": 0.0}
    validation = {"kind": "validation", "relative_error": 0.9, "student_ranking": 0.6}
    rankers = {"teacher_ranking": 0.6, "ranking_by_variance": 0.4, "ranking_by_motion": 0.4}
    return [
        *({**train, **rest, "update": n, "epoch": n / 10} for n in range(1, updates + 1)),
        {**validation, **rankers, "update": updates, "epoch": updates / 10},
    ]


def width_of(path: Path) -> int:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.width


@pytest.mark.parametrize("updates", [1, 2, 200])
def test_the_curves_of_a_run_are_drawn(tmp_path: Path, updates: int) -> None:
    metrics = write(tmp_path / "metrics.jsonl", make_records(updates))
    plot_curves(metrics, tmp_path / "run" / "curves.png")
    assert width_of(tmp_path / "run" / "curves.png") > 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["curves.png"]


def test_keys_that_never_occur_have_no_panel(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [{"kind": "train", "update": 1, "loss": 2.0}])
    three = write(tmp_path / "three.jsonl", make_records(3))
    widths = []
    for metrics in one, three:
        plot_curves(metrics, metrics.with_suffix(".png"))
        widths.append(width_of(metrics.with_suffix(".png")))
    assert widths[1] == 3 * widths[0]


def test_where_no_panel_shows_anything_nothing_is_drawn(tmp_path: Path) -> None:
    metrics = write(tmp_path / "m.jsonl", [{"kind": "validation", "update": 1, "top1": 0.5}])
    plot_curves(metrics, tmp_path / "accuracy.png")
    metrics = write(tmp_path / "m.jsonl", [{"kind": "validation", "update": 1, "other": 0.5}])
    for path in metrics, write(tmp_path / "empty.jsonl", []):
        plot_curves(path, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that have been saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def listen(figure: Figure, *arguments: object, **named: object) -> None:
        figures.append(figure)
        save(figure, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", listen)
    return figures


def labels_of(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_the_title_names_the_run(tmp_path: Path, drawn: list[Figure]) -> None:
    (tmp_path / "mine").mkdir()
    metrics = write(tmp_path / "mine" / "metrics.jsonl", make_records(40))
    plot_curves(metrics, tmp_path / "curves.png")
    (figure,) = drawn
    assert figure.get_suptitle() == f"{tmp_path.name}/mine"
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}


def test_a_panel_has_the_curves_of_its_keys_and_their_last_values(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    records: list[dict[str, object]] = [
        {"kind": "train", "update": n, "loss": 1 / n, "reconstruction": 2 / n} for n in (1, 2)
    ]
    ranking = {"student_ranking": 0.6, "images/student_ranking": 0.7, "ranking_by_motion": 0.54}
    records += [{"kind": "validation", "update": 2, **ranking}]
    plot_curves(write(tmp_path / "metrics.jsonl", records), tmp_path / "curves.png")
    loss, accuracy = drawn[0].axes
    assert labels_of(loss) == ["loss 0.5", "reconstruction 1"]
    assert labels_of(accuracy) == [
        "student_ranking 0.6",
        "images/student_ranking 0.7",
        "ranking_by_motion 0.54",
    ]


def test_a_line_that_was_cut_off_is_left_out_only_at_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", make_records(2))
    whole = path.read_text()
    path.write_text(whole + '{"kind": "tra')
    assert len(read_metrics(path)) == 3
    path.write_text('{"kind": "tra\n' + whole)
    with pytest.raises(ValueError, match="line 1 is .*tra', and must be a JSON object"):
        read_metrics(path)


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"kind": "train", "update": 1, "loss": float("nan"), "lr": 0.1},
        {"kind": "train", "update": 2, "loss": 3.0, "lr": float("inf")},
    ]
    path = write(tmp_path / "metrics.jsonl", records)
    table = read_metrics(path)
    np.testing.assert_array_equal(table["loss"], [np.nan, 3])
    np.testing.assert_array_equal(table["lr"], [0.1, np.nan])
    plot_curves(path, tmp_path / "curves.png")
