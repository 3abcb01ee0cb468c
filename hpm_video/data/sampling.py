"""Which frames of a video make a clip: arithmetic on frame counts.

A dense clip takes frames at a stride and spans ``num_frames * stride`` of them. In a video shorter
than that it starts at the first frame, and the last frame that the stride reaches repeats. A clip
of segments spans the whole video: it takes one frame of each of ``num_frames`` equal parts.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def train_indices(
    num_video_frames: int, num_frames: int, stride: int, start_draw: float
) -> Indices:
    """A dense clip at a random place, which ``start_draw`` in [0, 1) chooses: -> (num_frames,)"""
    starts = num_video_frames - num_frames * stride + 1
    return _dense(num_video_frames, num_frames, stride, start=int(start_draw * max(starts, 1)))


def train_segments(num_video_frames: int, frame_draws: Sequence[float]) -> Indices:
    """One frame of each segment; a draw in [0, 1) chooses which: (num_frames,) -> (num_frames,)"""
    _check(num_video_frames, len(frame_draws), stride=1)
    places = np.arange(len(frame_draws)) + np.asarray(frame_draws, dtype=np.float64)
    indices = np.floor(num_video_frames * places / len(frame_draws)).astype(np.int64)
    return np.minimum(indices, num_video_frames - 1)  # a draw just below 1 may be rounded up


def view_indices(num_video_frames: int, num_frames: int, stride: int, num_views: int) -> Indices:
    """Dense clips that start evenly spread over the video: -> (num_views, num_frames)

    The first starts with the video and the last ends with it; a single one is in the middle.
    """
    spare = max(num_video_frames - num_frames * stride, 0)
    if num_views == 1:
        starts = [spare // 2]
    else:
        starts = [view * spare // (num_views - 1) for view in range(num_views)]
    return np.stack([_dense(num_video_frames, num_frames, stride, start=at) for at in starts])


def view_segments(num_video_frames: int, num_frames: int, num_views: int) -> Indices:
    """Clips of segments, each a share of a segment later: -> (num_views, num_frames)

    View k of n takes the frames floor(L / T (x + k / n)), x = 0 .. T - 1, of a video of L frames,
    T of which make a clip.
    """
    _check(num_video_frames, num_frames, stride=1)
    places = np.arange(num_frames) * num_views + np.arange(num_views)[:, None]
    indices: Indices = num_video_frames * places // (num_frames * num_views)
    return indices


def _dense(num_video_frames: int, num_frames: int, stride: int, *, start: int) -> Indices:
    _check(num_video_frames, num_frames, stride)
    last_reached = (num_video_frames - 1 - start) // stride
    return start + stride * np.minimum(np.arange(num_frames, dtype=np.int64), last_reached)


def _check(num_video_frames: int, num_frames: int, stride: int) -> None:
    if min(num_video_frames, num_frames, stride) < 1:
        raise ValueError(
            f"a clip needs at least one frame of the video, one frame and a stride of 1, got "
            f"{num_video_frames}, {num_frames} and {stride}"
        )


def window_indices(num_video_frames: int, num_frames: int, stride: int, every: int) -> Indices:
    """Dense clips of a window that slides over the video: -> (windows, num_frames)

    They start at 0, ``every``, 2 ``every`` ... as long as they fit. Where the last of these does
    not end with the video, one more does.
    """
    if every < 1:
        raise ValueError(f"windows need at least one frame from one to the next, got {every}")
    spare = max(num_video_frames - num_frames * stride, 0)
    starts = [*range(0, spare, every), spare]
    return np.stack([_dense(num_video_frames, num_frames, stride, start=at) for at in starts])
