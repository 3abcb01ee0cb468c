from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpm_video.config.data import DataConfig
from hpm_video.data.reading import Footage, Views, train_segments, view_segments

counts = {
    "num_video_frames": st.integers(1, 500),
    "num_frames": st.integers(1, 32),
    "stride": st.integers(1, 8),
}
draws = st.floats(0, 1, exclude_max=True)


def drawn(num_video_frames, num_frames, stride, draw):
    generator = SimpleNamespace(random=lambda: draw)
    return Footage(0, num_video_frames, stride).draw(DataConfig(num_frames=num_frames), generator)


def viewed(num_video_frames, num_frames, stride, count):
    data = DataConfig(num_frames=num_frames)
    return Footage(0, num_video_frames, stride).views(data, Views(count))


@pytest.mark.parametrize(
    ("num_video_frames", "draw", "expected"),
    [
        (64, 0.0, range(0, 64, 4)),
        (64, 0.999, range(0, 64, 4)),
        (65, 0.499, range(0, 64, 4)),
        (65, 0.5, range(1, 65, 4)),
        (300, 0.0, range(0, 64, 4)),
        (300, 0.9999, range(236, 300, 4)),
        (63, 0.9, range(0, 64, 4)),
        (61, 0.9, range(0, 64, 4)),
        (60, 0.9, [*range(0, 60, 4), 56]),
        (40, 0.9, [*range(0, 40, 4), *[36] * 6]),
        (30, 0.9, [*range(0, 30, 4), *[28] * 8]),
        (1, 0.9, [0] * 16),
    ],
)
def test_training_clips_of_16_frames_at_stride_4(num_video_frames, draw, expected):
    assert drawn(num_video_frames, 16, 4, draw).tolist() == list(expected)


@pytest.mark.parametrize(
    ("num_video_frames", "num_frames", "stride", "expected"),
    [
        (64, 16, 4, range(0, 64, 4)),
        (66, 16, 4, range(1, 65, 4)),
        (300, 16, 4, range(118, 182, 4)),
        (40, 16, 4, [*range(0, 40, 4), *[36] * 6]),
        (9, 1, 1, [4]),
        (10, 4, 2, [1, 3, 5, 7]),
    ],
)
def test_a_single_view_is_the_middle_clip(num_video_frames, num_frames, stride, expected):
    views = viewed(num_video_frames, num_frames, stride, 1)
    assert views.tolist() == [list(expected)]


@pytest.mark.parametrize(
    ("num_video_frames", "num_frames", "stride", "num_views", "starts"),
    [
        (300, 16, 4, 5, [0, 59, 118, 177, 236]),
        (68, 16, 4, 5, [0, 1, 2, 3, 4]),
        (66, 16, 4, 5, [0, 0, 1, 1, 2]),
        (64, 16, 4, 5, [0] * 5),
        (10, 16, 4, 3, [0] * 3),
        (30, 4, 2, 2, [0, 22]),
        (9, 1, 1, 9, range(9)),
    ],
)
def test_views_are_spread_over_the_video(num_video_frames, num_frames, stride, num_views, starts):
    views = viewed(num_video_frames, num_frames, stride, num_views)
    assert views[:, 0].tolist() == list(starts)
    for start, view in zip(starts, views, strict=True):
        reached = [start + stride * step for step in range(num_frames)]
        last = max(frame for frame in reached if frame < num_video_frames)
        assert view.tolist() == [min(frame, last) for frame in reached]


@given(**counts, num_views=st.integers(2, 12))
def test_views_begin_with_the_video_end_with_it_and_are_even(
    num_video_frames, num_frames, stride, num_views
):
    views = viewed(num_video_frames, num_frames, stride, num_views)
    assert views.shape == (num_views, num_frames)
    assert views[0, 0] == 0
    spare = max(num_video_frames - num_frames * stride, 0)
    assert views[-1, 0] == spare  # its span of num_frames x stride frames ends with the video
    ideal = [Fraction(view * spare, num_views - 1) for view in range(num_views)]
    assert all(0 <= at - start < 1 for at, start in zip(ideal, views[:, 0].tolist(), strict=True))


@given(**counts, draw=draws, num_views=st.integers(1, 9))
def test_indices_are_in_range_ascending_and_exactly_as_many(
    num_video_frames, num_frames, stride, draw, num_views
):
    for indices in (
        drawn(num_video_frames, num_frames, stride, draw),
        *viewed(num_video_frames, num_frames, stride, num_views),
    ):
        assert indices.shape == (num_frames,)
        assert indices.dtype == np.int64
        assert 0 <= indices[0] <= indices[-1] < num_video_frames
        steps = np.diff(indices)
        assert set(steps.tolist()) <= {0, stride}
        if num_video_frames >= num_frames * stride:
            assert (steps == stride).all()


def test_all_starts_are_equally_likely():
    starts = [drawn(20, 4, 4, draw)[0] for draw in np.linspace(0, 1, 500, endpoint=False)]
    assert np.bincount(starts).tolist() == [100] * 5


@pytest.mark.parametrize(
    ("num_video_frames", "frame_draws", "expected"),
    [
        (40, [0, 0, 0, 0], [0, 10, 20, 30]),
        (40, [0.999] * 4, [9, 19, 29, 39]),
        (40, [0.55, 0, 0.999, 0.1], [5, 10, 29, 31]),
        (10, [0, 0, 0, 0], [0, 2, 5, 7]),  # segments of 2.5 frames
        (10, [0.999] * 4, [2, 4, 7, 9]),
        (3, [0] * 6, [0, 0, 1, 1, 2, 2]),  # fewer frames than segments
        (3, [0.999] * 6, [0, 0, 1, 1, 2, 2]),
        (1, [0, 0.5, 0.999], [0, 0, 0]),
        (7, [0.5], [3]),
    ],
)
def test_a_training_clip_of_segments(num_video_frames, frame_draws, expected):
    indices = train_segments(num_video_frames, frame_draws)
    assert indices.tolist() == expected
    assert indices.dtype == np.int64


@given(num_video_frames=st.integers(1, 500), frame_draws=st.lists(draws, min_size=1, max_size=32))
def test_each_segment_gives_one_frame(num_video_frames, frame_draws):
    indices = train_segments(num_video_frames, frame_draws)
    assert indices.shape == (len(frame_draws),)
    assert 0 <= indices.min() <= indices.max() < num_video_frames
    assert (np.diff(indices) >= 0).all()
    # Frame i covers [i, i + 1), and segment x of the video [x L / T, (x + 1) L / T]: they overlap.
    # A draw close to 1 may be rounded to the segment's end, where the next frame begins.
    length = Fraction(num_video_frames, len(frame_draws))
    for segment, index in enumerate(indices.tolist()):
        assert index <= (segment + 1) * length
        assert index + 1 > segment * length


def test_a_draw_beside_1_stays_in_the_video():
    almost = np.nextafter(1, 0)
    for num_video_frames in range(1, 300):
        assert train_segments(num_video_frames, [almost] * 16)[-1] == num_video_frames - 1


def test_every_frame_of_a_segment_is_equally_likely():
    drawn = [train_segments(20, [d, d, d, d]) for d in np.linspace(0, 1, 500, endpoint=False)]
    assert np.bincount(np.concatenate(drawn)).tolist() == [100] * 20


@pytest.mark.parametrize(
    ("num_video_frames", "num_frames", "num_views", "expected"),
    [
        (40, 4, 1, [[0, 10, 20, 30]]),
        (40, 4, 2, [[0, 10, 20, 30], [5, 15, 25, 35]]),
        (10, 4, 2, [[0, 2, 5, 7], [1, 3, 6, 8]]),
        (8, 4, 4, [[0, 2, 4, 6], [0, 2, 4, 6], [1, 3, 5, 7], [1, 3, 5, 7]]),
        (3, 6, 2, [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]]),
        (1, 3, 2, [[0, 0, 0], [0, 0, 0]]),
        (100, 1, 3, [[0], [33], [66]]),
    ],
)
def test_views_of_segments(num_video_frames, num_frames, num_views, expected):
    assert view_segments(num_video_frames, num_frames, num_views).tolist() == expected


@given(
    num_video_frames=st.integers(1, 500),
    num_frames=st.integers(1, 32),
    num_views=st.integers(1, 12),
)
def test_views_of_segments_are_the_formulas_whatever_floats_would_say(
    num_video_frames, num_frames, num_views
):
    views = view_segments(num_video_frames, num_frames, num_views)
    assert views.dtype == np.int64
    assert views.tolist() == [
        [
            int(Fraction(num_video_frames, num_frames) * (x + Fraction(k, num_views)))
            for x in range(num_frames)
        ]
        for k in range(num_views)
    ]
    assert views.max() < num_video_frames
