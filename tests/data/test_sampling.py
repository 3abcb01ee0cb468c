import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpm_video.data.sampling import middle_indices, train_indices

counts = {
    "num_video_frames": st.integers(1, 500),
    "num_frames": st.integers(1, 32),
    "stride": st.integers(1, 8),
}


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
    assert train_indices(num_video_frames, 16, 4, draw).tolist() == list(expected)


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
def test_the_middle_clip(num_video_frames, num_frames, stride, expected):
    assert middle_indices(num_video_frames, num_frames, stride).tolist() == list(expected)


@given(**counts, draw=st.floats(0, 1, exclude_max=True))
def test_indices_are_in_range_ascending_and_exactly_as_many(
    num_video_frames, num_frames, stride, draw
):
    for indices in (
        train_indices(num_video_frames, num_frames, stride, draw),
        middle_indices(num_video_frames, num_frames, stride),
    ):
        assert indices.shape == (num_frames,)
        assert indices.dtype == np.int64
        assert 0 <= indices[0] <= indices[-1] < num_video_frames
        steps = np.diff(indices)
        assert set(steps.tolist()) <= {0, stride}
        if num_video_frames >= num_frames * stride:
            assert (steps == stride).all()


def test_all_starts_are_equally_likely():
    starts = [train_indices(20, 4, 4, draw)[0] for draw in np.linspace(0, 1, 500, endpoint=False)]
    assert np.bincount(starts).tolist() == [100] * 5


@pytest.mark.parametrize("numbers", [(0, 16, 4), (10, 0, 4), (10, 16, 0)])
def test_counts_below_one_are_refused(numbers):
    with pytest.raises(ValueError, match="at least one frame"):
        train_indices(*numbers, 0.5)
