"""Which frames of a video make a clip: arithmetic on frame counts.

A clip spans ``num_frames * stride`` frames. In a video shorter than that it starts at the first
frame, and the last frame that the stride reaches repeats.
"""

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def train_indices(
    num_video_frames: int, num_frames: int, stride: int, start_draw: float
) -> Indices:
    """A clip at a random place; ``start_draw`` in [0, 1) chooses among those: -> (num_frames,)"""
    starts = num_video_frames - num_frames * stride + 1
    return _indices(num_video_frames, num_frames, stride, start=int(start_draw * max(starts, 1)))


def middle_indices(num_video_frames: int, num_frames: int, stride: int) -> Indices:
    """The clip in the middle of the video: -> (num_frames,)"""
    spare = num_video_frames - num_frames * stride
    return _indices(num_video_frames, num_frames, stride, start=max(spare, 0) // 2)


def _indices(num_video_frames: int, num_frames: int, stride: int, *, start: int) -> Indices:
    if min(num_video_frames, num_frames, stride) < 1:
        raise ValueError(
            f"a clip needs at least one frame of the video, one frame and a stride of 1, got "
            f"{num_video_frames}, {num_frames} and {stride}"
        )
    last_reached = (num_video_frames - 1 - start) // stride
    return start + stride * np.minimum(np.arange(num_frames, dtype=np.int64), last_reached)
