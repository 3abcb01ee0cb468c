from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image

from hpm_video.recognition import confusion
from hpm_video.recognition.confusion import (
    NO_VIDEO,
    SHARES,
    draw_confusion,
    most_confused,
    shares_of,
)

Counts = NDArray[np.int64]
Pixels = NDArray[np.int64]


def make_counts(classes: int, videos: int = 40) -> Counts:
    rng = np.random.default_rng(classes)
    shares = rng.dirichlet(np.full(classes, 0.1), size=classes) * 0.4 + 0.6 * np.eye(classes)
    return np.array([rng.multinomial(videos, row) for row in shares])


def names_of(classes: int) -> list[str]:
    return [f"class {index}" for index in range(classes)]


def draw(path: Path, counts: Counts, names: list[str] | None = None) -> Pixels:
    draw_confusion(counts, names or names_of(len(counts)), path, title="A test")
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(np.int64)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Pixels]:
    """Pictures of ``make_counts`` of so many classes, each drawn once."""
    folder = tmp_path_factory.mktemp("drawn")

    @cache
    def make(classes: int) -> Pixels:
        return draw(folder / str(classes) / "confusion.png", make_counts(classes))

    return make


def count_of(pixels: Pixels, colour: str | tuple[float, ...]) -> int:
    """Pixels of about this colour."""
    return int((np.abs(pixels - 255 * np.array(to_rgb(colour))).max(axis=-1) <= 2).sum())


@pytest.mark.parametrize("classes", [1, 8, 30, 31, 60, 61, 700])
def test_any_number_of_classes_is_drawn_within_its_margin(
    drawn: Callable[[int], Pixels], classes: int
) -> None:
    pixels = drawn(classes)
    height, width, _ = pixels.shape
    assert width <= 2400
    assert height <= 1800
    border = np.ones((height, width), dtype=bool)
    border[20:-20, 20:-20] = False
    assert (pixels[border] == 255).all()  # nothing is cut off
    drawn = (pixels < 250).any(axis=-1)
    assert drawn.any(axis=1).argmax() < 40
    assert drawn.any(axis=0).argmax() < 40


@pytest.mark.parametrize("classes", [12, 31])
def test_long_names_are_shortened(tmp_path: Path, classes: int) -> None:
    long = [
        f"{'pretending to put something ' * 5}\n{index} $x_{{ {index}" for index in range(classes)
    ]
    pixels = draw(tmp_path / "test" / "long.png", make_counts(classes), long)
    assert [path.name for path in (tmp_path / "test").iterdir()] == ["long.png"]
    assert pixels.shape[1] <= 2400
    assert (pixels[:, -20:] == 255).all()
    assert (pixels[:, :20] == 255).all()
    assert (pixels[-20:] == 255).all()


def test_colours_are_shares_of_the_true_class(tmp_path: Path) -> None:
    cell = (2.5 / 2 * confusion.DPI) ** 2
    pixels = draw(tmp_path / "a.png", np.array([[3, 1], [0, 50]]))
    for share in 0.75, 0.25, 1.0:
        assert 0.4 * cell < count_of(pixels, SHARES(share)) < 1.3 * cell
    flipped = draw(tmp_path / "b.png", np.array([[3, 1], [50, 0]]))
    top, left = (int(place) for place in np.argwhere(is_full(flipped)).mean(axis=0))
    expected, right = (int(place) for place in np.argwhere(is_full(pixels)).mean(axis=0))
    assert left < right
    assert abs(top - expected) < 20


def is_full(pixels: Pixels) -> NDArray[np.bool_]:
    """Pixels of cells with all videos of a class; of the colour bar there are but a few."""
    return np.abs(pixels - 255 * np.array(to_rgb(SHARES(1.0)))).max(axis=-1) <= 1


@pytest.mark.parametrize(("classes", "cell"), [(8, 18), (61, 12)])
def test_rows_without_videos_are_grey(
    tmp_path: Path, drawn: Callable[[int], Pixels], classes: int, cell: int
) -> None:
    counts = make_counts(classes)
    before = count_of(drawn(classes), NO_VIDEO)
    counts[[1, 4]] = 0
    after = count_of(draw(tmp_path / "empty.png", counts), NO_VIDEO)
    assert after - before > 0.3 * 2 * classes * cell**2


def test_no_videos_are_drawn_too(tmp_path: Path) -> None:
    draw(tmp_path / "none.png", np.zeros((3, 3), np.int64))


def test_more_classes_than_are_named_have_a_list_instead(drawn: Callable[[int], Pixels]) -> None:
    few, many = drawn(30), drawn(61)
    assert few.shape[1] < 1.15 * few.shape[0]
    assert many.shape[1] > 1.3 * many.shape[0]


def test_counts_too_long_for_their_cells_are_left_out(tmp_path: Path) -> None:
    short, long = (
        draw(tmp_path / f"{digits}.png", make_counts(9) * 10**digits) for digits in (1, 14)
    )
    ink = [count_of(pixels[200:-250, 300:-400], confusion.INK) for pixels in (short, long)]
    assert ink[1] < 0.1 * ink[0]


def test_steps_of_the_colour_map_look_even() -> None:
    """Lightness (CIE L*) falls evenly from white."""
    linear = SHARES(np.linspace(0, 1, 11))[:, :3]
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16
    assert lightness[0] == pytest.approx(100, abs=0.01)
    steps = -np.diff(lightness)
    assert steps.min() > 0.9 * steps.mean()
    assert steps.max() < 1.1 * steps.mean()


def test_most_confused_pairs_come_first() -> None:
    counts = np.array([[6, 4, 0], [10, 80, 10], [1, 1, 0]])
    assert most_confused(counts, ["a", "b", "c"], 4) == [
        "c → a: 50% (1)",
        "c → b: 50% (1)",
        "a → b: 40% (4)",
        "b → a: 10% (10)",
    ]
    assert len(most_confused(counts, ["a", "b", "c"], 100)) == 5  # never a pair without videos
    assert counts[0, 0] == 6


def test_of_equal_shares_the_pair_of_more_videos_comes_first() -> None:
    counts = np.array([[1, 1, 0], [0, 8, 8], [0, 0, 0]])
    pairs = most_confused(counts, ["a", "b", "c"], 9)
    assert pairs == ["b → c: 50% (8)", "a → b: 50% (1)"]
    assert most_confused(np.zeros((2, 2), dtype=int), ["a", "b"], 9) == []


def test_shares_of_a_row_without_videos_are_unknown() -> None:
    shares = shares_of(np.array([[3, 1], [0, 0]]))
    np.testing.assert_array_equal(shares, [[0.75, 0.25], [np.nan, np.nan]])
