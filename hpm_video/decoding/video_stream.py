"""The frames of a video one after the other, with the times at which they are shown.

In bounded memory, however long the video is. It is read as :class:`PyavReader` reads it, which
gets at single frames: frame i is the same one.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from hpm_video.decoding.locations import source_of
from hpm_video.decoding.pyav import PyavReader, open_container

if TYPE_CHECKING:
    import av
    from av import VideoFrame as VideoFrame

USUAL_RATE = Fraction(25)
"""Frames a second, where the file does not state them."""
SIMPLEST = 1001
"""Largest denominator of a frame rate: that of 30000/1001."""


class Timed(NamedTuple):
    """A frame of a video, and when it is shown."""

    time: Fraction
    """Seconds."""
    frame: "av.VideoFrame"


class VideoStream:
    """The frames of a video in the order of presentation, one at a time.

    First comes :meth:`survey`, which goes through the file without decoding, then :meth:`frames`.
    """

    def __init__(self, place: str) -> None:
        """Open a file, or a member of a tar.

        Raises:
            DecodeError: it has no video stream, or names other files.
            OSError, av.FFmpegError: it cannot be opened.
        """
        self._file, head = source_of(place)
        with PyavReader(place, self._file, head) as reader:
            self._has_times = bool(reader.times)
        self._open()
        self.rate = USUAL_RATE
        """Frames a second, on average."""
        self.num_packets = 0
        self.stated_frames = self._stream.frames
        """Frames by the header, 0 where it has no count."""
        self.key_distance = 0
        """Frames from one key frame to the next, at most."""

    def _open(self) -> None:
        self._container, self._stream = open_container(self._file)

    def survey(self) -> Iterator[None]:
        """Find out rate, key frames and number of packets; yields now and then."""
        times = []
        since_key = 0
        for packet in self._container.demux(self._stream):
            if not packet.size:
                continue
            self.num_packets += 1
            since_key = 1 if packet.is_keyframe else since_key + 1
            self.key_distance = max(self.key_distance, since_key)
            if packet.pts is not None and not packet.is_discard:
                times.append(packet.pts)
            yield
        self.rate = self._rate(times)
        self._container.close()
        self._open()

    def _rate(self, times: list[int]) -> Fraction:
        stated = self._stream.average_rate or self._stream.guessed_rate
        span = max(times) - min(times) if times and self._has_times else 0
        if span and self._stream.time_base:
            measured = Fraction((len(times) - 1) / (span * self._stream.time_base))
            if not (stated and abs(measured / stated - 1) < 0.01):
                stated = measured.limit_denominator(SIMPLEST)
        return Fraction(stated) if stated and 0.001 <= stated <= 1000 else USUAL_RATE

    def frames(self) -> Iterator[Timed]:
        """All frames. Times rise; where the file has none they follow from its rate."""
        time, step = Fraction(0), 1 / self.rate
        for number, frame in enumerate(self._container.decode(self._stream)):
            stated = (
                frame.pts * frame.time_base
                if self._has_times and frame.pts is not None and frame.time_base
                else time + step
            )
            time = Fraction(stated) if not number or stated > time else time + step
            yield Timed(time, frame)

    def close(self) -> None:
        """Free what the decoder holds."""
        self._container.close()
